"""The locks of a worker, one function each. Only the filter and the limits are required; the others are used where the
machine supports them.

The zygote closes for good, before the first program: its own network and IPC namespace, an empty root, another user, no
capabilities. Each child closes for itself: resource limits, Landlock, and the filter of system calls, which must hold
even if all others fail. A function returns "" where the lock is closed, else the reason why it is not.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import tempfile
from dataclasses import dataclass

from . import syscalls

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
NEW_UTS, NEW_IPC, NEW_USER, NEW_NET = 0x04000000, 0x08000000, 0x10000000, 0x40000000
LANDLOCK_CREATE, LANDLOCK_RESTRICT = 444, 446
NOBODY = 65534
RULESET = 100
"""The descriptor of Landlock's rules: above every descriptor that a child closes."""
EMPTY_PLACES = ("/tmp", "/dev/shm", "/var/tmp", f"/run/user/{os.getuid()}")


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits that the kernel enforces. `address_space`: bytes beyond what the zygote itself maps."""

    cpu_s: float
    address_space: int


class Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("lines", ctypes.c_void_p))


def last_error() -> str:
    return os.strerror(ctypes.get_errno())


def call_libc(name: str, *arguments: int) -> str:
    """Call a function of libc by name, with numbers as whole registers. Return "", or the error."""
    function = getattr(LIBC, name, None)
    if function is None:
        return "unknown to this system"
    return "" if function(*map(ctypes.c_long, arguments)) == 0 else last_error()


def probe(namespaces: int) -> str:
    """Try in a child process whether this user may have namespaces and an empty root; return "" or why not."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(1 if call_libc("unshare", namespaces) else 2 if empty_root() else 0)
        finally:
            os._exit(3)
    status = os.waitpid(child, 0)[1]
    refusals = {0: "", 256: "namespaces are refused", 512: "an empty root is refused"}
    return refusals.get(status, "the probe died")


def separate() -> dict[str, str]:
    """Take namespaces and an empty root: as root directly, as an ordinary user through a user namespace.

    Root gets no user namespace, in which it would seem to be nobody and still be root.
    """
    namespaces = NEW_NET | NEW_IPC | NEW_UTS | (0 if os.geteuid() == 0 else NEW_USER)
    reason = probe(namespaces) or call_libc("unshare", namespaces)
    return {"namespaces": reason, "empty root": empty_root()}


def empty_root() -> str:
    """Make a removed folder the root: it holds nothing, and nothing can be created in it."""
    for place in EMPTY_PLACES:
        try:
            folder = tempfile.mkdtemp(prefix="minigrpo-", dir=place)
        except OSError:
            continue
        try:
            os.chdir(folder)
            os.rmdir(folder)
            os.chroot(".")
        except OSError as fault:
            os.chdir("/")
            return fault.strerror or str(fault)
        return ""
    return "no folder can be made"


def become_nobody() -> dict[str, str]:
    """Give up root and capabilities, for good."""
    unprivileged = call_libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    user = ""
    if os.geteuid() == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        except (OSError, AttributeError) as fault:
            user = f"stays root: {fault}"
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    none = (ctypes.c_uint32 * 6)()
    capset = getattr(LIBC, "capset", None)
    capabilities = "" if capset and capset(header, none) == 0 else last_error()
    # Others of the same user may neither trace this process nor read its memory.
    undumpable = call_libc("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    return {
        "no new privileges": unprivileged,
        "own user": user,
        "no capabilities": capabilities,
        "not traceable": undumpable,
    }


def landlock_ruleset() -> tuple[int, str]:
    """Return a descriptor of rules that allow no file, TCP port or signal to others, -1 without Landlock, and why."""
    version = LIBC.syscall(ctypes.c_long(LANDLOCK_CREATE), None, ctypes.c_long(0), ctypes.c_long(1))
    if version < 1:
        return -1, last_error()
    files = (1 << (13 if version == 1 else 14 if version == 2 else 15 if version < 5 else 16)) - 1
    rules = (ctypes.c_uint64 * 3)(files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = LIBC.syscall(ctypes.c_long(LANDLOCK_CREATE), ctypes.byref(rules), ctypes.c_long(size), ctypes.c_long(0))
    if ruleset < 0:
        return -1, last_error()
    os.dup2(ruleset, RULESET, inheritable=False)
    os.close(ruleset)
    return RULESET, ""


def limit(bounds: Bounds) -> str:
    """Set this process's resource limits, hard ones equal to soft ones, so that none can be raised again."""
    signal.setitimer(signal.ITIMER_PROF, bounds.cpu_s, 0.01)
    space = mapped() + bounds.address_space
    limits = {
        "RLIMIT_AS": space,
        "RLIMIT_NPROC": 0,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_NOFILE": syscalls.CHANNEL + 1,
        # A fallback: the timer above is finer.
        "RLIMIT_CPU": int(bounds.cpu_s) + 2,
    }
    failed = []
    for name, value in limits.items():
        try:
            if hasattr(resource, name):
                resource.setrlimit(getattr(resource, name), (value, value))
        except (OSError, ValueError) as fault:
            failed.append(f"{name}: {fault}")
    return "; ".join(failed)


MAPPED = 0


def mapped() -> int:
    """Return the bytes of address space in use, read once, by the zygote, while it has a /proc."""
    global MAPPED
    if not MAPPED:
        try:
            with open("/proc/self/statm", encoding="ascii") as pages:
                MAPPED = int(pages.read().split()[0]) * resource.getpagesize()
        except OSError:
            MAPPED = 256 * 2**20
    return MAPPED


class Lock:
    """The locks that a child closes before it reads a program. Made once, in the zygote."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.ruleset, self.landlock = landlock_ruleset() if sys.platform == "linux" else (-1, "needs Linux")
        self.missing = missing_filter()
        lines = syscalls.program(syscalls.ARCHITECTURES[os.uname().machine]) if not self.missing else b""
        self._lines = ctypes.create_string_buffer(lines)
        self._filter = Filter(len(lines) // 8, ctypes.addressof(self._lines))

    def close(self, parent: int) -> dict[str, str]:
        """Close all locks, the filter last. No descriptor but the channel's and the ruleset's may be open."""
        closed = {"dies with the zygote": call_libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)}
        if os.getppid() != parent:
            os._exit(1)
        closed["limits"] = limit(self.bounds)
        closed["landlock"] = self._restrict() if self.ruleset >= 0 else self.landlock
        closed["filter"] = self.missing or self._install()
        return closed

    def _restrict(self) -> str:
        done = LIBC.syscall(ctypes.c_long(LANDLOCK_RESTRICT), ctypes.c_long(self.ruleset), ctypes.c_long(0))
        fault = "" if done == 0 else last_error()
        os.close(self.ruleset)
        return fault

    def _install(self) -> str:
        pointer = ctypes.addressof(self._filter)
        return call_libc("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, pointer, 0, 0)


def missing_filter() -> str:
    """Return why this system has no filter of system calls; "" where it should have one."""
    if sys.platform != "linux":
        return f"system-call filters (seccomp) need Linux; this is {sys.platform}"
    if os.uname().machine not in syscalls.ARCHITECTURES or sys.maxsize < 2**32:
        return f"no table of system calls for {os.uname().machine}, 64 bit"
    return ""
