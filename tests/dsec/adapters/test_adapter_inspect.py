"""Inspect's own conformance checks of a sandbox provider, each run against ours."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="Inspect is missing: pip install inspect-ai")

from inspect_ai.util._sandbox import self_check

from dsec.adapters.inspect import DsecSandboxEnvironment, spec_of

CHECKS = sorted(name for name in vars(self_check) if name.startswith("test_"))
ROOT = "files are reached as the sandbox's root, whom permission bits do not stop (as with Docker's provider)"
KNOWN = {
    "test_read_file_not_allowed": ROOT,
    "test_write_text_file_without_permissions": ROOT,
    "test_write_binary_file_without_permissions": ROOT,
    "test_exec_as_user": "the image `host` has no adduser.conf; numbers and known names work",
    "test_exec_large_command": "an argv of more than 1 MiB does not fit a frame",
}


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as each:
        yield each


@pytest.fixture(scope="module")
def box(home: Path, runner: asyncio.Runner) -> Iterator[Any]:
    boxes = runner.run(DsecSandboxEnvironment.sample_init("self", None, {}))
    yield boxes["default"]
    runner.run(DsecSandboxEnvironment.sample_cleanup("self", None, boxes, False))


def test_there_are_checks() -> None:
    assert len(CHECKS) > 35


@pytest.mark.parametrize("name", CHECKS)
def test_inspects_self_check(name: str, box: Any, runner: asyncio.Runner, request: pytest.FixtureRequest) -> None:
    if name in KNOWN:
        request.node.add_marker(pytest.mark.xfail(reason=KNOWN[name], strict=True))
    check: Callable[..., Any] = getattr(self_check, name)
    runner.run(check(box))


def test_a_configuration_names_the_spec(tmp_path: Path) -> None:
    (tmp_path / "dsec.json").write_text('{"memory": 64}')
    assert spec_of(str(tmp_path / "dsec.json"))["memory"] == 64
    assert spec_of(None) == {"substrate": "container", "timeout": 21600.0}
    assert spec_of({"substrate": "vm"})["substrate"] == "vm"
