"""The locks of a worker, one function each. All but the filter are taken where the machine grants them.

The zygote takes for good, before the first program: an own network and IPC namespace, an empty root, another user,
no capabilities. Each child takes for itself: resource limits, Landlock, and the filter of system calls, which alone
must hold whatever the others did. A function returns "" where the lock is closed, else why it is not.
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
"""Where Landlock's rules lie: above every descriptor that a child closes blindly."""
EMPTY_PLACES = ("/tmp", "/dev/shm", "/var/tmp", f"/run/user/{os.getuid()}")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the kernel counts. `address_space` in bytes beyond what the zygote itself maps."""

    cpu_s: float
    address_space: int


class Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("lines", ctypes.c_void_p))


def why() -> str:
    return os.strerror(ctypes.get_errno())


def call(name: str, *arguments: int) -> str:
    """A function of libc by name; numbers as the kernel wants them, whole registers."""
    function = getattr(LIBC, name, None)
    if function is None:
        return "unknown to this system"
    return "" if function(*map(ctypes.c_long, arguments)) == 0 else why()


def probe(namespaces: int) -> str:
    """In a process that is thrown away: may this user have these namespaces, and an empty root with them?"""
    child = os.fork()
    if child == 0:
        try:
            os._exit(1 if call("unshare", namespaces) else 2 if empty_root() else 0)
        finally:
            os._exit(3)
    status = os.waitpid(child, 0)[1]
    refusals = {0: "", 256: "namespaces are refused", 512: "an empty root is refused"}
    return refusals.get(status, "the probe died")


def separate() -> dict[str, str]:
    """Namespaces and an empty root: by right, or for an ordinary user by way of a user namespace.

    Not so for root, who would seem to be nobody in there and be root still.
    """
    wanted = NEW_NET | NEW_IPC | NEW_UTS | (0 if os.geteuid() == 0 else NEW_USER)
    reason = probe(wanted) or call("unshare", wanted)
    return {"namespaces": reason, "empty root": empty_root()}


def empty_root() -> str:
    """A folder that is removed once one stands in it: nothing is there, and nothing can be made there."""
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
    """Give up root, capabilities, and the way back to them."""
    unprivileged = call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
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
    capabilities = "" if capset and capset(header, none) == 0 else why()
    # Others of the same user may neither trace this process nor read its memory.
    undumpable = call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    return {
        "no new privileges": unprivileged,
        "own user": user,
        "no capabilities": capabilities,
        "not traceable": undumpable,
    }


def landlock_ruleset() -> tuple[int, str]:
    """A descriptor of rules that allow no file, no TCP port and no signal to others; -1 where there is no Landlock."""
    version = LIBC.syscall(ctypes.c_long(LANDLOCK_CREATE), None, ctypes.c_long(0), ctypes.c_long(1))
    if version < 1:
        return -1, why()
    files = (1 << (13 if version == 1 else 14 if version == 2 else 15 if version < 5 else 16)) - 1
    rules = (ctypes.c_uint64 * 3)(files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = LIBC.syscall(ctypes.c_long(LANDLOCK_CREATE), ctypes.byref(rules), ctypes.c_long(size), ctypes.c_long(0))
    if ruleset < 0:
        return -1, why()
    os.dup2(ruleset, RULESET, inheritable=False)
    os.close(ruleset)
    return RULESET, ""


def limit(bounds: Bounds) -> str:
    """Resource limits of this process. The hard limit is the soft one, so nothing can be raised again."""
    signal.setitimer(signal.ITIMER_PROF, bounds.cpu_s, 0.01)
    space = mapped() + bounds.address_space
    wanted = {
        "RLIMIT_AS": space,
        "RLIMIT_NPROC": 0,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_NOFILE": syscalls.CHANNEL + 1,
        # A second net: the timer above is finer.
        "RLIMIT_CPU": int(bounds.cpu_s) + 2,
    }
    failed = []
    for name, value in wanted.items():
        try:
            if hasattr(resource, name):
                resource.setrlimit(getattr(resource, name), (value, value))
        except (OSError, ValueError) as fault:
            failed.append(f"{name}: {fault}")
    return "; ".join(failed)


MAPPED = 0


def mapped() -> int:
    """Bytes of address space in use; looked up once, by the zygote, while there is a /proc."""
    global MAPPED
    if not MAPPED:
        try:
            with open("/proc/self/statm", encoding="ascii") as pages:
                MAPPED = int(pages.read().split()[0]) * resource.getpagesize()
        except OSError:
            MAPPED = 256 * 2**20
    return MAPPED


class Lock:
    """What a child does to itself before it reads a program. Made once, in the zygote."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.ruleset, self.landlock = landlock_ruleset() if sys.platform == "linux" else (-1, "needs Linux")
        self.missing = missing_filter()
        lines = syscalls.program(syscalls.ARCHITECTURES[os.uname().machine]) if not self.missing else b""
        self._lines = ctypes.create_string_buffer(lines)
        self._filter = Filter(len(lines) // 8, ctypes.addressof(self._lines))

    def close(self, parent: int) -> dict[str, str]:
        """All locks, the filter last. The channel must be the only descriptor, besides the ruleset's."""
        closed = {"dies with the zygote": call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)}
        if os.getppid() != parent:
            os._exit(1)
        closed["limits"] = limit(self.bounds)
        closed["landlock"] = self._restrict() if self.ruleset >= 0 else self.landlock
        closed["filter"] = self.missing or self._install()
        return closed

    def _restrict(self) -> str:
        done = LIBC.syscall(ctypes.c_long(LANDLOCK_RESTRICT), ctypes.c_long(self.ruleset), ctypes.c_long(0))
        fault = "" if done == 0 else why()
        os.close(self.ruleset)
        return fault

    def _install(self) -> str:
        pointer = ctypes.addressof(self._filter)
        return call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, pointer, 0, 0)


def missing_filter() -> str:
    """Why this system has no filter of system calls; "" where it should have one."""
    if sys.platform != "linux":
        return f"system-call filters (seccomp) need Linux; this is {sys.platform}"
    if os.uname().machine not in syscalls.ARCHITECTURES or sys.maxsize < 2**32:
        return f"no table of system calls for {os.uname().machine}, 64 bit"
    return ""
