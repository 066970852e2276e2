"""SWE-ReX's requests against our runtime."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

pytest.importorskip("swerex", reason="SWE-ReX is missing: pip install swe-rex")

from swerex.exceptions import (
    BashIncorrectSyntaxError,
    CommandTimeoutError,
    NonZeroExitCodeError,
    SessionDoesNotExistError,
    SessionExistsError,
)
from swerex.runtime.abstract import (
    BashAction,
    BashInterruptAction,
    CloseBashSessionRequest,
    Command,
    CreateBashSessionRequest,
    ReadFileRequest,
    UploadRequest,
    WriteFileRequest,
)

from dsec.adapters.swerex import DsecRuntime
from dsec.errors import InvalidRequest


def play(work: Callable[[DsecRuntime], Awaitable[None]]) -> None:
    async def run() -> None:
        runtime = await DsecRuntime.create(timeout=300)
        try:
            await work(runtime)
        finally:
            await runtime.close()
        assert not await runtime.is_alive()

    asyncio.run(run())


def test_sessions_keep_their_state(home: Path) -> None:
    async def work(runtime: DsecRuntime) -> None:
        assert await runtime.is_alive()
        await runtime.write_file(WriteFileRequest(path="/root/.profile", content="export FROM=file"))
        await runtime.create_session(CreateBashSessionRequest(startup_source=["/root/.profile"]))
        with pytest.raises(SessionExistsError):
            await runtime.create_session(CreateBashSessionRequest())
        await runtime.run_in_session(BashAction(command='cd /tmp; X=1; f() { echo "got $1"; }'))
        seen = await runtime.run_in_session(BashAction(command="pwd; echo $X $FROM\nf 'a b'; echo err >&2"))
        assert seen.output == "/tmp\n1 file\ngot a b\nerr\n" and seen.exit_code == 0
        with pytest.raises(NonZeroExitCodeError, match="why"):
            await runtime.run_in_session(BashAction(command="false", error_msg="why"))
        assert (await runtime.run_in_session(BashAction(command="(exit 3)", check="silent"))).exit_code == 3
        assert (await runtime.run_in_session(BashAction(command="false", check="ignore"))).exit_code is None
        with pytest.raises(BashIncorrectSyntaxError):
            await runtime.run_in_session(BashAction(command="if ("))
        with pytest.raises(InvalidRequest, match="terminal"):
            await runtime.run_in_session(BashAction(command="python3", is_interactive_command=True))
        long = await runtime.run_in_session(BashAction(command="head -c 300000 /dev/zero | tr '\\0' x"))
        assert long.output == "x" * 300_000
        with pytest.raises(CommandTimeoutError):
            await runtime.run_in_session(BashAction(command="sleep 60", timeout=0.5))
        await runtime.run_in_session(BashInterruptAction())
        assert (await runtime.run_in_session(BashAction(command="echo $X"))).output == "1\n"
        await runtime.close_session(CloseBashSessionRequest())
        with pytest.raises(SessionDoesNotExistError):
            await runtime.run_in_session(BashAction(command="true"))

    play(work)


def test_commands_and_files(home: Path, tmp_path: Path) -> None:
    async def work(runtime: DsecRuntime) -> None:
        done = await runtime.execute(Command(command="echo $A; exit 4", shell=True, env={"A": "b"}, cwd="/tmp"))
        assert (done.stdout, done.exit_code) == ("b\n", 4)
        assert (await runtime.execute(Command(command=["printf", "%s", "$A b"]))).stdout == "$A b"
        both = Command(command="echo a; echo b >&2", shell=True, merge_output_streams=True)
        assert (await runtime.execute(both)).stdout == "a\nb\n"
        with pytest.raises(NonZeroExitCodeError):
            await runtime.execute(Command(command="false", shell=True, check=True))
        with pytest.raises(CommandTimeoutError):
            await runtime.execute(Command(command="sleep 30", shell=True, timeout=0.5))
        (tmp_path / "up" / "deep").mkdir(parents=True)
        (tmp_path / "up" / "deep" / "f").write_text("é")
        await runtime.upload(UploadRequest(source_path=str(tmp_path / "up"), target_path="/tmp/up"))
        assert (await runtime.read_file(ReadFileRequest(path="/tmp/up/deep/f"))).content == "é"
        with pytest.raises(FileNotFoundError):
            await runtime.read_file(ReadFileRequest(path="/nowhere"))

    play(work)
