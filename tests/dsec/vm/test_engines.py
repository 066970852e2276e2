"""Firecracker and libkrun behind the microVM class, as far as that goes without a KVM that boots.

Neither is run here. In Firecracker's place stands a server that knows which requests its published API has, with which
fields, in which order; in libkrun's a library that writes down how it was called. Behind both is a guest of a few lines
that speaks the agent's frames, so that sandboxes are made, used and ended through all of our own code, confined as the
real ones are.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vm_bench import SPEC, Bench, shell

from dsec.errors import ImageError, InvalidRequest, SandboxFailed, SubstrateUnavailable, Timeout
from dsec.guest.protocol import VERSION
from dsec.substrates import engines, linux
from dsec.substrates.microvm import MicroVMSubstrate
from dsec.substrates.monitor import socket_in, taken
from dsec.substrates.vm import VMSubstrate
from tests.dsec.conftest import until

GUEST = """
import json, os, socket, struct, sys, threading
def fields(pairs): return b"".join(f"{k}\\0{v}\\0".encode() for k, v in pairs)
def frame(kind, id, data=b""): return struct.pack("<I", len(data) + 5) + kind + struct.pack("<I", id) + data
def guest(link):
    link.sendall(frame(b"H", 0, fields([("version", VERSION), ("pid", 1)])))
    data = b""
    while got := link.recv(65536):
        data += got
        while len(data) >= 4 and len(data) >= 4 + (size := struct.unpack_from("<I", data)[0]):
            kind, (id,), rest = data[4:5], struct.unpack_from("<I", data, 5), data[9 : 4 + size]
            data = data[4 + size :]
            if kind == b"X":
                words = rest.split(b"\\0")
                if b"echo" in words: link.sendall(frame(b"O", id, words[words.index(b"echo") + 2] + b"\\n"))
                done = [("code", 0), ("signal", 0), ("seconds", 0.1), ("out", 0), ("err", 0)]
                link.sendall(frame(b"D", id, fields(done)))
            elif kind == b"P": link.sendall(frame(b"p", id))
            elif kind == b"Q": link.sendall(frame(b"J", id))
def serve(path, greeting=None, shy=2):
    listener = socket.socket(socket.AF_UNIX); listener.bind(path); listener.listen(8)
    while True:
        link, _ = listener.accept()
        if greeting is not None and link.recv(64) != b"CONNECT 1024\\n": sys.exit("not a way to our port")
        if (shy := shy - 1) >= 0: link.close(); continue  # its guest does not listen yet
        if greeting: link.sendall(greeting)
        threading.Thread(target=guest, args=(link,), daemon=True).start()
""".replace("VERSION", str(VERSION))

SERVER = (
    "#!/usr/bin/python3\n"
    + GUEST
    + """
assert sys.argv[1:5] == ["--api-sock", "/box/api.sock", "--id", "dsec"], sys.argv
text, number, flag = str, int, bool
KNOWN = {  # path: (required, optional), as in firecracker.yaml
    "PUT /machine-config": ({"vcpu_count": number, "mem_size_mib": number}, {"smt": flag, "track_dirty_pages": flag}),
    "PUT /boot-source": ({"kernel_image_path": text}, {"initrd_path": text, "boot_args": text}),
    "PUT /drives/": ({"drive_id": text, "is_root_device": flag, "path_on_host": text, "is_read_only": flag},
                     {"cache_type": text, "io_engine": text}),
    "PUT /entropy": ({}, {}),
    "PUT /vsock": ({"guest_cid": number, "uds_path": text}, {}),
    "PUT /actions": ({"action_type": text}, {}),
    "PATCH /vm": ({"state": text}, {}),
    "PUT /snapshot/create": ({"mem_file_path": text, "snapshot_path": text}, {"snapshot_type": text}),
    "PUT /snapshot/load": ({"snapshot_path": text, "mem_backend": dict},
                           {"resume_vm": flag, "track_dirty_pages": flag}),
}
state, made = "Not started", set()
def fault(what, body):
    global state
    key = "PUT /drives/" if what.startswith("PUT /drives/") else what
    if key not in KNOWN: return f"no such request: {what}"
    required, optional = KNOWN[key]
    for name in required:
        if name not in body: return f"missing field {name}"
    for name, value in body.items():
        if name not in required and name not in optional: return f"unknown field {name}"
        if type(value) is not {**required, **optional}[name]: return f"{name} has another type"
    before = key in list(KNOWN)[:6] or key == "PUT /snapshot/load"
    if before and state != "Not started": return "only before the start"
    if not before and state == "Not started": return "only after the start"
    for name in ("kernel_image_path", "initrd_path", "path_on_host", "snapshot_path"):
        if name in body and before: open(body[name]).close()
    if key == "PUT /machine-config" and not 1 <= body["vcpu_count"] <= 32: return "vcpu_count"
    if key == "PUT /vsock" and body["guest_cid"] < 3: return "guest_cid"
    if key == "PUT /drives/" and what != f"PUT /drives/{body['drive_id']}": return "the id in the path is another"
    if key == "PUT /actions":
        if body["action_type"] != "InstanceStart": return "action_type"
        if "PUT /boot-source" not in made: return "no kernel"
        run("/box/v.sock")
    if key == "PATCH /vm":
        if body["state"] not in ("Paused", "Resumed"): return "state"
        state = {"Resumed": "Running"}.get(body["state"], "Paused")
    if key == "PUT /snapshot/create":
        if state != "Paused": return "the machine is not paused"
        open(body["snapshot_path"], "w").write("/box/v.sock")
        open(body["mem_file_path"], "w").write("memory")
    if key == "PUT /snapshot/load":
        if made: return "not a fresh process"
        backend = body["mem_backend"]
        if set(backend) != {"backend_type", "backend_path"} or backend["backend_type"] != "File": return "mem_backend"
        assert open(backend["backend_path"]).read() == "memory"
        run(open(body["snapshot_path"]).read(), 0)
    made.add(key)
def run(path, shy=2):
    global state
    state = "Running"
    if not os.path.exists("/silent"):
        threading.Thread(target=serve, args=(path, b"OK 1073741824\\n", shy), daemon=True).start()
api = socket.socket(socket.AF_UNIX); api.bind("/box/api.sock"); api.listen(8)
while True:
    link, _ = api.accept()
    file = link.makefile("rwb")
    if not (line := file.readline()): continue
    method, path, version = line.decode().split()
    size = 0
    while (header := file.readline().strip()):
        if header.lower().startswith(b"content-length:"): size = int(header.split(b":")[1])
    body = json.loads(file.read(size) or b"{}")
    what = f"{method} {path}"
    if what == "GET /version": status, answer = "200 OK", {"firecracker_version": "1.17.0"}
    else:
        open("/box/requests", "a").write(json.dumps([what, body]) + "\\n")
        try: problem = fault(what, body)
        except OSError as error: problem = repr(error)
        status, answer = ("400 Bad Request", {"fault_message": problem}) if problem else ("204 No Content", None)
    data = json.dumps(answer).encode() if answer else b""
    head = f"HTTP/1.1 {status}\\r\\nServer: Firecracker API\\r\\nContent-Length: {len(data)}\\r\\n\\r\\n"
    file.write(head.encode() + data); file.flush(); link.close()
"""
)

LIBRARY = r"""
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <unistd.h>
#define SAY(...) do { \
        FILE *f = fopen("/box/calls", "a"); \
        fprintf(f, __VA_ARGS__); \
        fputc('\n', f); \
        fclose(f); \
    } while (0)
typedef const char *str;
int32_t krun_create_ctx(void) { SAY("create"); return 7; }
int32_t krun_set_log_level(uint32_t level) { SAY("log %u", level); return 0; }
int32_t krun_set_vm_config(uint32_t c, uint8_t cpus, uint32_t mib) {
    SAY("%u vm %u %u", c, cpus, mib);
    return mib > 4000 ? -22 : 0;
}
int32_t krun_set_kernel(uint32_t c, str kernel, uint32_t format, str initrd, str words) {
    SAY("%u kernel %s %u %s | %s", c, kernel, format, initrd, words);
    return access(kernel, R_OK) || access(initrd, R_OK) ? -2 : 0;
}
int32_t krun_add_disk(uint32_t c, str id, str path, bool ro) {
    SAY("%u disk %s %s %d", c, id, path, ro);
    return access(path, R_OK) ? -2 : 0;
}
int32_t krun_set_port_map(uint32_t c, const str *map) {
    SAY("%u ports %s", c, map && !map[0] ? "none" : "some");
    return 0;
}
int32_t krun_add_vsock_port2(uint32_t c, uint32_t port, str path, bool listen) {
    SAY("%u vsock %u %s %d", c, port, path, listen);
    return 0;
}
int32_t krun_set_console_output(uint32_t c, str path) { SAY("%u console %s", c, path); return 0; }
#ifndef LEGACY
int32_t krun_disable_implicit_console(uint32_t c) { SAY("%u no console", c); return 0; }
int32_t krun_add_serial_console_default(uint32_t c, int in, int out) {
    SAY("%u serial %d", c, in);
    return write(out, "booting", 7) == 7 ? 0 : -9;
}
int32_t krun_disable_implicit_vsock(uint32_t c) { SAY("%u no vsock", c); return 0; }
int32_t krun_add_vsock(uint32_t c, uint32_t tsi) { SAY("%u vsock with %u", c, tsi); return 0; }
#endif
#ifndef OLD
int32_t krun_start_enter(uint32_t c) {
    SAY("%u enter", c);
    execl("/usr/bin/python3", "python3", "-c", GUEST, (char *)0);
    return -22;
}
#endif
"""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A substrate with a kernel and an initrd that nobody boots."""
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("no C compiler: apt-get install gcc libc6-dev")
    if not Path("/usr/bin/python3").exists():
        pytest.skip("what stands in for the monitors needs /usr/bin/python3: apt-get install python3")
    tmp_path.chmod(0o755)
    for name in ("kernel", "initrd", "kvm"):
        (tmp_path / name).write_text(name)
        (tmp_path / name).chmod(0o444)
    monkeypatch.setattr(engines, "KVM", str(tmp_path / "kvm"))
    monkeypatch.setattr(linux, "kernel", lambda home: None)
    monkeypatch.setattr(linux, "initrd", lambda home, found, vsock: tmp_path / "initrd")
    monkeypatch.setenv("DSEC_VMLINUX", str(tmp_path / "kernel"))
    (tmp_path / "machines").mkdir()
    made = Bench(MicroVMSubstrate(tmp_path / "home"), tmp_path / "machines")
    yield made
    made.close()


@pytest.fixture
def firecracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "bin/firecracker"
    program.parent.mkdir()
    program.write_text(SERVER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return program


FC = SPEC.but(runtime="firecracker")
KRUN = SPEC.but(runtime="libkrun")


def requests(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "box/requests").read_text().splitlines()]


def test_a_firecracker_machine_is_cloned_from_a_template(bench: Bench, firecracker: Path, tmp_path: Path) -> None:
    booted: list[Any] = []
    real = bench.substrate.bury

    def bury(group: Any, folder: Path) -> None:
        booted.extend(requests(folder) if folder.name.startswith(".boot-") else [])
        real(group, folder)

    bench.substrate.bury = bury  # type: ignore[method-assign]
    layer = tmp_path / "layer.erofs"
    layer.write_bytes(bytes(1024) + (0xE0F5E1E2).to_bytes(4, "little"))
    machine = bench.run(bench.create(FC.but(image=str(layer), cpu=2)))
    words = f"dsec.size={FC.disk} dsec.boot=agent dsec.layers=1 dsec.vsock=1024"
    assert booted == [
        ["PUT /machine-config", {"vcpu_count": 2, "mem_size_mib": 128, "smt": False}],
        ["PUT /boot-source", {"kernel_image_path": "/kernel", "initrd_path": "/initrd",
                              "boot_args": f"console=ttyS0 reboot=k panic=-1 quiet {words}"}],
        ["PUT /drives/disk0", {"drive_id": "disk0", "path_on_host": "/disk0", "is_root_device": False,
                               "is_read_only": True}],
        ["PUT /entropy", {}],
        ["PUT /vsock", {"guest_cid": 3, "uds_path": "/box/v.sock"}],
        ["PUT /actions", {"action_type": "InstanceStart"}],
        ["PATCH /vm", {"state": "Paused"}],
        ["PUT /snapshot/create", {"snapshot_type": "Full", "snapshot_path": "/box/device",
                                  "mem_file_path": "/box/ram"}],
    ]  # fmt: skip
    load = {"snapshot_path": "/device", "mem_backend": {"backend_type": "File", "backend_path": "/ram"},
            "resume_vm": True}  # fmt: skip
    assert requests(machine.machine.folder) == [["PUT /snapshot/load", load]]
    assert bench.run(shell(machine, ["echo", "hello"])) == (0, "hello\n")
    assert machine.capabilities.isolation == 4 and not machine.capabilities.fork_memory
    again = bench.run(bench.create(FC.but(image=str(layer), cpu=2)))
    assert requests(again.machine.folder) == [["PUT /snapshot/load", load]] and len(booted) == 8, "one boot for all"
    bench.run(again.freeze())
    bench.run(again.thaw())
    assert requests(again.machine.folder)[1:] == [["PATCH /vm", {"state": s}] for s in ("Paused", "Resumed")]
    with pytest.raises(InvalidRequest, match="Firecracker has no snapshots of running machines"):
        bench.run(again.snapshot(tmp_path / "snapshot"))
    with pytest.raises(InvalidRequest, match="starts from no snapshot"):
        bench.run(bench.create(FC, tmp_path / "snapshot"))
    assert not again.capabilities.snapshots
    for schedule in ({"snapshot_steps": 1}, {"snapshot_seconds": 1.0}):
        with pytest.raises(InvalidRequest, match="firecracker cannot be captured here, so not on a schedule"):
            bench.run(bench.create(FC.but(**schedule)))


def test_a_firecracker_machine_is_found_again_and_ended(bench: Bench, firecracker: Path) -> None:
    machine = bench.run(bench.create(FC))
    pid, folder, state = machine.machine.pid, machine.machine.folder, machine.state()
    if os.geteuid() == 0:
        assert Path(f"/proc/{pid}").stat().st_uid == machine.machine.group.base, "not as root"
    assert os.listdir(f"/proc/{pid}/root/box") and not Path(f"/proc/{pid}/root/home").exists()
    json.dumps(state)
    adopted = bench.run(bench.substrate.adopt("m", FC, folder, state))
    assert bench.run(shell(adopted, ["echo", "again"])) == (0, "again\n")
    bench.run(adopted.destroy())
    bench.run(machine.destroy())
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()


def test_what_firecracker_refuses_is_said_and_nothing_is_left(bench: Bench, firecracker: Path) -> None:
    firecracker.write_text(SERVER.replace('return "no kernel"', "pass").replace('"PUT /entropy": ({}, {}),', ""))
    with pytest.raises(SandboxFailed, match=r"Firecracker refused PUT /entropy \(400\): no such request"):
        bench.run(bench.create(FC))
    templates = bench.substrate.home / "vm/templates"
    assert not any(path.name[0] != "." for path in templates.iterdir())
    command = ["pgrep", "-f", "^/usr/bin/python3 /firecracker"]
    until(lambda: not subprocess.run(command, capture_output=True).stdout)


def test_a_guest_that_does_not_come_up_ends_in_time(
    bench: Bench, firecracker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A /dev/kvm that boots nothing: an error after the deadline, and no process."""
    firecracker.write_text(SERVER.replace('os.path.exists("/silent")', "True"))
    monkeypatch.setattr(engines, "BOOT_DEADLINE", 1.0)
    with pytest.raises(Timeout, match="Firecracker: no the guest's agent in time"):
        bench.run(bench.create(FC))
    firecracker.write_text("#!/bin/sh\necho no such hypervisor >&2; exit 1\n")
    with pytest.raises(SandboxFailed, match="no such hypervisor"):
        bench.run(bench.create(FC))


def test_templates_fit_the_release_that_made_them(bench: Bench, firecracker: Path) -> None:
    bench.run(bench.create(FC))
    (template,) = [path for path in (bench.substrate.home / "vm/templates").iterdir() if path.name[0] != "."]
    with firecracker.open("a") as file:
        file.write("# another release\n")
    with pytest.raises(ImageError, match="monitor changed"):
        bench.run(bench.substrate._opened(template))
    bench.run(bench.create(FC))
    assert len([path for path in template.parent.iterdir() if path.name[0] != "."]) == 2


def test_what_a_monitor_leaves_in_its_box_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of the host")
    (tmp_path / "ram").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "device")
    (tmp_path / "v.sock").symlink_to("/run/any.sock")
    with pytest.raises(OSError, match=r"Too many levels|symbolic"):
        taken(tmp_path, "ram", tmp_path / "copy")
    with pytest.raises(SandboxFailed, match="is no file"):
        taken(tmp_path, "device", tmp_path / "copy2")
    for name in ("v.sock", "secret"):
        with pytest.raises(SandboxFailed, match="is no socket"), socket_in(tmp_path, name):
            pass


def test_what_is_missing_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("DSEC_LIBKRUN", raising=False)
    monkeypatch.setattr("dsec.substrates.libkrun.find_library", lambda name: None)
    for spec, name in ((FC, "firecracker"), (KRUN, "libkrun")):
        with pytest.raises(SubstrateUnavailable) as caught:
            bench.run(bench.create(spec))
        assert caught.value.reason == f"{name} is not installed" and "KVM" in caught.value.fix
        probe = bench.run(bench.substrate.probe(name))
        assert (probe.usable, probe.reason) == (False, f"{name} is not installed")
    monkeypatch.setenv("DSEC_LIBKRUN", "libkrun.so.1")
    monkeypatch.setattr(engines, "KVM", str(tmp_path / "none"))
    with pytest.raises(SubstrateUnavailable, match="libkrun needs KVM"):
        bench.run(bench.create(KRUN))
    with pytest.raises(InvalidRequest, match=r'the runtime "" .QEMU. or firecracker, libkrun, not'):
        bench.run(bench.create(SPEC.but(runtime="xen")))
    with pytest.raises(InvalidRequest, match="or nothing else, not 'firecracker'"):
        asyncio.run(VMSubstrate(tmp_path).create("m", FC.but(substrate="vm"), tmp_path))


def library(tmp_path: Path, *flags: str) -> str:
    script = GUEST + 'serve("/box/v.sock")'
    (tmp_path / "krun.c").write_text(f"#define GUEST {json.dumps(script)}\n{LIBRARY}")
    compiler = shutil.which("cc") or "gcc"
    target = tmp_path / f"libkrun{len(flags)}.so"
    subprocess.run([compiler, "-shared", "-fPIC", *flags, "-o", target, tmp_path / "krun.c"], check=True)
    return str(target)


def test_a_libkrun_machine_is_what_was_asked_for(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSEC_LIBKRUN", library(tmp_path))
    (tmp_path / "layer.erofs").write_bytes(bytes(1024) + (0xE0F5E1E2).to_bytes(4, "little"))
    machine = bench.run(bench.create(KRUN.but(cpu=2, image=str(tmp_path / "layer.erofs"))))
    words = f"dsec.size={KRUN.disk} dsec.boot=agent dsec.layers=1 dsec.vsock=1024"
    assert (machine.machine.folder / "box/calls").read_text().splitlines() == [
        "create", "log 1", "7 vm 2 128", f"7 kernel /kernel 1 /initrd | console=ttyS0 reboot=k panic=-1 quiet {words}",
        "7 disk disk0 /disk0 1", "7 no vsock", "7 vsock with 0", "7 vsock 1024 /box/v.sock 1",
        "7 no console", "7 serial -1", "7 enter",
    ]  # fmt: skip
    assert bench.run(machine.machine.console()) == "booting"
    assert bench.run(shell(machine, ["echo", "hello"])) == (0, "hello\n")
    bench.run(machine.freeze())
    # the signal is sent; the processor that it runs on sees it a moment later
    until(lambda: Path(f"/proc/{machine.machine.pid}/stat").read_text().split(") ")[1][0] in "Tt")
    bench.run(machine.thaw())
    with pytest.raises(InvalidRequest, match="libkrun has no snapshots"):
        bench.run(machine.snapshot(tmp_path / "snapshot"))


def test_an_older_libkrun_makes_its_own_devices(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSEC_LIBKRUN", library(tmp_path, "-DLEGACY"))
    machine = bench.run(bench.create(KRUN))
    words = f"dsec.size={KRUN.disk} dsec.boot=agent dsec.layers=0 dsec.vsock=1024"
    assert (machine.machine.folder / "box/calls").read_text().splitlines() == [
        "create", "log 1", "7 vm 1 128", f"7 kernel /kernel 1 /initrd | console=hvc0 reboot=k panic=-1 quiet {words}",
        "7 ports none", "7 vsock 1024 /box/v.sock 1", "7 console /box/console", "7 enter",
    ]  # fmt: skip


def test_a_kernel_that_would_find_no_device_is_refused(
    bench: Bench, firecracker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian's finds virtio-mmio devices through ACPI alone."""
    monkeypatch.delenv("DSEC_VMLINUX")
    monkeypatch.setattr(linux, "elf", lambda home, found: tmp_path / "kernel")
    monkeypatch.setenv("DSEC_LIBKRUN", library(tmp_path))
    with pytest.raises(SubstrateUnavailable, match="which Debian's kernel does not read") as caught:
        bench.run(bench.create(KRUN))
    assert "CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES" in caught.value.fix
    firecracker.write_text(SERVER.replace("1.17.0", "1.7.0-dev"))
    with pytest.raises(SubstrateUnavailable, match=r"Firecracker 1\.7\.0-dev names no devices in ACPI"):
        bench.run(bench.create(FC))
    firecracker.write_text(SERVER.replace("1.17.0", "1.8.0"))
    assert bench.run(shell(bench.run(bench.create(FC)), ["echo", "hello"])) == (0, "hello\n")


def test_what_libkrun_refuses_is_said(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSEC_LIBKRUN", library(tmp_path))
    with pytest.raises(SandboxFailed, match="libkrun: krun_set_vm_config: Invalid argument"):
        bench.run(bench.create(KRUN.but(memory=5000)))
    monkeypatch.setenv("DSEC_LIBKRUN", library(tmp_path, "-DOLD"))
    with pytest.raises(SandboxFailed, match="too old: it has no krun_start_enter"):
        bench.run(bench.create(KRUN))


def test_a_kernel_is_taken_out_of_its_file(tmp_path: Path) -> None:
    """LZ4's legacy blocks as Debian packs them: literals, a match that overlaps itself, a long length; then damage."""
    body = b"\x7fELF" + b"abcd" * 100
    sequence = b"\x8f" + b"\x7fELFabcd" + b"\x04\x00" + b"\xff" + bytes([len(body) - 8 - 19 - 255 - 1]) + b"\x10d"
    packed = b"\x02\x21\x4c\x18" + len(sequence).to_bytes(4, "little") + sequence
    for payload, right in ((packed, True), (packed[:-3], False), (packed.replace(b"\x04\x00", b"\x50\x00"), False)):
        home = tmp_path / str(len(payload)) / str(right)
        image = bytearray(4096)
        image[0x1F1], image[0x202:0x206] = 1, b"HdrS"
        image[0x248:0x250] = (16).to_bytes(4, "little") + len(payload).to_bytes(4, "little")
        image[1040 : 1040 + len(payload)] = payload
        home.mkdir(parents=True)
        (home / "vmlinuz").write_bytes(image)
        found = linux.Kernel(home / "vmlinuz", home, "6.1")
        if right:
            assert linux.elf(home, found).read_bytes() == body
        else:
            with pytest.raises((SubstrateUnavailable, subprocess.CalledProcessError)):
                linux.elf(home, found)
