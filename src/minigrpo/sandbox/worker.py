"""A worker: one zygote, and the locked child that it lends for each program. Used by one thread at a time."""

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
START_S, REPLY_S, PATIENCE_S = 60.0, 30.0, 2.0
REPLY_BYTES = 2**16
GLANCE_S, GLANCES = 0.5, 2
CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class WorkerLost(Exception):  # noqa: N818
    """The zygote died, or does not answer: somebody killed it, or the machine has no memory left."""


class WallHit(Exception):  # noqa: N818
    """The child did not answer in time."""


class Channel:
    """The conversation's bytes, with a budget of waiting time for all of them together.

    `look` is called every half second of silence, and may end the waiting by raising WallHit.
    """

    def __init__(self, handle: int, seconds: float, look: Callable[[], None]) -> None:
        self.look = look
        self.socket = socket.socket(fileno=handle)
        self.socket.setblocking(False)
        self.left = seconds

    def send(self, data: bytes) -> None:
        """Raises WallHit, or OSError where the child has gone."""
        view = memoryview(data)
        while view:
            try:
                view = view[self.socket.send(view) :]
            except BlockingIOError:
                self._wait(select.POLLOUT)

    def read(self, size: int) -> bytes:
        """So many bytes, or fewer where the child has gone. Raises WallHit."""
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
        while True:
            began = time.monotonic()
            ready = poll.poll(max(0, math.ceil(min(self.left, GLANCE_S) * 1000)))
            self.left -= time.monotonic() - began
            if ready:
                return
            if self.left <= 0:
                raise WallHit
            self.look()

    def close(self) -> None:
        self.socket.close()


class Worker:
    """Starts its zygote at once. Raises SandboxError where it cannot be started, or lacks a necessary lock."""

    def __init__(self, limits: Limits, *, unsafe: bool = False, selftest: bool = True) -> None:
        self.limits = limits
        self.owner = os.getpid()
        self.sound = False
        """Whether no child runs and the zygote waits for a command: nothing was left half done."""
        self.pid = 0
        ours, theirs = socket.socketpair()
        ours.settimeout(START_S)
        self.control = ours
        try:
            with theirs:
                self.process = start(theirs.fileno())
            config = {"cpu_s": limits.cpu_s, "memory": limits.memory_mb * 2**20}
            self._send(config | {"unsafe": unsafe, "selftest": selftest})
            self.report = self._receive()
            ours.settimeout(REPLY_S)
            self.sound = True
        except WorkerLost:
            self.close()
            raise SandboxError(
                "The sandbox's worker died while it was starting. What this machine lacks: minigrpo sandbox --doctor"
            ) from None
        except BaseException:
            self.close()
            raise

    def take(self) -> Channel:
        """A fresh locked child. Raises SandboxError where the machine has no process left for it."""
        self.sound = False
        try:
            self.control.sendall(b"T")
            _, handles, _, _ = socket.recv_fds(self.control, 1, 1, CLOSE_ON_EXEC)
        except OSError as fault:
            raise WorkerLost from fault
        self._idle = 0
        channel = Channel(handles[0], self.limits.wall, self._look) if handles else None
        try:
            told = self._receive()
        except BaseException:
            if channel:
                channel.close()
            raise
        if channel is None:
            self.sound = True
            raise SandboxError(
                f"The sandbox has no process for a program: {told.get('fault', 'unknown')}. Raise the limit on "
                "processes of this user or container (ulimit -u, --pids-limit), or lower --sandbox.workers."
            )
        self.pid = told["pid"]
        return channel

    def _look(self) -> None:
        """A child that is found waiting, though it was given all it needs, time after time, waits for nothing."""
        try:
            self.control.sendall(b"S")
        except OSError as fault:
            raise WorkerLost from fault
        self._idle = self._idle + 1 if self._receive()["state"] == "S" else 0
        if self._idle >= GLANCES:
            raise WallHit

    def end(self, *, waited: bool = False) -> dict[str, Any]:
        """Kill the child. Its wait status, CPU seconds, and what it was doing if it `waited`."""
        try:
            self.control.sendall(b"W" if waited else b"E")
        except OSError as fault:
            raise WorkerLost from fault
        told = self._receive()
        self.sound = True
        return told

    def stop(self) -> None:
        """From another thread: whoever uses this worker finds it lost."""
        with contextlib.suppress(OSError):
            self.control.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """The zygote ends with its control socket, and its children with it. A fork of the owner only lets go."""
        self.control.close()
        process = getattr(self, "process", None)
        self.sound = False
        if process is None or self.owner != os.getpid():
            return
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _send(self, message: dict[str, Any]) -> None:
        data = codec.encode(message, REPLY_BYTES)
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


def start(control: int) -> subprocess.Popen[bytes]:
    """The zygote: no site packages, no user's folder, no environment but what the interpreter itself needs."""
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
