"""The zygote: a small process without secrets that forks a locked child for each program.

It is started with an empty environment and one descriptor, imports what programs may use, gives up its rights, tests
that the lock holds, and then keeps one locked child in reserve. Each child has its own channel to the process that runs
the program: neither programs nor results pass through the zygote, so a program finds nothing in it.

Commands, one byte each: T take the reserved child, E end the running child, W the same and report its state, S report
the running child's state and CPU seconds. When the other side closes the socket or dies, everything here ends.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from . import codec, locks, program, selftest, syscalls

PRELOADED = (
    "abc array bisect cmath collections contextlib copy dataclasses datetime decimal enum fractions functools heapq "
    "itertools json math numbers operator pprint random re statistics string textwrap time traceback types typing"
)
"""Modules that programs may import: no other can be loaded later. None can do more than the program itself."""

PRELOADED_FOR_PYTHON = (
    "unicodedata _strptime encodings.latin_1 encodings.utf_16 encodings.cp1252"
    + (" _pylong" if sys.version_info >= (3, 12) else "")
    + (" hashlib" if sys.version_info >= (3, 13) else "")
)
"""Modules that Python itself loads while a program runs: for names and `\\N{...}` beyond ASCII, dates, encodings, long
integers, and texts as seeds of `random`."""

HIDDEN = (
    "_ctypes _posixsubprocess _signal _socket ctypes inside select selectors shutil signal socket subprocess tempfile"
)
"""Modules that the zygote needs for itself and hides from programs. The filter, not this, is the lock. `resource`
stays, because wait4 looks it up."""

Work = Callable[[dict[str, str]], int]
FORK_TRIES, FORK_PAUSE = 40, 0.05
PROCESS_CPU_CLOCK = 2
"""With the inverted process id above it, Linux's number of a process's CPU clock (clock_getcpuclockid)."""
CONTROL = 3
"""The descriptor of the control socket in the zygote; in a child, that of its channel."""
PARENT_CHECK_S = 2.0
"""Seconds between checks whether the parent process is still alive."""


@dataclass(frozen=True, slots=True)
class Child:
    pid: int
    channel: socket.socket


class Zygote:
    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.parent = os.getppid()
        self.proc = -1
        self.lock: locks.Lock
        self.running: Child | None = None
        self.spare: Child | None = None
        self.refusal = ""
        self.unsafe = False

    def serve(self) -> None:
        try:
            while command := self.receive(1):
                if command == b"T":
                    self.take()
                elif command == b"S":
                    pid = self.running.pid if self.running else 0
                    self.send({"state": self.state(pid) if pid else "?", "cpu_s": cpu_seconds(pid) if pid else 0.0})
                else:
                    self.end(command == b"W")
        finally:
            for child in filter(None, (self.running, self.spare)):
                with contextlib.suppress(OSError):
                    os.kill(child.pid, signal.SIGKILL)

    def take(self) -> None:
        self.spare = self.spare or self.fork_with_retries()
        if self.spare is None:
            self.control.sendall(b"X")
            self.send({"fault": self.refusal})
            return
        socket.send_fds(self.control, [b"R"], [self.spare.channel.fileno()])
        self.spare.channel.close()
        self.send({"pid": self.spare.pid})
        self.running, self.spare = self.spare, None
        with contextlib.suppress(OSError):  # no hurry: it is tried again when it is needed
            self.spare = self.fork()

    def end(self, waited: bool) -> None:
        """Kill the child and send how it ended: wait status, CPU seconds and, if it `waited`, its state."""
        if self.running is None:
            self.send({"status": 0, "cpu_s": 0.0, "state": "?"})
            return
        pid = self.running.pid
        state = self.state(pid) if waited else "?"
        os.kill(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        self.running = None
        self.send({"status": status, "cpu_s": usage.ru_utime + usage.ru_stime, "state": state})

    def state(self, pid: int) -> str:
        """Return a process's state: R running or ready to run, S waiting for something, T stopped, ? unknown."""
        try:
            handle = os.open(f"{pid}/stat", os.O_RDONLY, dir_fd=self.proc)
        except OSError:
            return "?"
        with open(handle, "rb") as file:
            return file.read().rpartition(b") ")[2][:1].decode("ascii", "replace")

    def fork_with_retries(self) -> Child | None:
        for _ in range(FORK_TRIES):
            try:
                return self.fork()
            except OSError as fault:
                self.refusal = f"no process can be forked: {fault.strerror}"
                time.sleep(FORK_PAUSE)
        return None

    def fork(self, work: Work | None = None) -> Child:
        """Fork a locked child that serves one program, or does `work` and exits with its result."""
        near, far = socket.socketpair()
        zygote = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            near.close()
            far.close()
            raise
        if pid == 0:
            try:
                self.be_child(far.fileno(), zygote, work)
            except MemoryError:
                os._exit(program.NO_MEMORY)
            finally:
                os._exit(70)
        far.close()
        return Child(pid, near)

    def be_child(self, channel: int, zygote: int, work: Work | None) -> None:
        os.dup2(channel, syscalls.CHANNEL)
        os.closerange(0, syscalls.CHANNEL)
        os.closerange(syscalls.CHANNEL + 1, locks.RULESET)
        faults = self.lock.close(zygote)
        if work is not None:
            os._exit(min(work(faults), 1))
        if not self.unsafe and any(faults[name] for name in program.NECESSARY_LOCKS):
            os._exit(71)
        program.serve()

    def locked(self, work: Callable[[], int]) -> int:
        """Do `work` in a locked child and return its wait status."""
        child = self.fork(lambda faults: work())
        child.channel.close()
        return os.waitpid(child.pid, 0)[1]

    def locks_of_a_child(self) -> dict[str, str]:
        """Return which locks a child could close, as reported by one that ends at once."""
        child = self.fork(report_faults)
        report = child.channel.recv(codec.MAX_CONTROL_BYTES)
        child.channel.close()
        os.waitpid(child.pid, 0)
        return dict(codec.decode(report)) if report else {"filter": "the first child died"}

    def settle(self, config: dict[str, Any]) -> dict[str, Any]:
        """Give up all rights, for good. Return which locks are closed, and what the self-test found."""
        self.unsafe = config["unsafe"]
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")  # the first to go when memory runs out
        with contextlib.suppress(OSError):
            self.proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        locks.mapped()
        faults = locks.separate() if sys.platform == "linux" else {}
        faults |= locks.become_nobody()
        self.lock = locks.Lock(locks.Bounds(config["cpu_s"], config["memory"]))
        faults |= self.locks_of_a_child()
        tests = selftest.run(self.locked) if config["selftest"] and not faults["filter"] else {}
        gc.collect()
        gc.freeze()  # objects made so far are never scanned again, so their pages stay shared with children
        return {"locks": faults, "selftest": tests}

    def receive(self, size: int) -> bytes:
        """Receive bytes from the parent; b"" where it has ended."""
        data = b""
        while len(data) < size:
            try:
                piece = self.control.recv(size - len(data))
            except TimeoutError:
                if os.getppid() != self.parent:
                    return b""
                continue
            if not piece:
                return b""
            data += piece
        return data

    def send(self, reply: dict[str, Any]) -> None:
        data = codec.encode(reply, codec.MAX_CONTROL_BYTES)
        self.control.sendall(codec.LENGTH.pack(len(data)) + data)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process by the scheduler's clock, which charges what a timer's ticks may miss."""
    try:
        return time.clock_gettime((~pid << 3) | PROCESS_CPU_CLOCK)
    except (OSError, AttributeError):
        return 0.0


def report_faults(faults: dict[str, str]) -> int:
    os.write(syscalls.CHANNEL, codec.encode(faults, codec.MAX_CONTROL_BYTES))
    return 0


def main() -> None:
    """Run the zygote, started by `worker`; the second argument is the number of the control descriptor."""
    control = socket.socket(fileno=low_descriptor(int(sys.argv[2])))
    control.settimeout(PARENT_CHECK_S)
    zygote = Zygote(control)
    try:
        drop_inheritance()
        size = zygote.receive(codec.LENGTH.size)
        config = codec.decode(zygote.receive(codec.LENGTH.unpack(size)[0])) if size else None
        if config is None:
            return
        preload_modules()
        zygote.send(zygote.settle(config))
    except Exception as fault:
        zygote.send({"fault": f"{type(fault).__name__}: {fault}"})
        return
    gc.disable()
    zygote.serve()
    os._exit(0)  # nothing here needs a clean shutdown


def low_descriptor(control: int) -> int:
    """Move the control socket to a low number: a parent with many open files gives it any, also that of Landlock's."""
    if control != CONTROL:
        os.dup2(control, CONTROL, inheritable=False)
    return CONTROL


def drop_inheritance() -> None:
    """Drop what was inherited from the parent: descriptors, environment, signals, paths."""
    os.closerange(CONTROL + 1, os.sysconf("SC_OPEN_MAX"))
    os.environ.clear()
    os.chdir("/")
    os.umask(0o077)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.argv[:] = sys.orig_argv[:] = [""]


def preload_modules() -> None:
    for name in f"{PRELOADED} {PRELOADED_FOR_PYTHON}".split():
        import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] in HIDDEN.split()]:
        del sys.modules[name]
    sys.path.clear()
    sys.path_importer_cache.clear()
