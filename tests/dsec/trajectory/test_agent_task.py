"""An agent's task from end to end: a scripted agent repairs a small repository inside a container, is killed half-way
(between steps, and while a command runs), is started again, fast-forwards, and finishes with the log of a run that was
never disturbed. The Edge is killed too. A counter in the sandbox says how often each step really ran.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsec.trajectory.log import LogReader
from dsec.trajectory.show import difference

STEPS = 8

AGENT = '''
"""A program that knows nothing of logs: it repairs calc.sh until its test passes."""
import json, os, signal, sys, threading
from dsec import Sandbox

name, die_after, die_during = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
box = Sandbox.create(substrate="container", trajectory=name, timeout=900)
number = 0

def run(command):
    """A command that counts itself; the agent may be killed while it runs, or after its answer."""
    global number
    number += 1
    if number == die_during:
        threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGKILL)).start()
    # the same text in every run: what is asked must not depend on when we die
    result = box.commands.run(f"echo {number} >> /tmp/count; [ {number} != 5 ] || sleep 1; {command}", check=False)
    print(json.dumps([number, result.exit_code, result.stdout, result.replayed]), flush=True)
    if number == die_after:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

box.files.write("/tmp/calc.sh", "echo $(($1 - $2))\\n")
box.files.write("/tmp/test.sh", '[ "$(sh /tmp/calc.sh 2 3)" = 5 ] && echo passed\\n')
run("mkdir /tmp/repo && mv /tmp/calc.sh /tmp/test.sh /tmp/repo")
run("cd /tmp/repo && sed -i 's|/tmp/calc|/tmp/repo/calc|' test.sh && ls")
while run("sh /tmp/repo/test.sh").exit_code != 0:
    source = box.files.read("/tmp/repo/calc.sh")
    assert "-" in source
    run("grep -n -- - /tmp/repo/calc.sh")
    run("sed -i 's/-/+/' /tmp/repo/calc.sh")
run("cat /tmp/repo/calc.sh")
run("date +%s%N")
print(json.dumps(box.files.read("/tmp/count")), flush=True)
'''


@pytest.fixture
def agent(make_host: Callable[[str], Any], tmp_path: Path) -> Callable[..., tuple[int, list[Any]]]:
    host = make_host("root")
    script = tmp_path / "agent.py"
    script.write_text(AGENT)

    def start(name: str, die_after: int = 0, die_during: int = 0) -> tuple[int, list[Any]]:
        """(exit code, what it printed)."""
        environment = {**os.environ, "DSEC_HOME": str(host.home), "PYTHONPATH": str(host.path)}
        command = [sys.executable, str(script), name, str(die_after), str(die_during)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]

    start.host = host  # type: ignore[attr-defined]
    return start


@pytest.mark.e2e
def test_an_agent_that_is_killed_finishes_with_the_same_log(agent: Any) -> None:
    code, undisturbed = agent("repair/whole")
    assert code == 0 and len(undisturbed) == STEPS + 1
    assert [line[3] for line in undisturbed[:-1]] == [False] * STEPS
    once = "".join(f"{i + 1}\n" for i in range(STEPS))
    assert undisturbed[-1] == once

    seen: dict[int, list[Any]] = {}
    for die_after, die_during in ((3, 0), (0, 5), (7, 0)):
        code, lines = agent("repair/killed", die_after, die_during)
        assert code == -signal.SIGKILL, lines
        for line in lines:
            answered = seen.setdefault(line[0], line)
            assert line[:3] == answered[:3], "an answer that was given is given again"
    code, lines = agent("repair/killed")
    assert code == 0 and lines[-1] == once, "every command ran exactly once"
    assert all(line[3] for line in lines[:7]) and not lines[7][3]
    assert lines[6][2] == seen[7][2]

    with contextlib.closing(LogReader(agent.host.home / "log")) as log:
        one, other = log.branch("repair/whole"), log.branch("repair/killed")
        assert len(one.entries) == len(other.entries) and all(entry.ended for entry in other.entries)
        parted = difference(log, one, other)
    assert parted is None or parted["field"] == "result.stdout", parted  # what `date` said


@pytest.mark.e2e
def test_the_edge_dies_as_well(agent: Any) -> None:
    """kill -9 of client and Edge: the sandbox lives on, its agent's journal and the log agree."""
    code, lines = agent("repair/edge", 4)
    assert code == -signal.SIGKILL and len(lines) == 4
    agent.host.kill()
    agent.host.start()
    code, lines = agent("repair/edge", 0, 5)
    assert code == -signal.SIGKILL
    agent.host.kill()
    agent.host.start()
    code, lines = agent("repair/edge")
    assert code == 0 and lines[-1] == "".join(f"{i + 1}\n" for i in range(STEPS))
