"""The system calls a sandbox may not make, as the classic BPF program that seccomp runs before each call.

A list of refusals rather than of permissions: programs under test use what they like, and the list holds what has no
use without privileges and has been a way out of a container. Namespaces, capabilities and cgroups are the wall; this
keeps code away from parts of the kernel behind it.
"""

from __future__ import annotations

import errno
import platform
import struct

# name: number on x86_64, number on aarch64 (None: the call does not exist there)
DENIED: dict[str, tuple[int | None, int | None]] = {
    # mounts, namespaces, roots
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "setns": (308, 268),
    "unshare": (272, 97), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    # kernel code, and kernel interfaces with a long list of holes
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "lookup_dcookie": (212, 18),
    "memfd_secret": (447, 447), "vmsplice": (278, 75), "kcmp": (312, 272), "move_pages": (279, 239),
    # the machine itself
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "syslog": (103, 116), "acct": (163, 89),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "clock_adjtime": (305, 266), "adjtimex": (159, 171), "sethostname": (170, 161), "setdomainname": (171, 162),
    "iopl": (172, None), "ioperm": (173, None), "vhangup": (153, 58), "uselib": (134, None), "ustat": (136, None),
    "sysfs": (139, None), "nfsservctl": (180, 42), "_sysctl": (156, None), "modify_ldt": (154, None),
}  # fmt: skip
_NOSYS = ("io_uring_setup", "io_uring_enter", "io_uring_register")  # programs have a way without it
_CHECKED = {"clone": (56, 220), "clone3": (435, 435), "ioctl": (16, 29), "socket": (41, 198), "personality": (135, 92)}
_ARCH = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

NEW_NAMESPACES = 0x7E020000 | 0x80
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET and NEWTIME."""
_TERMINAL = (0x5412, 0x541C)  # TIOCSTI types into somebody's terminal, TIOCLINUX pastes
_FAMILIES = (1, 2, 10, 16)  # unix, IPv4, IPv6, netlink; not AF_ALG, AF_VSOCK, AF_PACKET ...
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06


def program(machine: str | None = None) -> bytes:
    """The filter for a machine ("x86_64" or "aarch64"; this one by default) as the array bubblewrap reads.

    Raises ValueError for another machine, for whose calls there is no table.
    """
    machine = machine or platform.machine()
    if machine not in _ARCH:
        raise ValueError(f"no table of system calls for {machine}; there are {', '.join(_ARCH)}")
    column, arch = _ARCH[machine]
    code: list[bytes] = []

    def op(kind: int, value: int, yes: int = 0, no: int = 0) -> None:
        code.append(struct.pack("<HBBI", kind, yes, no, value))

    def refuse(number: int) -> None:
        op(_RET, _ERRNO | number)

    op(_LOAD, 4)
    op(_JEQ, arch, 1, 0)
    op(_RET, _KILL)
    op(_LOAD, 0)
    if machine == "x86_64":
        op(_JGE, 0x40000000, 0, 1)  # the x32 table has the same calls under other numbers
        refuse(errno.ENOSYS)
    for name, numbers in DENIED.items():
        number = numbers[column]
        if number is not None:
            op(_JEQ, number, 0, 1)
            refuse(errno.ENOSYS if name in _NOSYS else errno.EPERM)
    call = {name: numbers[column] for name, numbers in _CHECKED.items()}
    op(_JEQ, call["clone3"], 0, 1)  # its flags are behind a pointer; libc falls back to clone
    refuse(errno.ENOSYS)
    op(_JEQ, call["clone"], 0, 4)
    op(_LOAD, 16)
    op(_JSET, NEW_NAMESPACES, 0, 1)
    refuse(errno.EPERM)
    op(_RET, _ALLOW)
    op(_JEQ, call["ioctl"], 0, 5)
    op(_LOAD, 24)
    op(_JEQ, _TERMINAL[0], 1, 0)
    op(_JEQ, _TERMINAL[1], 0, 1)
    refuse(errno.EPERM)
    op(_RET, _ALLOW)
    op(_JEQ, call["socket"], 0, 3 + len(_FAMILIES))
    op(_LOAD, 16)
    for i, family in enumerate(_FAMILIES):
        op(_JEQ, family, len(_FAMILIES) - i, 0)
    refuse(errno.EAFNOSUPPORT)
    op(_RET, _ALLOW)
    op(_JEQ, call["personality"], 0, 4)
    op(_LOAD, 16)
    op(_JEQ, 0, 2, 0)
    op(_JEQ, 0xFFFFFFFF, 1, 0)
    refuse(errno.EPERM)
    op(_RET, _ALLOW)
    return b"".join(code)
