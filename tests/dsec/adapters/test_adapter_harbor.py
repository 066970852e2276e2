"""Tasks in the harbor layout: loaded, solved by their own solution, scored."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from dsec.adapters.harbor import Task, load, load_all, score, solve, start
from dsec.errors import InvalidRequest

TOML = """
[metadata]
difficulty = "easy"
[agent]
timeout_sec = 60.0
[verifier]
timeout_sec = 30.0
[environment]
cpus = 1
memory = "128M"
storage_mb = 64
"""
TEST = """
[ "$(sh lib/sum.sh)" = 4 ] && R=1 || R=0.25
echo $R > /logs/verifier/reward.txt
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    task = tmp_path / "fix-sum"
    for name, text in {
        "task.toml": TOML,
        "instruction.md": "Make sum.sh print 4.",
        "environment/Dockerfile": "FROM debian:12\nCOPY . /app\n",
        "environment/lib/sum.sh": "echo $((2 + 3))\n",
        "tests/test.sh": TEST,
        "solution/solve.sh": "echo 'echo $((2 + 2))' > lib/sum.sh\n",
    }.items():
        path = task / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return task


def test_a_task_as_it_lies_on_disk(folder: Path) -> None:
    task = load(folder)
    assert (task.name, task.base, task.memory, task.disk, task.agent_timeout) == ("fix-sum", "debian:12", 128, 64, 60.0)
    assert load_all(folder.parent) == [task] and task.metadata == {"difficulty": "easy"}
    (folder / "task.toml").write_text("[environment]\nmemory = 'lots'")
    with pytest.raises(InvalidRequest, match="lots"):
        load(folder)
    (folder / "instruction.md").unlink()
    with pytest.raises(InvalidRequest, match="instruction"):
        load(folder)


def test_the_solution_is_what_makes_the_difference(folder: Path, home: Path) -> None:
    async def run(task: Task, solved: bool) -> float:
        box = await start(task)
        try:
            listed = await box.commands.run("ls /app /tests /solution 2>/dev/null; true")
            assert "lib" in listed.stdout and "test.sh" not in listed.stdout, "tests and solution come later"
            if solved:
                await solve(box, task)
            return await score(box, task)
        finally:
            await box.kill()

    assert asyncio.run(run(load(folder), False)) == 0.25
    assert asyncio.run(run(load(folder), True)) == 1.0
    (folder / "tests/test.sh").write_text("grep -q 9 lib/sum.sh")
    assert asyncio.run(run(load(folder), True)) == 0.0
    (folder / "tests/test.sh").write_text("echo many > /logs/verifier/reward.txt")
    with pytest.raises(InvalidRequest, match="number"):
        asyncio.run(run(load(folder), False))
