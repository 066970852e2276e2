"""The serving commands as a user runs them, on a small random model written to disk."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import wait_for
from scripted import TOKENIZER, running, scripted_service

import dsv4
from dsv4.model import Transformer

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    config = dsv4.Config.preset("micro").replace(vocab_size=TOKENIZER.vocab_size, max_position_embeddings=256)
    dsv4.save(Transformer(config).init_weights(seed=1), path, tokenizer=TOKENIZER)
    return path


def run(*arguments: object, say: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsv4.cli", *map(str, arguments)]
    return subprocess.run(command, input=say, capture_output=True, text=True, timeout=300)


def test_generate(folder: Path) -> None:
    ask = ("generate", folder, "Once", "--max-tokens", 12, "--temperature", 1, "--json")
    first, again = (json.loads(run(*ask, "--seed", 1).stdout) for _ in range(2))
    for report in (first, again):
        assert report.pop("seconds") > 0 and report["usage"]["completion_tokens"] <= 12
    assert first == again
    raw = run("generate", folder, "Once", "--raw", "--max-tokens", 5)
    assert raw.returncode == 0 and raw.stdout.strip()


def test_chat_with_a_folder_and_with_a_server(folder: Path) -> None:
    talk = run("chat", folder, "--max-tokens", 8, say="hello\n/mode non-think\n/what\nagain\n/clear\n/quit\n")
    assert talk.returncode == 0 and talk.stdout.count("tokens/s") == 2, talk.stderr
    assert "mode non-think" in talk.stdout and "/clear  " in talk.stdout
    with running(scripted_service("A thought.</think>An answer."), api_key="sk-1") as url:
        talk = run("chat", "--url", url, "--api-key", "sk-1", say="hello\n")
        assert "A thought.\n---\n\nAn answer." in talk.stdout and talk.returncode == 0
        refused = run("chat", "--url", url, "--model", "scripted", say="hello\n")
        assert "Authentication Fails" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("serve", "no/such/folder", "--port", 0), "no/such/folder"),
        (("chat", "--url", "http://127.0.0.1:9"), "refused"),
        (("chat", "--mode", "deep"), "known: non-think, high, max"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[object, ...], told: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2 and told in result.stderr
    assert result.stderr.startswith("dsv4: error: ") and len(result.stderr.splitlines()) == 1


@pytest.fixture
def served(folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    command = [sys.executable, "-m", "dsv4.cli", "serve", str(folder), "--port", "0", "--threads", "1"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    yield process, [process.stdout.readline().rstrip() for _ in range(4)]
    process.kill()
    process.wait()


def test_serve_says_what_it_serves_and_stops_on_ctrl_c(served: tuple[subprocess.Popen[str], list[str]]) -> None:
    process, (model, context, page, api) = served
    assert model.startswith("tiny: 0.") and "float32 on cpu, 1 threads" in model
    assert context == "context 256 tokens, prompt dialect v4-preview" and "deepseek-v4-pro" in api
    url = page.split()[-1]

    def answers() -> bool:
        try:
            return bool(urllib.request.urlopen(f"{url}models").status == 200)
        except OSError:
            return False

    wait_for(answers, 60, "the server")
    port = int(url.rstrip("/").rpartition(":")[2])
    taken = run("serve", "any", "--port", port)
    assert taken.returncode == 2 and f"cannot listen on 127.0.0.1:{port}" in taken.stderr
    process.send_signal(signal.SIGINT)
    assert process.wait(60) in (0, 130) and process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    with socket.create_server(("127.0.0.1", port)):
        pass  # free again
