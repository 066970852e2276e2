"""Atomic files, seeds, metrics, progress and run configs."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from dsv4.common import console, files, seeds
from dsv4.common.metrics import MetricsLog, read_metrics
from dsv4.common.runconfig import load, resolved


def test_atomic_write_replaces_whole_files(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.json"
    files.atomic_write(target, "one")
    files.atomic_write(target, b"two")
    assert target.read_bytes() == b"two"
    assert [p.name for p in target.parent.iterdir()] == ["b.json"]


def test_full_disk_keeps_the_old_file_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "weights"
    files.atomic_write(target, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"disk full while writing .*weights"):
        files.atomic_write(target, "new")
    with pytest.raises(OSError, match="disk full"), files.atomic_folder(tmp_path / "folder") as folder:
        (folder / "x").write_text("1")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_atomic_folder_is_complete_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "step"
    with pytest.raises(RuntimeError, match="stop"), files.atomic_folder(target) as folder:
        (folder / "half").write_text("x")
        assert not target.exists()
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []
    for content in ("first", "second"):
        with files.atomic_folder(target) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "file").write_text(content)
    assert (target / "sub" / "file").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["step"]


def test_seeds_depend_on_every_key() -> None:
    keys = [(), ("a",), ("a", 0), ("a", 1), ("a0",)]
    drawn = [seeds.derive(2), *(seeds.derive(1, *k) for k in keys)]
    assert len(set(drawn)) == len(drawn)
    assert seeds.derive(1, "a", 1) == drawn[-2]
    assert seeds.generator(3, "x").integers(1 << 30) == seeds.generator(3, "x").integers(1 << 30)
    assert seeds.rng(3, "x").random() != seeds.rng(3, "y").random()


def test_metrics_survive_a_kill_and_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 6):
        log.write(step=step, loss=1 / step)
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
    log = MetricsLog(path, step=3)
    log.write(step=4, loss=9.0)
    assert [(row["step"], row["loss"]) for row in read_metrics(path)][2:] == [(3, 1 / 3), (4, 9.0)]
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write(step=5, loss=float("nan"))
    assert len(read_metrics(path)) == 4


def test_progress_counts_only_what_this_process_did(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    with console.Progress(1000, "train", "tokens", done=500, stream=out) as bar:
        clock[0] += 10
        bar.update(100, loss=3.14159)
        assert out.getvalue() == "", "a pipe is not flooded"
        clock[0] += 10
        bar.update(100, loss=3.0)
        assert bar.rate() == 10
    assert out.getvalue().splitlines()[0] == "train  70 %  700/1k tokens  10 tokens/s  ETA 30 s  loss 3"
    assert [console.duration(s) for s in (7.4, 187, 7387)] == ["7 s", "3:07", "2:03:07"]
    assert [console.count(n) for n in (950, 12345, 4.567e6)] == ["950", "12.3k", "4.57M"]


def test_fail_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        console.fail("no such thing")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "dsv4: error: no such thing\n"


@dataclasses.dataclass(frozen=True)
class Inner:
    lr: float = 0.5
    kind: Literal["a", "b"] = "a"
    betas: tuple[float, ...] = (0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    steps: int = 10
    limit: int | None = None
    inner: Inner = Inner()
    extra: dict[str, int] = dataclasses.field(default_factory=dict)


def test_runconfig_reads_overrides_and_writes_back(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('name = "x"\n[inner]\nlr = 1\n[extra]\nq = 3\n')
    got = load(Outer, path, ["steps=7", "inner.betas=[0.1, 0.2]", "inner.kind=b", "name=plain words", "limit=4"])
    assert got == Outer("plain words", 7, 4, Inner(1.0, "b", (0.1, 0.2)), {"q": 3})
    (tmp_path / "again.toml").write_text(resolved(got))
    assert load(Outer, tmp_path / "again.toml") == got


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ('name = "x"\n[inner]\nbeta = 1', [], r"inner: unknown key 'beta'; did you mean 'betas'"),
        ("steps = 3", [], "name is missing"),
        ('name = "x"\nsteps = true', [], "steps must be int, got True"),
        ('name = "x"\nsteps = 1.5', [], "steps must be int, got 1.5"),
        ('name = "x"\n[inner]\nkind = "c"', [], "kind is 'c'; known: 'a', 'b'"),
        ('name = "x"', ["steps"], "not of the form"),
        ('name = "x"', ["name.y=1"], "name is a value, not a table"),
        ('name = "x', [], "is not TOML"),
    ],
)
def test_runconfig_errors_name_the_key(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(Outer, path, overrides)
    with pytest.raises(ValueError, match="no recipe at"):
        load(Outer, tmp_path / "absent.toml")


def test_metrics_rows_are_json_lines(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "m").write(step=1, note="é")
    assert json.loads((tmp_path / "m").read_text()) == {"step": 1, "note": "é"}


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_is_kept() -> None:
    script = """
import resource
import torch
from dsv4.common.memory import keep_freed_memory
kept = keep_freed_memory()
a = torch.ones(4 << 20)
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        a + 1
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / times
faults(32)
print(kept, faults(32))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    assert kept == "False" or float(faults) < 1000, f"{faults} page faults for a tensor of 4096 pages"
