"""Inspect's own conformance checks of a sandbox provider, each run against ours."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="Inspect is missing: pip install inspect-ai")

from inspect_ai.util._sandbox import self_check

from dsec.adapters.inspect import DsecSandboxEnvironment, spec_of

CHECKS = sorted(name for name in vars(self_check) if name.startswith("test_"))
OF_A_USER = {
    "test_read_file_not_allowed",
    "test_write_text_file_without_permissions",
    "test_write_binary_file_without_permissions",
}
"""Permission bits stop no root, here as elsewhere, so these are asked of a sandbox whose user is somebody else."""
KNOWN = {
    "test_exec_as_user": "adduser gives the new user a home with chown; commands have no capability, root's neither, by"
    " design. Users that the image has, and numbers, work: test_users_of_the_image"
}


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as each:
        yield each


@pytest.fixture(scope="module")
def box(home: Path, runner: asyncio.Runner) -> Iterator[Any]:
    yield from made(runner, None)


@pytest.fixture(scope="module")
def of_a_user(home: Path, runner: asyncio.Runner) -> Iterator[Any]:
    if os.geteuid():
        pytest.skip("an Edge that is not root has one user: sudo script/test tests/dsec/adapters")
    yield from made(runner, {"user": "nobody"})


def made(runner: asyncio.Runner, config: Any) -> Iterator[Any]:
    boxes = runner.run(DsecSandboxEnvironment.sample_init("self", config, {}))
    yield boxes["default"]
    runner.run(DsecSandboxEnvironment.sample_cleanup("self", config, boxes, False))


def test_there_are_checks() -> None:
    assert len(CHECKS) > 35


@pytest.mark.parametrize("name", CHECKS)
def test_inspects_self_check(name: str, runner: asyncio.Runner, request: pytest.FixtureRequest) -> None:
    box = request.getfixturevalue("of_a_user" if name in OF_A_USER else "box")
    if name in KNOWN:
        request.node.add_marker(pytest.mark.xfail(reason=KNOWN[name], strict=True))
    check: Callable[..., Any] = getattr(self_check, name)
    runner.run(check(box))


def test_users_of_the_image(box: Any, runner: asyncio.Runner) -> None:
    for user, uid in (("nobody", "65534"), ("1234", "1234"), ("root", "0")):
        assert runner.run(box.exec(["id", "-u"], user=user, cwd="/tmp")).stdout == f"{uid}\n"


def test_a_configuration_names_the_spec(tmp_path: Path) -> None:
    (tmp_path / "dsec.json").write_text('{"memory": 64}')
    assert spec_of(str(tmp_path / "dsec.json"))["memory"] == 64
    assert spec_of(None) == {"substrate": "container", "timeout": 21600.0}
    assert spec_of({"substrate": "vm"})["substrate"] == "vm"
