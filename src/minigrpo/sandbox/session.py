"""Talk with one program: send it calls, receive plain values, and turn everything else into a verdict.

The judge is on this side. A child can send returned values only: each answer carries the nonce of its call, and a
message with another nonce ends the session. Calls share no state by design, so a call that a fault of the machine
interrupted is repeated in a fresh process.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any

from minigrpo.sandbox.inside import codec, program
from minigrpo.sandbox.protocol import Limits, Plain, Verdict, printable
from minigrpo.sandbox.worker import Channel, WallHit, Worker, WorkerLost

KINDS: dict[bytes, Verdict] = {program.ERROR: "error", program.MEMORY: "memory", program.BLOCKED: "blocked"}
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGTRAP)
TIMERS = (signal.SIGPROF, signal.SIGXCPU)
CPU_LIMIT_SHARE = 0.9
"""Share of the CPU limit from which a hanging program counts as timed out, on machines whose timer never fires."""


class Ended(Exception):  # noqa: N818
    """The session is over, with this verdict."""

    def __init__(self, verdict: Verdict, detail: str = "", *, compiled: bool = True) -> None:
        super().__init__(detail)
        self.verdict: Verdict = verdict
        self.compiled = compiled
        self.detail = printable(detail)


class Fault(Exception):  # noqa: N818
    """A fault of the machine, not of the program: the call is to be repeated."""


class Session:
    """A session with one child of a worker. Always `close` it."""

    def __init__(self, worker: Worker, job: bytes, cpu_s: float | None = None) -> None:
        self.worker, self.limits = worker, worker.limits
        self.cpu_s = 0.0
        self.channel: Channel | None = None
        try:
            self.channel = worker.take(cpu_s)
            self._send(b"-", job)
        except WorkerLost as fault:
            raise Fault("a worker was lost") from fault

    def ask(self, kind: bytes, payload: bytes) -> Plain:
        """Make one call and return its value. Raise Ended with the program's verdict, or Fault."""
        nonce = self._send(kind, payload)
        try:
            assert self.channel is not None
            head = self.channel.read(program.HEAD.size)
            if len(head) < program.HEAD.size:
                raise self._died()
            size, echo, verdict = program.HEAD.unpack(head)
            if echo != nonce or size > self.limits.output_bytes:
                raise Ended("blocked", "it wrote to the channel out of turn")
            body = self.channel.read(size)
        except WallHit:
            raise self._hung() from None
        except WorkerLost as fault:
            raise Fault("a worker was lost") from fault
        if len(body) < size:
            raise self._died()
        return decode_answer(verdict, body)

    def _send(self, kind: bytes, payload: bytes) -> bytes:
        nonce = os.urandom(8)
        try:
            assert self.channel is not None
            self.channel.send(program.HEAD.pack(len(payload), nonce, kind) + payload)
        except WallHit:
            raise self._hung() from None
        except WorkerLost as fault:
            raise Fault("a worker was lost") from fault
        except OSError:
            pass  # the child has ended; reading tells how
        return nonce

    def close(self) -> float:
        """End the child and return its CPU seconds."""
        if self.channel is not None:
            with contextlib.suppress(Fault):  # answers already received count
                self._end(waited=False)
        return self.cpu_s

    def _end(self, *, waited: bool) -> dict[str, Any]:
        channel, self.channel = self.channel, None
        assert channel is not None
        try:
            report = self.worker.end(waited=waited)  # before the channel closes, which would wake a waiting child
        except WorkerLost as fault:
            raise Fault("a worker was lost") from fault
        finally:
            channel.close()
        self.cpu_s = report["cpu_s"]
        return report

    def _hung(self) -> Exception:
        report = self._end(waited=True)
        if report["cpu_s"] >= CPU_LIMIT_SHARE * self.worker.cpu_s:
            return timeout(self.limits)
        if report["state"] == "S":
            return Ended("timeout", "it waits for something that never comes")
        return Fault(f"only {report['cpu_s']:.2f} s of CPU time in {self.limits.wall:g} s")

    def _died(self) -> Exception:
        report = self._end(waited=False)
        status = report["status"]
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if number == signal.SIGSYS:
            return Ended("blocked", "a forbidden system call")
        if number in TIMERS or (number and report["cpu_s"] >= self.limits.cpu_s):
            return timeout(self.limits)
        if number in CRASHES:
            return Ended("error", f"it crashed the interpreter ({signal.Signals(number).name})")
        if number:
            return Fault(f"somebody ended the worker ({signal.Signals(number).name})")
        code = os.WEXITSTATUS(status)
        if code == program.NO_MEMORY:
            return Ended("memory", "no memory left")
        return Ended("error", f"it ended its own process (exit code {code})")


def timeout(limits: Limits) -> Ended:
    return Ended("timeout", f"more than {limits.cpu_s:g} s of CPU time")


def decode_answer(kind: bytes, body: bytes) -> Plain:
    """Return the value of an answer. Raise Ended where the child reports a failure, or sends nonsense."""
    if kind == program.VALUE:
        try:
            value: Plain = codec.decode(body)
        except codec.CodecError as fault:
            raise Ended("blocked", f"it wrote what is no value: {fault}") from None
        return value
    words = body.decode(errors="replace") or "no memory left"
    if kind == program.UNREADABLE:
        raise Ended("error", words, compiled=False)
    if kind not in KINDS:
        raise Ended("blocked", "it wrote what is no answer")
    raise Ended(KINDS[kind], words)
