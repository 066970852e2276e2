"""What a virtual machine of ours boots: Debian's cloud kernel, and an initrd of busybox, the agent and a page of init.

The kernel comes out of its Debian package without installing it (`apt-get download`, `dpkg -x`), or from /boot if it is
installed. The initrd is written here in the kernel's own "newc" cpio format, so nothing of it needs root.
"""

import fcntl
import gzip
import hashlib
import lzma
import os
import re
import shutil
import stat
import subprocess
import tempfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dsec.errors import SubstrateUnavailable
from dsec.guest import build

# Drivers of the devices we attach and the file systems of a root; what they depend on is read from the modules.
MODULES = ["virtio_pci", "virtio_console", "virtio_blk", "virtio-rng", "erofs", "overlay"]
VSOCK_MODULES = ["virtio_mmio", "virtio_blk", "virtio-rng", "vmw_vsock_virtio_transport", "erofs", "overlay"]
"""For monitors without PCI: devices that ACPI names (Firecracker from 1.8 on) or the command line (libkrun; Debian's
kernel does not read that: CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES), and the agent's way to the host."""
PACKAGE = "linux-image-cloud-amd64"
_EXTRACT = (
    "set -e; name=$(apt-cache depends {package} | sed -n 's/.*Depends: \\(linux-image-[0-9]\\)/\\1/p' | head -n1); "
    "apt-get download -q $name; dpkg -x *.deb x"
)

# PID 1 of every machine of ours. It waits for the agent in the foreground, and so reaps whatever is orphaned; when the
# agent is gone the machine is, because QEMU runs with -no-reboot. Words "dsec.name=value" of the kernel's command line
# become variables: layers (how many disks, the lowest first), size (MiB that may be written), boot, vsock (the
# port on which the agent listens, where there is no virtio-serial).
INIT = r"""#!/bin/busybox sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=linux
/bin/busybox mkdir -p /proc /sys /dev /run /tmp /root /etc /lower /upper /new /usr/bin /usr/sbin /sbin
/bin/busybox --install -s
fail() { echo "dsec: $*${missing:+ (not loaded:$missing)}"; reboot -f; }
mount -t devtmpfs -o nosuid dev /dev && mount -t proc -o nosuid,nodev,noexec proc /proc || fail no /proc
mount -t sysfs -o nosuid,nodev,noexec sys /sys
for m in $(cat /modules/order); do # another kernel may have them built in; what is missing shows below
  o=; for w in $(cat /proc/cmdline); do case $w in $m.*=*) o="$o ${w#*.}";; esac; done
  insmod /modules/$m $o 2>/dev/null || missing="$missing $m"
done
for w in $(cat /proc/cmdline); do case $w in dsec.*=*) eval "${w#dsec.}";; esac; done
n=0
[ -n "$vsock" ] && port=vsock:$vsock
while [ -z "$port" ]; do # ports appear, and get their names, some time after their driver
  for p in /sys/class/virtio-ports/*; do [ "$(cat $p/name 2>/dev/null)" = dsec.agent ] && port=/dev/${p##*/}; done
  n=$((n+1)); [ $n -gt 200 ] && fail no agent port; [ -n "$port" ] || sleep 0.05
done
mount -t tmpfs -o nosuid,nodev,mode=755,size=16m run /run
mkdir -p /run/dsec && cp /bin/busybox /bin/agent /bin/wake /run/dsec/
echo 'root:x:0:0:root:/root:/bin/sh
user:x:1000:1000:user:/home/user:/bin/sh
nobody:x:65534:65534:nobody:/:/bin/false' > /etc/passwd
echo 'root:x:0:
user:x:1000:
nogroup:x:65534:' > /etc/group
cat > /run/dsec/init <<'END'
#!/run/dsec/busybox sh
b=/run/dsec/busybox
$b mkdir -p /dev/pts /dev/shm /tmp /root /home/user; $b chown 1000:1000 /home/user
$b mount -t devpts -o nosuid,noexec,ptmxmode=666 pts /dev/pts; $b mount -t tmpfs -o nosuid,nodev,mode=1777 shm /dev/shm
for l in fd:fd stdin:fd/0 stdout:fd/1 stderr:fd/2; do $b ln -sfn /proc/self/${l#*:} /dev/${l%:*}; done
$b ln -sfn pts/ptmx /dev/ptmx
$b hostname dsec; $b ifconfig lo up; $b chmod 1777 /tmp
/run/dsec/agent --device $1
$b reboot -f
END
chmod 700 /run/dsec; chmod 755 /run/dsec/init
if [ "$layers" = 0 ]; then
  mount -t tmpfs -o nosuid,nodev,mode=755,size=${size}m tmpfs /new || fail no memory disk
  rm -rf /modules /lower /upper; cp -a /bin /sbin /usr /etc /root /tmp /new/; rm -f /new/bin/agent /new/bin/wake
else
  lower=
  for d in $(ls /dev/vd? | head -n $layers); do
    mkdir /lower/${d#/dev/} && mount -t erofs -o ro $d /lower/${d#/dev/} || fail no root on $d
    lower=/lower/${d#/dev/}${lower:+:$lower}
  done
  mount -t tmpfs -o size=${size}m,mode=755 upper /upper && mkdir /upper/u /upper/w &&
  mount -t overlay -o lowerdir=$lower,upperdir=/upper/u,workdir=/upper/w root /new || fail no overlay
fi
for d in dev proc sys run; do mkdir -p /new/$d; mount -o move /$d /new/$d; done
if [ "$boot" = systemd ]; then
  u=/new/run/systemd/system; mkdir -p $u/sysinit.target.wants $u/multi-user.target.wants
  ln -s ../dsec-agent.service $u/sysinit.target.wants/
  # started by whoever asks for them first, not at boot: under emulation they take a fifth of it
  ln -s /dev/null $u/multi-user.target.wants/systemd-logind.service
  ln -s /dev/null $u/multi-user.target.wants/dbus.service
  echo "[Unit]
Description=DSec guest agent
DefaultDependencies=no
[Service]
Environment=HOME=/root
ExecStart=/run/dsec/agent --device $port
KillMode=process
OOMScoreAdjust=-1000
FailureAction=poweroff-immediate
SuccessAction=poweroff-immediate" > $u/dsec-agent.service
  exec switch_root /new /sbin/init
fi
exec switch_root /new /run/dsec/init $port
"""


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel: the bootable file, its modules' folder, its release ("6.1.0-56-cloud-amd64")."""

    image: Path
    modules: Path
    release: str


def kernel(home: Path) -> Kernel:
    """The newest cloud kernel of /boot, of the cache, or freshly extracted into it. SubstrateUnavailable if none."""
    roots = [Path("/"), *sorted((home / "vm/kernel").glob("*"), reverse=True)]
    for root in roots:
        for image in sorted((root / "boot").glob("vmlinuz-*cloud-amd64"), reverse=True):
            release = image.name.removeprefix("vmlinuz-")
            if os.access(image, os.R_OK) and (root / "lib/modules" / release / "kernel").is_dir():
                return Kernel(image, root / "lib/modules" / release / "kernel", release)
    missing = SubstrateUnavailable(
        "no kernel for virtual machines",
        reason=f"{PACKAGE} is not installed and cannot be downloaded",
        fix=f"apt-get update, or apt-get install {PACKAGE}",
    )
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise missing
    cache = home / "vm/kernel"
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home / "vm") as scratch:
        command = ["sh", "-c", _EXTRACT.format(package=PACKAGE)]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=300)
        if done.returncode or not (images := list(Path(scratch).glob("x/boot/vmlinuz-*"))):
            raise missing
        target = cache / images[0].name.removeprefix("vmlinuz-")
        if not target.exists():
            os.rename(Path(scratch, "x"), target)
    return kernel(home)


def _module(found: Kernel, name: str) -> tuple[bytes, list[str]]:
    """A module's bytes, uncompressed, and the names it depends on."""
    for path in found.modules.rglob(f"{name}.ko*"):
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
        match = re.search(rb"\0depends=([^\0]*)\0", data)
        return data, [part for part in (match[1].decode().split(",") if match else []) if part]
    return b"", []  # built in


def _modules(found: Kernel, names: list[str]) -> dict[str, bytes]:
    """Modules and what they need, in an order that loads."""
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        data, needs = _module(found, name)
        for need in needs:
            if need not in ordered:
                add(need)
        if data:
            ordered[name] = data

    for name in names:
        add(name)
    return ordered


def cpio(files: dict[str, tuple[int, bytes]]) -> bytes:
    """A newc archive of path -> (mode, content); a character device's content is "major:minor"."""
    out = bytearray()
    for n, (name, (mode, data)) in enumerate([*files.items(), ("TRAILER!!!", (0, b""))]):
        major, minor = (int(x) for x in data.split(b":")) if stat.S_ISCHR(mode) else (0, 0)
        data = b"" if stat.S_ISCHR(mode) else data
        head = [n, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name) + 1, 0]
        out += b"070701" + b"".join(b"%08X" % x for x in head) + name.encode() + b"\0"
        out += b"\0" * (-len(out) % 4) + data
        out += b"\0" * (-len(out) % 4)
    return bytes(out)


def elf(home: Path, found: Kernel) -> Path:
    """The kernel itself, taken out of its bootable file, as monitors want it that are no firmware.

    The x86 boot protocol (Documentation/arch/x86/boot.rst, 2.08) says where it lies. SubstrateUnavailable if it is
    packed in another way than LZ4 (Debian's), xz or gzip.
    """
    target = home / "vm" / f"vmlinux-{found.release}"
    if not target.exists():
        data = found.image.read_bytes()
        start = ((data[0x1F1] or 4) + 1) * 512 + int.from_bytes(data[0x248:0x24C], "little")
        packed = data[start : start + int.from_bytes(data[0x24C:0x250], "little")]
        plain = b""
        if packed.startswith(b"\x02\x21\x4c\x18"):
            unlz4 = build.program(Path(__file__).with_name("unlz4.c"), home / "cache")
            plain = subprocess.run([unlz4], input=packed, capture_output=True, check=True).stdout
        elif packed.startswith(b"\xfd7zXZ\0"):
            plain = lzma.LZMADecompressor().decompress(packed)
        elif packed.startswith(b"\x1f\x8b"):
            plain = zlib.decompressobj(31).decompress(packed)
        if not plain.startswith(b"\x7fELF"):
            reason = f"{found.image} is not packed with LZ4, xz or gzip"
            raise SubstrateUnavailable(reason, reason=reason, fix="set DSEC_VMLINUX to an uncompressed kernel (ELF)")
        publish(target, plain)
    return target


@lru_cache(maxsize=4)
def initrd(home: Path, found: Kernel, vsock: bool = False) -> Path:
    """The initrd for that kernel, kept under the hash of what it holds. Needs busybox, statically linked."""
    busybox = shutil.which("busybox")
    if busybox is None or b"ld-linux" in Path(busybox).read_bytes()[:4096]:
        reason = "no static busybox"
        raise SubstrateUnavailable(reason, reason=reason, fix="apt-get install busybox-static")
    modules = _modules(found, VSOCK_MODULES if vsock else MODULES)
    files = dict.fromkeys(("bin", "dev", "modules"), (stat.S_IFDIR | 0o755, b""))
    files["dev/console"] = (stat.S_IFCHR | 0o600, b"5:1")
    files["init"] = (stat.S_IFREG | 0o755, INIT.encode())
    files["modules/order"] = (stat.S_IFREG | 0o644, "\n".join(modules).encode())
    programs = {"busybox": Path(busybox), "agent": build.agent(home)}
    programs["wake"] = build.program(Path(__file__).with_name("wake.c"), home / "cache")
    files |= {f"bin/{name}": (stat.S_IFREG | 0o755, path.read_bytes()) for name, path in programs.items()}
    files["bin/sh"] = (stat.S_IFLNK | 0o777, b"busybox")
    files |= {f"modules/{name}": (stat.S_IFREG | 0o644, data) for name, data in modules.items()}
    archive = cpio(files)
    target = home / "vm" / f"initrd-{hashlib.sha256(archive).hexdigest()[:16]}"
    if not target.exists():
        publish(target, gzip.compress(archive, 1, mtime=0))
    return target


def publish(target: Path, data: bytes) -> None:
    """Writes a file that appears whole or not at all, readable to all (QEMU's uid opens it), writable to none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
        file.write(data)
        os.fchmod(file.fileno(), 0o444)
        os.fsync(file.fileno())
    os.replace(file.name, target)


class locked:
    """A lock between processes on `path` (made when missing), for `with`; blocks until it is free."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
