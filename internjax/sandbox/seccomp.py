"""A system call filter as a classic BPF program (seccomp(2), bpf(4)), assembled here.

Namespaces hide the host; this filter takes away what they leave: new processes (a limit on their
number does not bind root, and one process makes the memory limit a total), memory outside the
address space limit, and the kernel interfaces most escapes start from. Everything else is allowed.
"""

import platform
import struct

EPERM, ENOSYS = 1, 38
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCH_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_CLONE_THREAD = 0x00010000
_X32_BIT = 0x40000000

# (architecture, {name: number}) from the kernel's asm/unistd.h.
_CALLS = {
    "x86_64": (
        0xC000003E,
        {
            "clone": 56, "clone3": 435, "fork": 57, "vfork": 58, "execveat": 322,
            "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "pidfd_getfd": 438,
            "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155,
            "chroot": 161, "fsopen": 430, "fsmount": 432, "move_mount": 429, "open_tree": 428,
            "mount_setattr": 442, "open_by_handle_at": 304, "name_to_handle_at": 303,
            "keyctl": 250, "add_key": 248, "request_key": 249, "bpf": 321,
            "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425,
            "io_uring_enter": 426, "io_uring_register": 427, "memfd_create": 319,
            "memfd_secret": 447, "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240,
            "personality": 135, "kexec_load": 246, "init_module": 175, "finit_module": 313,
            "socket": 41, "socketpair": 53,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "clone": 220, "clone3": 435, "execveat": 281,
            "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "pidfd_getfd": 438,
            "unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "pivot_root": 41,
            "chroot": 51, "fsopen": 430, "fsmount": 432, "move_mount": 429, "open_tree": 428,
            "mount_setattr": 442, "open_by_handle_at": 265, "name_to_handle_at": 264,
            "keyctl": 219, "add_key": 217, "request_key": 218, "bpf": 280,
            "perf_event_open": 241, "userfaultfd": 282, "io_uring_setup": 425,
            "io_uring_enter": 426, "io_uring_register": 427, "memfd_create": 279,
            "memfd_secret": 447, "shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180,
            "personality": 92, "kexec_load": 104, "init_module": 105, "finit_module": 273,
            "socket": 198, "socketpair": 199,
        },
    ),
}  # fmt: skip


def supported() -> bool:
    """Whether the numbers of this machine's system calls are known."""
    return platform.machine() in _CALLS


def program(machine: str | None = None) -> bytes:
    """The filter for a machine ("x86_64" or "aarch64"; default: this one)."""
    architecture, calls = _CALLS[machine or platform.machine()]
    refuse = lambda errno: (_RETURN, 0, 0, _ERRNO | errno)  # noqa: E731
    code = [
        (_LOAD, 0, 0, _ARCH_AT),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),  # another architecture's numbers would pass the list below
        (_LOAD, 0, 0, _NUMBER_AT),
        (_ABOVE, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, _KILL),
        # clone3 hides its flags in memory; "not implemented" makes libc use clone.
        (_EQUAL, 0, 1, calls["clone3"]),
        refuse(ENOSYS),
        (_EQUAL, 0, 4, calls["clone"]),  # threads only
        (_LOAD, 0, 0, _FIRST_ARGUMENT_AT),
        (_ANY_BIT, 0, 1, _CLONE_THREAD),
        (_RETURN, 0, 0, _ALLOW),
        refuse(EPERM),
    ]
    for name, number in calls.items():
        if name not in ("clone", "clone3"):
            code += [(_EQUAL, 0, 1, number), refuse(EPERM)]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
