"""The `dsec` command and the records every room shares."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from dsec import errors
from dsec.cli import ROOMS, app
from dsec.errors import DsecError, InvalidRequest, from_wire, to_wire
from dsec.types import CommandResult, Spec
from tests.dsec.conftest import need_containers


def dsec(home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from dsec.cli import main; main()", *args]
    return subprocess.run(
        command, env={**os.environ, "DSEC_HOME": str(home)}, capture_output=True, text=True, timeout=300
    )


def test_a_command_line_from_start_to_end(tmp_path_factory: pytest.TempPathFactory, programs: Path) -> None:
    need_containers()
    tmp_path = tmp_path_factory.mktemp("cli")  # tmp_path itself is too long for a socket's name
    shutil.copytree(programs / "cache", tmp_path / "cache")
    try:
        done = dsec(tmp_path, "run", "--", "sh", "-c", "echo out; echo err >&2; exit 4")
        assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 4)
        assert json.loads(dsec(tmp_path, "ps", "--json").stdout) == []
        done = dsec(tmp_path, "run", "--image", "/no/such", "true")
        assert done.returncode == 1 and done.stderr == "dsec: error: no root folder at /no/such\n"
        found = json.loads(dsec(tmp_path, "doctor", "--json", "container", "function").stdout)
        assert found["container"]["usable"] and found["container"]["isolation"] == 2 and found["function"]["usable"]
    finally:
        assert dsec(tmp_path, "edge", "--stop").returncode == 0


def test_a_users_mistake_is_one_line() -> None:
    result = CliRunner().invoke(app, ["doctor", "nosuch"])
    assert (
        result.exit_code == 2
        and result.stderr.startswith("dsec: error: no substrate")
        and result.stderr.count("\n") == 1
    )


@pytest.mark.parametrize("name", ["doctor", "run", "ps", "edge"])
def test_every_command_shows_an_example(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0 and f"dsec {name}" in result.output.partition("Example")[2], result.output


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_are_reached(name: str, tmp_path: Path) -> None:
    done = dsec(tmp_path, name, "--help")
    assert done.returncode == 0 and f"dsec {name}" in done.stdout, done


def test_importing_the_package_costs_nothing() -> None:
    code = "import sys, dsec; print([m for m in ('asyncio', 'torch', 'httpx', 'fastapi', 'typer') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


ALL = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DsecError)]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: str(kind.__name__))
def test_errors_are_the_same_on_both_ends_of_a_wire(kind: Any) -> None:
    fields: dict[str, Any] = {"step": 3, "reason": "r", "fix": "f"}
    error = kind(CommandResult(exit_code=3), "text") if kind is errors.CommandFailed else kind("text", **fields)
    again = from_wire(json.loads(json.dumps(to_wire(error))))
    assert type(again) is kind and again.message == "text" and again.fields == error.fields
    if kind is errors.CommandFailed:
        assert again.result.exit_code == 3  # type: ignore[attr-defined]


@given(
    st.dictionaries(
        st.sampled_from("timeout cpu memory disk pids".split()), st.sampled_from([0, -1, "1", None, float("nan"), True])
    )
)
def test_a_spec_refuses_what_has_no_meaning(wrong: dict[str, Any]) -> None:
    if wrong:
        with pytest.raises(InvalidRequest):
            Spec(**wrong)
    else:
        assert Spec.from_dict(json.loads(json.dumps(Spec(network=("a",)).as_dict()))) == Spec(network=("a",))
