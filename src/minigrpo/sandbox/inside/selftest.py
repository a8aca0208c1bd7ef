"""Test the lock: a locked child makes system calls, past Python, that must be refused or end the child.

Without the lock, each of these calls would succeed, or fail with an error other than EPERM.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from collections.abc import Callable
from functools import partial

from . import locks, syscalls

FORK_FLAGS = signal.SIGCHLD
ROOT = ctypes.create_string_buffer(b"/")
NOWHERE = ctypes.create_string_buffer(b"/nonexistent/minigrpo")
SPACE = ctypes.create_string_buffer(4096)
AT_FDCWD = -100
PAGE = 4096


root, nowhere, space = (ctypes.addressof(buffer) for buffer in (ROOT, NOWHERE, SPACE))
here = os.getpid()
CALLS: dict[str, tuple[int, ...]] = {
    "open": (root, 0),
    "openat": (AT_FDCWD, root, 0),
    "openat2": (AT_FDCWD, root, space, 24),
    "open_tree": (AT_FDCWD, root, 0),
    "newfstatat": (AT_FDCWD, root, space, 0),
    "read": (syscalls.CHANNEL + 1, space, 1),
    "write": (1, space, 0),
    "mmap": (0, PAGE, 7, 0x22, -1, 0),
    "mprotect": (space & -PAGE, PAGE, 7),
    "socket": (2, 1, 0),
    "connect": (syscalls.CHANNEL, space, 16),
    "sendto": (syscalls.CHANNEL, space, 0, 0, 0, 0),
    "sendmsg": (syscalls.CHANNEL, space, 0),
    "fork": (),
    "vfork": (),
    "clone": (FORK_FLAGS, 0, 0, 0, 0),
    "clone3": (space, 64),
    "execve": (nowhere, 0, 0),
    "execveat": (AT_FDCWD, nowhere, 0, 0, 0),
    "kill": (here, 0),
    "tkill": (here, 0),
    "tgkill": (here, here, 0),
    "pidfd_open": (here, 0),
    "pidfd_getfd": (0, 0, 0),
    "pidfd_send_signal": (0, 0, 0, 0),
    "ptrace": (0, 0, 0, 0),
    "process_vm_readv": (here, space, 0, space, 0, 0),
    "process_vm_writev": (here, space, 0, space, 0, 0),
    "rt_sigaction": (signal.SIGPROF, 0, space, 8),
    "rt_sigprocmask": (0, 0, space, 8),
    "setitimer": (2, space, 0),
    "timer_create": (0, 0, space),
    "setrlimit": (4, space),
    "prlimit64": (0, 4, 0, space),
    "prctl": (15, space, 0, 0, 0),
    "seccomp": (2, 0, space),
    "personality": (0xFFFFFFFF,),
    "unshare": (0,),
    "mount": (nowhere, nowhere, nowhere, 0, 0),
    "chroot": (nowhere,),
    "chdir": (root,),
    "unlink": (nowhere,),
    "unlinkat": (AT_FDCWD, nowhere, 0),
    "mkdir": (nowhere, 0),
    "mkdirat": (AT_FDCWD, nowhere, 0),
    "setuid": (os.getuid(),),
    "memfd_create": (space, 0),
    "userfaultfd": (0,),
    "perf_event_open": (space, 0, -1, -1, 0),
    "bpf": (0, space, 0),
    "io_uring_setup": (1, space),
    "add_key": (space, space, space, 0, 0),
    "shmget": (0, PAGE, 0o1600),
    "semget": (0, 1, 0o1600),
    "msgget": (0, 0o1600),
    "getrandom": (space, 1, 0),
    "ioctl": (syscalls.CHANNEL, 0x541B, space),
    "dup": (syscalls.CHANNEL,),
}
"""System calls and their arguments."""


def attempt(number: int, arguments: tuple[int, ...]) -> int:
    """Make the call; return 0 where it was refused, 1 where it got through. Runs in a locked child only."""
    ctypes.set_errno(0)
    got = locks.LIBC.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    return 0 if got == -1 and ctypes.get_errno() == errno.EPERM else 1


def run(locked: Callable[[Callable[[], int]], int]) -> dict[str, str]:
    """Return the outcome of each call. `locked` runs a function in a locked child and returns the child's wait status.

    Calls that should be refused share a child; calls that should end it have one each.
    """
    numbers = syscalls.ARCHITECTURES[os.uname().machine].numbers
    calls = {name: partial(attempt, numbers[name], arguments) for name, arguments in CALLS.items() if name in numbers}
    refusable = [name for name in calls if name in (*syscalls.REFUSED.split(), "read", "write", "mmap", "mprotect")]
    if locked(lambda: sum(calls[name]() for name in refusable)) == 0:
        outcomes = dict.fromkeys(refusable, "refused")
    else:
        outcomes = {name: describe_outcome(locked(calls[name])) for name in refusable}
    return outcomes | {name: describe_outcome(locked(work)) for name, work in calls.items() if name not in outcomes}


def describe_outcome(status: int) -> str:
    """Describe the wait status of a child that made one call."""
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSYS:
        return "ended"
    return "refused" if status == 0 else "got through"
