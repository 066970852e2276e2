"""Function calls: what each variant gives, and, as asserting tests, what it does not stop."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsec.errors import InvalidRequest, NotFound, SandboxFailed, Timeout
from dsec.substrates.function import LEVELS, Functions, FunctionSubstrate
from dsec.types import Spec
from tests.dsec.conftest import IS_ROOT, Host, soon


def run(variant: str, body: Callable[[Functions], Any], **spec: Any) -> Any:
    async def main() -> Any:
        functions = Functions(variant, Spec(substrate="function", **spec))
        try:
            return await asyncio.wait_for(body(functions), 70)  # before the longest loop ends by itself
        finally:
            await functions.destroy()

    return asyncio.run(main())


HOG = "import time\ndef main():\n    end = time.monotonic() + 71.5\n    while time.monotonic() < end: pass"


def hogs() -> list[str]:
    """Workers of this test process's that burn a core."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            line = (folder / "cmdline").read_bytes()
            if b"function import work" in line and fields[0] == "R" and int(fields[1]) in (1, os.getpid()):
                found.append(folder.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.mark.parametrize("variant", LEVELS)
def test_values_errors_and_deaths(variant: str) -> None:
    async def body(box: Functions) -> None:
        code = "def main(a, *, b=1):\n    return {'sum': a + b, 'text': 'é'}"
        assert await box.call(code, [1], {"b": 2}, 10) == {"sum": 3, "text": "é"}
        with pytest.raises(SandboxFailed, match="ZeroDivisionError"):
            await box.call("def main(): return 1 / 0", [], {}, 10)
        with pytest.raises(SandboxFailed, match="ended"):
            await box.call("import os\ndef main(): os._exit(3)", [], {}, 10)
        with pytest.raises(NotFound, match="no function"):
            await box.call("nobody:nothing", [], {}, 10)
        with pytest.raises(SandboxFailed, match="not JSON"):
            await box.call("def main(): return object()", [], {}, 10)
        with pytest.raises(Timeout):
            await box.call(HOG, [], {}, 0.5)
        await soon(lambda: not hogs())  # a loop that was killed does not go on
        assert await box.call("def main(): return 5", [], {}, 10) == 5
        assert await asyncio.gather(*(box.call("def main(i): return i", [i], {}, 20) for i in range(20))) == list(
            range(20)
        )

    run(variant, body)


DIE = "import os, signal\ndef main(): os.kill(os.getpid(), signal.SIGKILL)"
SLEEP = "import time\ndef main(): time.sleep(60)"


def test_a_lost_worker_loses_its_own_call_alone() -> None:
    async def body(box: Functions) -> None:
        calls = [box.call("def main(i): return i" if i % 3 else DIE, [i] if i % 3 else [], {}, 20) for i in range(30)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [isinstance(answer, SandboxFailed) or answer for answer in answers] == [
            i if i % 3 else True for i in range(30)
        ]

    run("resident", body)


async def gone(box: Functions) -> bool:
    return (await box.stats()).pids == 0


LIE = """
import os, stat, struct, threading
def main():
    (fd,) = [n for n in range(3, 4096) if os.path.exists(f'/proc/self/fd/{n}') and stat.S_ISSOCK(os.fstat(n).st_mode)]
    say = lambda: os.write(fd, struct.pack('<I', 12) + b'["value", 7]')
    threading.Timer(0.1, say).start()
"""


def test_an_idle_worker_that_dies_or_speaks_is_nobodys() -> None:
    """It has no call to lose, and what it says answers none."""

    async def body(box: Functions) -> None:
        os.kill(await box.call("import os\ndef main(): return os.getpid()", [], {}, 20), signal.SIGKILL)
        await soon(lambda: gone(box))
        assert await box.call("def main(): return 5", [], {}, 20) == 5
        assert await box.call(LIE, [], {}, 20) is None
        await soon(lambda: gone(box))
        assert await box.call("def main(): return 5", [], {}, 20) == 5

    run("resident", body)


def test_a_worker_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(box: Functions) -> None:
        monkeypatch.setattr("sys.executable", "/nowhere")
        with pytest.raises(SandboxFailed, match="no worker can be started"):
            await box.call("def main(): return 5", [], {}, 20)
        monkeypatch.undo()
        assert await box.call("def main(): return 5", [], {}, 20) == 5

    run("resident", body)


def test_each_call_has_a_time_of_its_own() -> None:
    async def body(box: Functions) -> None:
        sleep = "import time\ndef main(seconds):\n    time.sleep(seconds)\n    return seconds"
        assert await box.call(sleep, [0], {}, 60) == 0
        assert await box.call(sleep, [0], {}, 1) == 0
        assert await box.call(sleep, [1.2], {}, 60) == 1.2, "the time of the call before"
        with pytest.raises(Timeout, match="past its 1 s"):
            await box.call(sleep, [60], {}, 1)

    run("resident", body)


def test_who_gives_up_takes_nobody_along() -> None:
    async def body(box: Functions) -> None:
        def begin(code: str, *args: Any) -> asyncio.Task[Any]:
            return asyncio.ensure_future(box.call(code, list(args), {}, None))

        first, second = begin(SLEEP), begin(SLEEP)
        waiting = [begin("def main(i): return i", i) for i in range(4)]
        await asyncio.sleep(0)
        waiting[1].cancel()  # has no worker yet
        first.cancel()  # has one: it is killed, and the rest get another
        assert await asyncio.gather(waiting[0], *waiting[2:]) == [0, 2, 3]
        assert not second.done()
        left = [second, *(begin(SLEEP) for _ in range(3))]
        await asyncio.sleep(0)
        await box.destroy()
        assert [str(each) for each in await asyncio.gather(*left, return_exceptions=True)] == ["it is dead"] * 4

    run("resident", body)


@pytest.mark.parametrize("variant", LEVELS)
def test_megabytes_both_ways(variant: str) -> None:
    """More than a socket takes at once."""

    async def body(box: Functions) -> None:
        texts = [letter * (4 << 20) for letter in "abcd"]
        answers = await asyncio.gather(*(box.call("def main(text): return text", [text], {}, 60) for text in texts))
        assert answers == texts
        with pytest.raises(SandboxFailed, match="reply"):
            await box.call("def main(): return 'x' * (17 << 20)", [], {}, 60)

    run(variant, body)


STATE = "import builtins\ndef main():\n    builtins.seen = getattr(builtins, 'seen', 0) + 1\n    return builtins.seen"


def test_only_resident_calls_see_each_other() -> None:
    async def twenty(box: Functions) -> int:
        return max([await box.call(STATE, [], {}, 10) for _ in range(20)])

    assert run("resident", twenty) > 1, "level 0: nothing separates two calls"
    assert run("forked", twenty) == 1
    assert run("namespaced", twenty) == 1


@pytest.mark.parametrize("variant", ["forked", "namespaced"])
def test_what_a_child_cannot_do(variant: str) -> None:
    async def body(box: Functions) -> None:
        if IS_ROOT:
            assert await box.call("import os\ndef main(): return os.getuid()", [], {}, 10) != 0
        core = "def main():\n    open('/proc/sys/kernel/core_pattern', 'r+').write('')"
        with pytest.raises(SandboxFailed, match=r"PermissionError|Read-only"):
            if not IS_ROOT or os.getuid() == 0:
                await box.call(core, [], {}, 10)
        with pytest.raises(SandboxFailed, match="MemoryError"):
            await box.call("def main(): return len(bytearray(1 << 30))", [], {}, 20)
        status = await box.call("def main(): return open('/proc/self/status').read()", [], {}, 10)
        assert "NoNewPrivs:\t1" in status and "CapEff:\t0000000000000000" in status
        orphans = "import os, time\ndef main():\n    if os.fork() == 0:\n        time.sleep(60)\n    return os.getpid()"
        await box.call(orphans, [], {}, 10)

    run(variant, body, memory=256)


def test_only_namespaced_calls_have_no_network_and_a_filter() -> None:
    look = "def main(): return [open('/proc/net/dev').read().count(':'), open('/proc/self/status').read()]"
    devices, status = run("namespaced", lambda box: box.call(look, [], {}, 10))
    assert devices <= 1 and "Seccomp:\t2" in status
    mount = (
        "import ctypes\ndef main(): return ctypes.CDLL(None, use_errno=True).mount(b'x', b'/mnt', b'tmpfs', 0, None)"
    )
    assert run("namespaced", lambda box: box.call(mount, [], {}, 10)) == -1


def test_what_no_variant_stops(tmp_path: Path) -> None:
    """Honesty: a function reads what everybody on the host may read. This is why its level is at most 1."""
    folder = Path("/var/tmp") if os.access("/var/tmp", os.W_OK) else tmp_path
    canary = folder / f"dsec-canary-{os.getpid()}"
    canary.write_text("public")
    canary.chmod(0o644)
    try:
        for variant in LEVELS:
            code = f"def main(): return open({str(canary)!r}).read()"
            assert run(variant, lambda box, code=code: box.call(code, [], {}, 10)) == "public"  # type: ignore[misc]
    finally:
        canary.unlink()


def square(x: int) -> int:
    return x * x


def test_through_the_sdk(root_host: Host) -> None:
    with root_host.create(substrate="function", image="resident") as box:
        assert box.get_info().isolation == 0
        assert box.call(square, 12) == 144
        assert box.call("def main(a, b): return a + b", 1, b=2) == 3
        with pytest.raises(InvalidRequest, match="commands"):
            box.commands.run("true")
    with root_host.create(substrate="function", isolation_min=1) as box:
        assert box.get_info().isolation == 1
    with pytest.raises(InvalidRequest, match="variant"):
        root_host.create(substrate="function", image="python")


@pytest.mark.parametrize("runtime", ["runc", "firecracker", "qemu"])
def test_a_runtime_is_an_error_and_not_ignored(tmp_path: Path, runtime: str) -> None:
    spec = Spec(substrate="function", runtime=runtime)
    with pytest.raises(InvalidRequest, match=f"a function has no runtime .* not '{runtime}'"):
        asyncio.run(FunctionSubstrate(tmp_path).create("f", spec, tmp_path))
