"""A microVM is a real machine with its own kernel; clones share memory, not state; nothing is left when it is gone."""

import asyncio
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from vm_bench import SPEC, Bench, shell

from dsec.errors import ImageError, InvalidRequest, NotFound
from dsec.guest import build
from dsec.guest.protocol import VERSION
from dsec.launch import cgroups
from dsec.substrates.checkpoint import NAME, Checkpoint, Root
from dsec.substrates.microvm import MicroVMSubstrate, VirtualMachine
from tests.dsec.conftest import lives, soon


def _pss(pid: int) -> float:
    """MiB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Pss:\s+(\d+)", text, re.M)[1]) / 1024


def test_it_has_a_kernel_of_its_own(bench: Bench, machine: VirtualMachine) -> None:
    code, out = bench.run(shell(machine, "uname -r; id -u; ls /proc | grep -c '^[0-9]'; echo oops >&2; exit 3"))
    release, uid, processes, error = out.split()
    assert (code, uid, error) == (3, "0", "oops")
    assert "cloud" in release and release != os.uname().release
    assert int(processes) < 100


def test_files_commands_and_terminals_go_through_the_agent(bench: Bench, machine: VirtualMachine) -> None:
    async def work() -> None:
        data = os.urandom(3_000_000)
        await machine.agent.write("/root/deep/er/file", data)
        assert await machine.agent.read("/root/deep/er/file") == data
        assert (await machine.agent.stat("/root/deep/er/file")).size == len(data)
        with pytest.raises(NotFound):
            await machine.agent.read("/root/nothing")
        await machine.agent.remove("/root/deep")
        code, out = await shell(machine, "tty; stty size", tty=(33, 99))
        assert (code, out.split()) == (0, ["/dev/pts/0", "33", "99"])
        out_: list[bytes] = []
        process = machine.agent.exec(["cat"], lambda kind, data: out_.append(data), stdin=True)
        process.send(b"one\0two\n")
        process.close_stdin()
        assert (await process.done).code == 0 and b"".join(out_) == b"one\0two\n"
        assert (await shell(machine, "id -u", uid=1000, gid=1000)) == (0, "1000\n")

    bench.run(work())


def test_clones_are_apart_in_files_and_randomness_and_right_in_time(bench: Bench, machine: VirtualMachine) -> None:
    """Without the wake-up call two clones of one memory print the same bytes and a time of long ago."""

    async def work() -> None:
        other = await bench.create()
        await shell(machine, "echo mine > /tmp/only-here")
        assert (await shell(other, "cat /tmp/only-here"))[0] != 0
        began = time.time()
        draw = "head -c 16 /dev/urandom | od -An -tx1; date +%s"
        texts = [(await shell(each, draw))[1].split() for each in (machine, other)]
        assert texts[0][:16] != texts[1][:16]
        now = [int(text[16]) for text in texts]
        assert began - 3 < min(now) and max(now) < time.time() + 3, "the host's time, not the template's"
        await other.destroy()

    bench.run(work())


def test_clones_share_their_template(bench: Bench, machine: VirtualMachine) -> None:
    """Copy-on-write: three machines of 128 MiB take less than 60 MiB each (the benchmark asks 40, of more of them)."""

    async def work() -> None:
        others = [await bench.create() for _ in range(2)]
        sizes = [_pss(each.machine.pid) for each in (machine, *others)]
        assert sum(sizes) / 3 < 60, sizes
        for each in others:
            await each.destroy()

    bench.run(work())


def test_a_running_machine_forks_with_its_processes(bench: Bench, tmp_path: Path) -> None:
    async def work() -> None:
        first = await bench.create()
        await shell(
            first,
            "head -c 100000 /dev/urandom > /tmp/big; head -c 50000 /dev/zero > /tmp/none",
        )
        _, digest = await shell(first, "md5sum /tmp/big /tmp/none")
        counter = "n=0; while :; do n=$((n+1)); echo $n >> /tmp/n; sleep 0.2; done"
        first.agent.exec(counter, lambda kind, data: None)
        await shell(first, "until [ -s /tmp/n ]; do sleep 0.05; done")
        await first.snapshot(tmp_path / "snap")
        with pytest.raises(FileExistsError):
            await first.snapshot(tmp_path / "snap")  # never over another one
        forks = [await bench.create(snapshot=tmp_path / "snap") for _ in range(2)]
        await shell(forks[0], "echo changed > /tmp/big")
        for each in (first, forks[1]):
            assert (await shell(each, "md5sum /tmp/big /tmp/none"))[1] == digest
        for each in (first, *forks):
            wait = "old=$(tail -n 1 /tmp/n); until [ $(tail -n 1 /tmp/n) -gt $old ]; do sleep 0.05; done"
            assert (await shell(each, wait))[0] == 0, "the counting process lives on"
        again = await _fork_of(bench, forks[0], tmp_path / "again")
        assert (await shell(again, "cat /tmp/big"))[1] == "changed\n"
        for each in (first, *forks, again):
            await each.destroy()

    bench.run(work())


async def _fork_of(bench: Bench, machine: VirtualMachine, folder: Path) -> VirtualMachine:
    await machine.snapshot(folder)
    return await bench.create(snapshot=folder)


def test_every_snapshot_of_a_machine_is_one(bench: Bench, tmp_path: Path) -> None:
    """QEMU keeps the file that it writes its devices to open, and its place in it."""

    async def work() -> None:
        machine = await bench.create()
        for n in range(2):
            await machine.snapshot(tmp_path / f"{n}")
            assert (tmp_path / f"{n}/device").read_bytes()[:4] == b"QEVM"
        assert (await shell(await bench.create(SPEC, tmp_path / "1"), ["echo", "second"])) == (0, "second\n")

    bench.run(work())


def test_snapshots_do_not_make_untouched_memory_real(bench: Bench, machine: VirtualMachine, tmp_path: Path) -> None:
    """Reading a hole of shared memory allocates it: a snapshot that read all of it would cost the whole machine."""
    assert machine.point.ram is not None
    before = os.fstat(machine.point.ram.fd).st_blocks * 512
    assert before < 126 << 20, "no holes, so this test would see nothing"
    bench.run(machine.snapshot(tmp_path / "snap"))
    assert os.fstat(machine.point.ram.fd).st_blocks * 512 == before
    assert (tmp_path / "snap/ram").stat().st_size == 128 << 20


def test_frozen_means_frozen_and_time_goes_on_after(bench: Bench) -> None:
    async def work() -> None:
        machine = await bench.create()
        machine.agent.exec("while :; do date +%s%N > /tmp/tick; done", lambda kind, data: None)
        await shell(machine, "until [ -s /tmp/tick ]; do sleep 0.05; done")

        def used() -> int:
            return int(Path(f"/proc/{machine.machine.pid}/stat").read_text().split()[13])

        start = used()
        await soon(lambda: used() > start + 10)
        await machine.freeze()
        start = used()
        await asyncio.sleep(1.2)
        assert used() - start <= 20, "of 120 ticks, which it wants to use"
        await machine.thaw()
        began = time.time()
        assert began - 2 < int((await shell(machine, "date +%s"))[1]) < time.time() + 2
        await machine.destroy()

    bench.run(work())


def test_a_new_edge_takes_over(bench: Bench, home: Path) -> None:
    """Commands go on while no Edge is connected, and their exit is waiting."""

    async def work() -> None:
        machine = await bench.create()
        process = machine.agent.exec("sleep 0.5; echo done > /tmp/flag; exit 7", lambda kind, data: None, step=12)
        await machine.agent.ping()
        state = machine.state()
        machine.agent.close()
        machine.machine._qmp and machine.machine._qmp.close()
        await asyncio.sleep(1.0)  # it ends meanwhile, as far as it can on a busy machine
        substrate = MicroVMSubstrate(home)
        again = await substrate.adopt("x", SPEC, machine.machine.folder, state)
        bench.made.append(again)
        entry = None

        async def ended() -> bool:
            nonlocal entry
            (entry,) = [each for each in await again.agent.journal() if each.step == 12]
            return entry.exit is not None

        await soon(ended)
        assert entry is not None
        assert entry.id == process.id and entry.exit is not None and entry.exit.code == 7
        assert (await shell(again, "cat /tmp/flag"))[1] == "done\n"
        await again.freeze()
        await again.thaw()
        await again.destroy()
        assert await machine.died()
        with pytest.raises(NotFound):
            await substrate.adopt("x", SPEC, machine.machine.folder, state)

    bench.run(work())


def test_nothing_is_left_of_a_destroyed_machine(bench: Bench) -> None:
    async def work() -> None:
        machine = await bench.create()
        group, pid, folder = machine.machine.group, machine.machine.pid, machine.machine.folder
        machine.agent.exec("trap '' TERM; while :; do :; done", lambda kind, data: None)
        await machine.destroy()
        await machine.destroy()
        assert await machine.died()
        await asyncio.wait(bench.substrate._burials or [asyncio.ensure_future(asyncio.sleep(0))], timeout=60)
        assert not Path(f"/proc/{pid}").exists() and not folder.exists()
        assert group is None or not any(path.exists() for path in group.folders)

    bench.run(work())


def test_a_machine_whose_edge_died_while_it_was_made_is_found_by_its_folder(bench: Bench) -> None:
    async def work() -> None:
        machine = await bench.create()
        group, pid, folder = machine.machine.group, machine.machine.pid, machine.machine.folder
        if group is None:
            pytest.skip("no writable cgroups on this host")
        await asyncio.to_thread(cgroups.abandon, folder)  # what the next Edge does with a folder that has no state
        assert await machine.died() and not lives(pid) and not folder.exists()
        assert not any(path.exists() for path in group.folders)
        await machine.destroy()

    bench.run(work())


def test_a_machine_that_switches_itself_off_is_dead_with_a_reason(bench: Bench) -> None:
    async def work() -> None:
        machine = await bench.create()
        machine.agent.exec("reboot -f", lambda kind, data: None)
        assert "off" in await machine.died()
        assert await asyncio.shield(machine.agent.failed)
        with pytest.raises(Exception, match="dead"):
            await machine.snapshot(Path("/nowhere"))
        await machine.destroy()

    bench.run(work())


def test_what_cannot_be_is_refused_before_anything_starts(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="disk 256 MiB > memory 128"):
        bench.run(bench.create(SPEC.but(disk=256)))
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(ImageError, match="neither"):
        bench.run(bench.create(SPEC.but(image=str(tmp_path / "junk"))))
    with pytest.raises(NotFound):
        bench.run(bench.create(snapshot=tmp_path / "none"))


def test_killing_qemu_is_seen(bench: Bench) -> None:
    async def work() -> None:
        machine = await bench.create()
        process = machine.agent.exec("sleep 100", lambda kind, data: None)
        os.kill(machine.machine.pid, signal.SIGKILL)
        assert await machine.died()
        with pytest.raises(Exception, match="connection"):
            await process.done
        await machine.destroy()

    bench.run(work())


def test_a_runtime_it_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r'a microvm has the runtime "" .QEMU. or firecracker, libkrun, not'):
        asyncio.run(MicroVMSubstrate(tmp_path).create("m", SPEC.but(runtime="cloud-hypervisor"), tmp_path))


def test_a_snapshot_with_an_older_agent_is_refused(home: Path, tmp_path: Path) -> None:
    """The agent of a snapshot runs in its memory: a host that speaks otherwise says so before it starts a machine."""
    meta = {**Checkpoint(tmp_path, 128, 1, "tcg", Root()).describe()}
    (tmp_path / NAME).write_text(json.dumps(meta))
    assert Checkpoint.read(tmp_path).memory == 128
    for agent in (None, VERSION - 1, VERSION + 1):  # none was noted before version 2
        older = {key: value for key, value in {**meta, "agent": agent}.items() if value is not None}
        (tmp_path / NAME).write_text(json.dumps(older))
        with pytest.raises(ImageError, match=f"speaks version {agent or 1}, this host version {VERSION}"):
            asyncio.run(MicroVMSubstrate(home).create("m", SPEC, tmp_path / "box", tmp_path))


def test_the_agents_version_is_the_hosts() -> None:
    source = (Path(build.__file__).parent / "agent.c").read_text()
    assert f"enum {{ VERSION = {VERSION}," in source
