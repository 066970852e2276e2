"""`dsec log` on a real log, whole and damaged."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dsec.trajectory import Live, TrajectoryLog
from dsec.trajectory.cli import app
from dsec.trajectory.segment import pack, scan, segments
from dsec.types import Spec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    async def body() -> None:
        log = TrajectoryLog(tmp_path, segment_size=3000)
        for name, commands in (("run/1", "ab"), ("run/2", "ax")):
            t = await log.open(name, Spec())
            for command in commands:
                ticket = await t.begin("run", {"command": f"echo {command}"})
                assert isinstance(ticket, Live)
                await t.end(ticket, {"stdout": f"{command}\n" * 40_000, "exit_code": 0})
            await t.snapshot("layer-1")
        child = await t.fork(1)
        child.attach("alive")
        await child.begin("run", {"command": "never ends"})
        log.close()

    asyncio.run(body())
    return tmp_path


def run(folder: Path, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*arguments, "--folder", str(folder)])
    assert result.exit_code == code, result.output
    return result.output


def test_show_verify_replay_diff(folder: Path) -> None:
    assert run(folder, "show").splitlines() == [
        "run/1@main  2 steps, 0 unknown, epoch 1",
        "run/2@main  2 steps, 0 unknown, epoch 1",
        "run/2@main.1  2 steps, 1 unknown, epoch 1",
    ]
    shown = run(folder, "show", "run/2@main.1")
    assert "exit 0" in shown.splitlines()[0] and "unknown" in shown.splitlines()[1]
    rows = [json.loads(line) for line in run(folder, "show", "run/1", "--json").splitlines()]
    assert [row["args"]["command"] for row in rows] == ["echo a", "echo b"]
    assert rows[0]["outputs"] == {"stdout": 80_000}
    assert run(folder, "replay", "run/1") == "$ echo a\n" + "a\n" * 40_000 + "$ echo b\n" + "b\n" * 40_000
    assert run(folder, "replay", "run/1", "--step", "1") == "$ echo b\n" + "b\n" * 40_000
    assert "args.command" in run(folder, "diff", "run/1", "run/2", code=1)
    assert run(folder, "diff", "run/1", "run/1") == "the same for 2 steps\n"
    counts = json.loads(run(folder, "verify", "--json"))
    assert counts["problems"] == [] and counts["steps"] == 5 and counts["blobs"] == 5 and counts["branches"] == 3


def test_verify_sees_an_altered_step_a_lost_blob_and_a_broken_frame(folder: Path) -> None:
    path = segments(folder / "shards" / "local")[0]
    whole = path.read_bytes()
    begin = next(frame for frame in scan(path).frames if b'"BEGIN"' in frame.header)
    forged = begin.header.replace(b"echo a", b"echo z")  # with a CRC that fits: only the chain of keys can tell
    frame = pack(begin.stream, begin.epoch, begin.mark, forged, begin.payload, begin.batch)
    path.write_bytes(whole[: begin.offset] + frame + whole[begin.end :])
    assert "step 0 does not follow" in run(folder, "verify", code=1)
    path.write_bytes(whole[: begin.offset + 50] + b"?" + whole[begin.offset + 51 :])
    assert "bad frame" in run(folder, "verify", code=1)
    path.write_bytes(whole)
    blob = next((folder / "blobs").glob("*/*"))
    blob.write_bytes(blob.read_bytes() + b"!")
    assert "SHA-256" in run(folder, "verify", code=1)
    blob.unlink()
    assert "missing" in run(folder, "verify", code=1)


def test_delete_and_compact(folder: Path) -> None:
    assert json.loads(run(folder, "delete", "run/1", "--json")) == {"branches": ["main"]}
    assert "no trajectory 'run/1'" in run(folder, "delete", "run/1", code=1)
    names = [json.loads(line)["trajectory"] for line in run(folder, "show", "--json").splitlines()]
    assert set(names) == {"run/2"}
    assert json.loads(run(folder, "compact", "--json"))["expired"] == []
    run(folder, "verify")
    assert json.loads(run(folder, "compact", "--older-than", "0.0000001", "--json"))["expired"] == ["run/2"]
    assert run(folder, "show") == ""
    run(folder, "verify")
    assert "no trajectory log" in run(folder / "nowhere", "compact", code=1)


def test_a_running_edge_deletes_for_the_command(root_host: Any) -> None:
    box = root_host.create(trajectory="cli/1", timeout=60, snapshot_steps=1)
    for _ in range(2):
        box.commands.run("true")
    box.commands.run("true", idempotent=True)
    folder = root_host.home / "log"
    assert "open" in run(folder, "delete", "cli/1", code=1)
    box.kill()
    assert list((root_host.home / "snapshots").glob("auto-*"))
    run(folder, "delete", "cli/1")
    assert not list((root_host.home / "snapshots").glob("auto-*"))
    run(folder, "compact")
    again = root_host.create(trajectory="cli/1", timeout=60)
    assert not again.commands.run("true").replayed
    again.kill()
