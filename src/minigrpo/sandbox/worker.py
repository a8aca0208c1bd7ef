"""Workers: each is a zygote process that provides a locked child for each program. One thread at a time uses one."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minigrpo.errors import SandboxError
from minigrpo.sandbox.inside import codec
from minigrpo.sandbox.protocol import Limits

BOOT = "import sys; sys.path.append(sys.argv[1]); from inside import zygote; zygote.main()"
START_TIMEOUT_S, REPLY_TIMEOUT_S, EXIT_TIMEOUT_S = 60.0, 30.0, 2.0
CHECK_INTERVAL_S, MIN_CHECK_INTERVAL_S, MAX_IDLE_CHECKS = 0.5, 0.02, 2
CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class WorkerLost(Exception):  # noqa: N818
    """The zygote died or does not answer: somebody killed it, or the machine has no memory left."""


class WallHit(Exception):  # noqa: N818
    """The child did not answer in time."""


class Channel:
    """The byte stream to a child, with one budget of waiting time for the whole session.

    `check` is called after every half second of waiting, or sooner where it says so. It is told whether half a second
    was silent, returns the seconds until it wants to be called again, and may end the waiting by raising WallHit.
    """

    def __init__(self, handle: int, seconds: float, check: Callable[[bool], float], first_check: float) -> None:
        self.check = check
        self.until_check = first_check
        self.socket = socket.socket(fileno=handle)
        self.socket.setblocking(False)
        self.left = seconds

    def send(self, data: bytes) -> None:
        """Send all the bytes. Raise WallHit, or OSError where the child has ended."""
        view = memoryview(data)
        while view:
            try:
                view = view[self.socket.send(view) :]
            except BlockingIOError:
                self._wait(select.POLLOUT)

    def read(self, size: int) -> bytes:
        """Read `size` bytes, or fewer where the child has ended. Raise WallHit."""
        pieces: list[bytes] = []
        while size:
            try:
                piece = self.socket.recv(size)
            except BlockingIOError:
                self._wait(select.POLLIN)
                continue
            except ConnectionError:
                piece = b""
            if not piece:
                break
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def _wait(self, event: int) -> None:
        poll = select.poll()
        poll.register(self.socket, event)
        silence = 0.0
        while True:
            began = time.monotonic()
            ready = poll.poll(max(0, math.ceil(min(self.left, self.until_check) * 1000)))
            waited = time.monotonic() - began
            self.left, self.until_check, silence = self.left - waited, self.until_check - waited, silence + waited
            if ready:
                return
            if self.left <= 0:
                raise WallHit
            if self.until_check <= 0:
                silent = silence >= CHECK_INTERVAL_S
                silence = 0.0 if silent else silence
                self.until_check = self.check(silent)

    def close(self) -> None:
        self.socket.close()


class Worker:
    """A zygote, started at once, and its running child. Raises SandboxError where it cannot start or lacks a lock."""

    def __init__(self, limits: Limits, *, unsafe: bool = False, selftest: bool = True) -> None:
        self.limits = limits
        self.cpu_s = limits.cpu_s
        """CPU seconds of the running child."""
        self.owner = os.getpid()
        self.sound = False
        """Whether no child runs and the zygote waits for a command."""
        self.pid = 0
        ours, theirs = socket.socketpair()
        ours.settimeout(START_TIMEOUT_S)
        self.control = ours
        try:
            with theirs, above_standard_streams(theirs) as passed:
                self.process = start_zygote(passed.fileno())
            config = {"cpu_s": limits.cpu_s, "memory": limits.memory_mb * 2**20}
            self._send(config | {"unsafe": unsafe, "selftest": selftest})
            self.report = self._receive()
            ours.settimeout(REPLY_TIMEOUT_S)
            self.sound = True
        except WorkerLost:
            self.close()
            raise SandboxError(
                "The sandbox's worker died while it was starting. What this machine lacks: minigrpo sandbox --doctor"
            ) from None
        except BaseException:
            self.close()
            raise

    def take(self, cpu_s: float | None = None) -> Channel:
        """Take a fresh locked child, for `cpu_s` of CPU time where that is less than the limit.

        Raise SandboxError where the machine has no process left for it.
        """
        self.sound = False
        self.cpu_s = self.limits.cpu_s if cpu_s is None else min(cpu_s, self.limits.cpu_s)
        try:
            self.control.sendall(b"T")
            _, handles, _, _ = socket.recv_fds(self.control, 1, 1, CLOSE_ON_EXEC)
        except OSError as fault:
            raise WorkerLost from fault
        self._idle = 0
        wall = self.limits.wall * self.cpu_s / self.limits.cpu_s
        first = min(self.cpu_s, CHECK_INTERVAL_S)
        channel = Channel(handles[0], wall, self._check_child, first) if handles else None
        try:
            report = self._receive()
        except BaseException:
            if channel:
                channel.close()
            raise
        if channel is None:
            self.sound = True
            raise SandboxError(
                f"The sandbox has no process for a program: {report.get('fault', 'unknown')}. Raise the limit on "
                "processes of this user or container (ulimit -u, --pids-limit), or lower --sandbox.workers."
            )
        self.pid = report["pid"]
        return channel

    def _check_child(self, silent: bool) -> float:
        """Return the seconds until the next check. Raise WallHit where the child has used its CPU time up, or waits.

        By the clock, because its own timer misses what it spends in giving the processor away. A child that was found
        waiting several times has all it needs, so it waits in vain.
        """
        try:
            self.control.sendall(b"S")
        except OSError as fault:
            raise WorkerLost from fault
        report = self._receive()
        if report["state"] != "S":
            self._idle = 0
        elif silent:
            self._idle += 1
        left = self.cpu_s - report["cpu_s"]
        if self._idle >= MAX_IDLE_CHECKS or left <= 0:
            raise WallHit
        return min(max(left, MIN_CHECK_INTERVAL_S), CHECK_INTERVAL_S)

    def end(self, *, waited: bool = False) -> dict[str, Any]:
        """Kill the child. Return its wait status, CPU seconds and, if it `waited`, its process state."""
        try:
            self.control.sendall(b"W" if waited else b"E")
        except OSError as fault:
            raise WorkerLost from fault
        report = self._receive()
        self.sound = True
        return report

    def stop(self) -> None:
        """Make whoever uses this worker in another thread find it lost."""
        with contextlib.suppress(OSError):
            self.control.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the control socket, which ends the zygote and its children. A fork of the owner does nothing more."""
        self.control.close()
        process = getattr(self, "process", None)
        self.sound = False
        if process is None or self.owner != os.getpid():
            return
        try:
            process.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _send(self, message: dict[str, Any]) -> None:
        data = codec.encode(message, codec.MAX_CONTROL_BYTES)
        try:
            self.control.sendall(codec.LENGTH.pack(len(data)) + data)
        except OSError as fault:
            raise WorkerLost from fault

    def _receive(self) -> dict[str, Any]:
        (size,) = codec.LENGTH.unpack(self._read(codec.LENGTH.size))
        return dict(codec.decode(self._read(size)))

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                piece = self.control.recv(size - len(data))
            except OSError as fault:
                raise WorkerLost from fault
            if not piece:
                raise WorkerLost
            data += piece
        return data


def above_standard_streams(handle: socket.socket) -> socket.socket:
    """Return a copy of a socket with a number above 2: in a process without stdin it may have that one."""
    import fcntl

    return socket.socket(fileno=fcntl.fcntl(handle.fileno(), fcntl.F_DUPFD_CLOEXEC, 3))


def start_zygote(control: int) -> subprocess.Popen[bytes]:
    """Start the zygote without site packages, user folder or environment, except what the interpreter needs."""
    if not sys.executable:
        raise SandboxError("The sandbox needs to know its Python interpreter, and sys.executable is empty here.")
    # A fixed seed of hashes: the same program walks its sets in the same order, run after run.
    environment = {"PYTHONHASHSEED": "0"}
    environment |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PYTHONHOME") if name in os.environ}
    command = [sys.executable, "-s", "-S", "-B", "-P", "-c", BOOT, str(Path(__file__).parent), str(control)]
    try:
        return subprocess.Popen(
            command,
            env=environment,
            cwd="/",
            pass_fds=(control,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as fault:
        raise SandboxError(f"The sandbox cannot start {sys.executable}: {fault.strerror or fault}.") from fault
