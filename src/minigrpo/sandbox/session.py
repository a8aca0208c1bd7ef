"""One program's conversation: the referee's calls go in, plain values come out, and everything else is a verdict.

The judge is on this side. What the child sends is a returned value and no more; whatever it writes out of turn carries
the wrong number-used-once, and ends the conversation. Calls share nothing by design, so a call that the machine's own
fault interrupted is made again in a fresh process.
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
NEARLY = 0.9
"""Of the CPU limit: a timer that never fires, on some machine, is no reason to try again."""


class Ended(Exception):  # noqa: N818
    """The conversation is over, with this outcome."""

    def __init__(self, verdict: Verdict, detail: str = "") -> None:
        super().__init__(detail)
        self.verdict: Verdict = verdict
        self.detail = printable(detail)


class Fault(Exception):  # noqa: N818
    """The machine's fault, not the program's: to be tried again."""


class Session:
    """With one child of a worker. `close` it, whatever happens."""

    def __init__(self, worker: Worker, job: bytes) -> None:
        self.worker, self.limits = worker, worker.limits
        self.cpu_s = 0.0
        self.channel: Channel | None = None
        try:
            self.channel = worker.take()
            self._say(b"-", job)
        except WorkerLost as fault:
            raise Fault("a worker was lost") from fault

    def ask(self, kind: bytes, payload: bytes) -> Plain:
        """The value of one call. Raises Ended with the program's verdict, or Fault."""
        once = self._say(kind, payload)
        try:
            assert self.channel is not None
            head = self.channel.read(program.HEAD.size)
            if len(head) < program.HEAD.size:
                raise self._died()
            size, echo, verdict = program.HEAD.unpack(head)
            if echo != once or size > self.limits.output_bytes:
                raise Ended("blocked", "it wrote to the channel out of turn")
            body = self.channel.read(size)
        except WallHit:
            raise self._hung() from None
        except WorkerLost as fault:
            raise Fault("a worker was lost") from fault
        if len(body) < size:
            raise self._died()
        return understood(verdict, body)

    def _say(self, kind: bytes, payload: bytes) -> bytes:
        once = os.urandom(8)
        try:
            assert self.channel is not None
            self.channel.send(program.HEAD.pack(len(payload), once, kind) + payload)
        except WallHit:
            raise self._hung() from None
        except WorkerLost as fault:
            raise Fault("a worker was lost") from fault
        except OSError:
            pass  # the child has gone; reading tells how
        return once

    def close(self) -> float:
        """CPU seconds of the child, which is gone after this."""
        if self.channel is not None:
            with contextlib.suppress(Fault):  # what was answered stays answered
                self._end(waited=False)
        return self.cpu_s

    def _end(self, *, waited: bool) -> dict[str, Any]:
        channel, self.channel = self.channel, None
        assert channel is not None
        try:
            told = self.worker.end(waited=waited)  # first: a child that waits would wake up when its channel closes
        except WorkerLost as fault:
            raise Fault("a worker was lost") from fault
        finally:
            channel.close()
        self.cpu_s = told["cpu_s"]
        return told

    def _hung(self) -> Exception:
        told = self._end(waited=True)
        if told["cpu_s"] >= NEARLY * self.limits.cpu_s:
            return timeout(self.limits)
        if told["state"] == "S":
            return Ended("timeout", "it waits for something that never comes")
        return Fault(f"only {told['cpu_s']:.2f} s of CPU time in {self.limits.wall:g} s")

    def _died(self) -> Exception:
        told = self._end(waited=False)
        status = told["status"]
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if number == signal.SIGSYS:
            return Ended("blocked", "a forbidden system call")
        if number in TIMERS or (number and told["cpu_s"] >= self.limits.cpu_s):
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


def understood(kind: bytes, body: bytes) -> Plain:
    """The returned value. Raises Ended where the child tells of a failure, or makes no sense."""
    if kind == program.VALUE:
        try:
            value: Plain = codec.decode(body)
        except codec.CodecError as fault:
            raise Ended("blocked", f"it wrote what is no value: {fault}") from None
        return value
    if kind not in KINDS:
        raise Ended("blocked", "it wrote what is no answer")
    words = body.decode(errors="replace") or "no memory left"
    raise Ended(KINDS[kind], words)
