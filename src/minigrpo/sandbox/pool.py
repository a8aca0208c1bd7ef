"""The Sandbox: a pool of running workers for any number of threads, and one that a whole process shares."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from minigrpo.errors import SandboxError
from minigrpo.sandbox.inside import codec, program
from minigrpo.sandbox.protocol import Limits, Outcome, Plain, Referee, Wrong, printable
from minigrpo.sandbox.session import Ended, Fault, Session
from minigrpo.sandbox.worker import Worker

MAX_ATTEMPTS = 3
"""Attempts before giving up on a program that faults of the machine interrupt."""

MAX_WORKERS = 8


class Sandbox:
    """Runs model-written Python in locked processes. See docs/sandbox.md for what that covers.

        with Sandbox(Limits(cpu_s=2)) as sandbox:
            outcome = sandbox.run(source, "strategy", referee(game))

    Thread-safe; `workers` programs run side by side, None or 0: one for each core, up to eight. Workers start when they
    are first needed. A referee must not run a program itself: it could wait for its own worker. A machine without the
    necessary locks is refused with a SandboxError, unless `unsafe`.
    """

    def __init__(self, limits: Limits | None = None, workers: int | None = None, unsafe: bool = False) -> None:
        self.limits = limits or Limits()
        self.unsafe = unsafe
        self.workers = workers or min(MAX_WORKERS, cores())
        self._reset()
        ALL.add(self)

    def _reset(self) -> None:
        self._free: list[Worker] = []
        self._busy: set[Worker] = set()
        self._turn = threading.Condition()
        self._starting = 0
        self._tested = False

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End every worker and the program that it runs. A later run starts new ones."""
        with self._turn:
            idle, self._free = self._free, []
            for busy in self._busy:
                busy.stop()  # whoever uses it closes it
        for worker in idle:
            worker.close()

    def release_in_child(self) -> None:
        """Close the handles in a forked child: the workers belong to its parent, which must be able to end them."""
        for worker in (*self._free, *self._busy):
            worker.close()
        self._reset()

    def run(self, source: str, entry: str, referee: Referee[Any], *, cpu_s: float | None = None) -> Outcome:
        """Play the referee's game with the function `entry` of a program, in a fresh process.

        `cpu_s`: what is left of the CPU time where several runs share one limit.

        The referee runs here, in this process, and what it raises besides `Wrong` is raised here.
        """
        try:
            return Game(self, source, entry, cpu_left_s=cpu_s).play(referee)
        finally:
            referee.close()

    def check(self, source: str, entry: str) -> Outcome:
        """Compile a program and execute its definitions, but call nothing."""
        return Game(self, source, entry, program.DEFINE).play(_one_definition())

    @contextmanager
    def worker(self) -> Iterator[Worker]:
        """Yield a worker for one thread. A worker that was interrupted halfway is not used again."""
        worker = self._hire()
        try:
            yield worker
        finally:
            if not worker.sound:
                worker.close()
            with self._turn:
                self._busy.discard(worker)
                if worker.sound:
                    self._free.append(worker)
                self._turn.notify()

    def _hire(self) -> Worker:
        with self._turn:
            while not self._free and len(self._busy) + self._starting >= self.workers:
                self._turn.wait()
            if self._free:
                worker = self._free.pop()
                self._busy.add(worker)
                return worker
            self._starting += 1
        started: list[Worker] = []
        try:
            started.append(self._start())
            return started[0]
        finally:
            with self._turn:
                self._starting -= 1
                self._busy.update(started)
                self._turn.notify()

    def _start(self) -> Worker:
        worker = open_worker(self.limits, unsafe=self.unsafe, selftest=not self._tested)
        if self.unsafe and not self._tested and (holes := missing(worker.report)):
            warnings.warn(
                f"Programs run without full protection ({'; '.join(holes)}): they may read and change what this user "
                "can. Look at what you run.",
                stacklevel=2,
            )
        self._tested = True
        return worker


def open_worker(limits: Limits, *, unsafe: bool = False, selftest: bool = True) -> Worker:
    """Start a worker whose locks hold. Raise SandboxError where a necessary lock does not, unless `unsafe`."""
    if not hasattr(os, "fork"):
        raise SandboxError(
            f"The sandbox needs fork, which {sys.platform} lacks. Run it in Linux: WSL 2, or a container."
        )
    if sys.platform != "linux" and not unsafe:
        raise SandboxError(
            f"The sandbox rests on Linux's filter of system calls (seccomp), which {sys.platform} lacks. Run it in "
            "Linux, a container for example; or, if you trust every program, with --sandbox.unsafe."
        )
    worker = Worker(limits, unsafe=unsafe, selftest=selftest)
    if "fault" in worker.report:
        worker.close()
        raise SandboxError(
            f"The sandbox cannot start: {worker.report['fault']}. Where processes or memory are lacking, raise this "
            "user's or container's limits (ulimit -u, --pids-limit, --memory)."
        )
    holes = missing(worker.report)
    if holes and not unsafe:
        worker.close()
        raise SandboxError(
            f"The sandbox is not safe on this machine: {'; '.join(holes)}. See what it lacks: "
            "minigrpo sandbox --doctor. If you trust every program: --sandbox.unsafe"
        )
    return worker


def missing(report: dict[str, Any]) -> list[str]:
    """List why programs must not run, from a zygote's report; empty where all necessary locks are closed."""
    locks = report["locks"]
    holes = [f"{name}: {reason}" for name in program.NECESSARY_LOCKS if (reason := locks.get(name, "not tried"))]
    return holes + [f"{name} got through" for name, met in report["selftest"].items() if met == "got through"]


class Game:
    """Plays one program against one referee. A call that the machine interrupts is repeated in another process."""

    def __init__(
        self,
        sandbox: Sandbox,
        source: str,
        entry: str,
        kind: bytes = program.CALL,
        *,
        cpu_left_s: float | None = None,
    ) -> None:
        self.sandbox, self.limits, self.kind = sandbox, sandbox.limits, kind
        self.source, self.entry, self.cpu_left_s = source, entry, cpu_left_s
        self.calls, self.cpu_s = 0, 0.0

    def play(self, referee: Referee[Any]) -> Outcome:
        try:
            return self._play_with_retries(referee, next(referee))
        except StopIteration as stop:
            return Outcome("ok", result=stop.value)
        except Wrong as wrong:
            return Outcome("wrong", printable(str(wrong)), None, self.calls, self.cpu_s)
        except Ended as ended:
            compiled = ended.compiled or self.calls > 0  # a program that has answered was compiled
            return Outcome(ended.verdict, ended.detail, None, self.calls, self.cpu_s, compiled)

    def _play_with_retries(self, referee: Referee[Any], arguments: tuple[Plain, ...]) -> Outcome:
        job, reason = self._job(), ""
        for _ in range(MAX_ATTEMPTS):
            try:
                with self.sandbox.worker() as worker:
                    return self._play(worker, job, referee, arguments)
            except Interrupted as fault:
                arguments, reason = fault.arguments, str(fault)
        raise Ended("infrastructure", f"{reason}, {MAX_ATTEMPTS} times in a row")

    def _job(self) -> bytes:
        """Encode the program. Raise Ended for a text that cannot be encoded: it could not be compiled either."""
        try:
            return codec.encode([self.limits.output_bytes, self.source, self.entry], self.limits.input_bytes)
        except codec.CodecError as fault:
            raise Ended("error", f"SyntaxError: the program is {fault}", compiled=False) from None

    def _play(self, worker: Worker, job: bytes, referee: Referee[Any], arguments: tuple[Plain, ...]) -> Outcome:
        """Play from this call on, until the referee ends or the program fails."""
        try:
            session = Session(worker, job, self.cpu_left_s)
            try:
                while True:
                    value = session.ask(self.kind, self._encode_arguments(arguments))
                    self.calls += self.kind == program.CALL
                    arguments = referee.send(value)
            except StopIteration as stop:
                result = stop.value
            finally:
                self.cpu_s += session.close()
        except Fault as fault:
            raise Interrupted(str(fault), arguments) from None
        return Outcome("ok", "", result, self.calls, self.cpu_s)

    def _encode_arguments(self, arguments: tuple[Plain, ...]) -> bytes:
        if self.calls >= self.limits.calls:
            raise Ended("timeout", f"more than {self.limits.calls} calls")
        if type(arguments) is not tuple:
            raise TypeError(f"a referee yields a tuple of arguments, not {type(arguments).__name__}")
        return codec.encode(arguments, self.limits.input_bytes)


class Interrupted(Exception):  # noqa: N818
    """A fault of the machine that interrupted the call with these arguments."""

    def __init__(self, reason: str, arguments: tuple[Plain, ...]) -> None:
        super().__init__(reason)
        self.arguments = arguments


def _one_definition() -> Referee[None]:
    yield ()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


ALL: weakref.WeakSet[Sandbox] = weakref.WeakSet()
SHARED: dict[tuple[Limits, bool], Sandbox] = {}
SHARING = threading.Lock()


def shared_sandbox(limits: Limits | None = None, *, workers: int | None = None, unsafe: bool = False) -> Sandbox:
    """Return this process's sandbox for these limits: made on first use, closed at exit. The first `workers` counts."""
    key = (limits or Limits(), unsafe)
    with SHARING:
        if key not in SHARED:
            SHARED[key] = Sandbox(key[0], workers, unsafe)
        return SHARED[key]


def close_all() -> None:
    for sandbox in list(ALL):
        sandbox.close()


def release_all_in_child() -> None:
    """Release all sandboxes in a forked child, where a lock may be held by a thread that does not exist there."""
    global SHARING
    SHARING = threading.Lock()
    for sandbox in list(ALL):
        sandbox.release_in_child()


atexit.register(close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=release_all_in_child)
