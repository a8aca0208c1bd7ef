"""Run programs in turns: each is a child process that does one step on request, then waits.

Interleaved steps meet the same conditions: other load on the machine affects both sides. Separate processes keep their
memory peaks apart, and what one library switches on (threads, deterministic kernels) out of the other.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.machine import busy_seconds, now
from benchmarks.workloads import Workload
from minigrpo.utils.memory import empty_cache, peak_bytes, reset_peak

GO, STOP = "go", "stop"


class BenchmarkError(Exception):
    """A side failed, or the sides did not do the same work."""


class FinishedError(Exception):
    """Raised in a child that waits for its next turn when there is none."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a side needs to begin: a model folder, a folder to write to, and how many steps it may be asked for.

    `variant`: how TRL is set (trls.VARIANTS); minigrpo has only one way. `passes`: in how many TRL takes a step.
    """

    workload: Workload
    folder: Path
    scratch: Path
    threads: int
    dtype: str
    steps: int
    device: str = "cpu"
    variant: str = "best"
    passes: int = 1


@dataclass(frozen=True, slots=True)
class Step:
    """One step of one side. Phases in seconds; what they leave of `seconds` is `other`. Lengths prompt by prompt.

    `parts`: the step cut as the limit is (prefill, decode, training, update), as far as a side reports it.
    `cpu_seconds`: of all threads together. On one thread it hardly depends on other load on the machine. `others`:
    what other programs, and the host of a virtual machine, took of all cores meanwhile, in seconds of one core.
    """

    seconds: float
    cpu_seconds: float
    phases: Mapping[str, float]
    prompt_lengths: tuple[int, ...]
    completion_lengths: tuple[int, ...]
    peak: int
    parts: Mapping[str, float] = field(default_factory=dict)
    others: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(self.completion_lengths)

    @property
    def rate(self) -> float:
        """Completion tokens per second, end to end."""
        return self.tokens / self.seconds


class StepGate:
    """The child's end of a turn: `begin` waits for it, `end` reports the step."""

    def __init__(self, pipe: Connection, device: str = "cpu") -> None:
        self._pipe, self.device = pipe, device
        self._began = self._cpu_began = 0.0

    def ready(self, facts: Mapping[str, Any]) -> None:
        """Report that everything is loaded; `facts`: what is known before the first step, usually settings."""
        self._pipe.send(dict(facts))

    def begin(self) -> None:
        empty_cache()  # what a side keeps for its next step, the other one cannot have in its own
        if self._pipe.recv() == STOP:
            raise FinishedError
        reset_peak(self.device)
        self._began, self._cpu_began = now(self.device), time.process_time()

    def end(
        self,
        phases: Mapping[str, float],
        prompt_lengths: Sequence[int],
        completion_lengths: Sequence[int],
        parts: Mapping[str, float] | None = None,
        peak: int = 0,
    ) -> None:
        """Report the step. `peak`: bytes, where the side has reset the counter itself since the step began."""
        seconds, cpu = now(self.device) - self._began, time.process_time() - self._cpu_began
        whole = {**phases, "other": seconds - sum(phases.values())}
        peak = max(peak, peak_bytes(self.device))
        lengths = tuple(prompt_lengths), tuple(completion_lengths)
        self._pipe.send(Step(seconds, cpu, whole, *lengths, peak, dict(parts or {})))


class CallTimer:
    """Counts the seconds inside timed calls, by name, until they are taken."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._seconds: dict[str, float] = {}

    def timed(self, name: str, call: Callable[..., Any], after: Callable[[Any], None] | None = None) -> Any:
        """Return the same call, timed; `after` gets what it returns."""

        def counted(*given: Any, **named: Any) -> Any:
            began = now(self.device)
            answer = call(*given, **named)
            self._seconds[name] = self._seconds.get(name, 0.0) + now(self.device) - began
            if after:
                after(answer)
            return answer

        return counted

    def take(self, *names: str) -> dict[str, float]:
        """Return the seconds of the given names, 0 where there was no call; reset all."""
        taken, self._seconds = self._seconds, {}
        return {name: taken.get(name, 0.0) for name in names}


Program = Callable[[Setup, StepGate], None]


class Side:
    """The parent's end of one child. Use as a context manager."""

    def __init__(self, name: str, program: Program, setup: Setup, spins: int | None = None) -> None:
        """`spins`: GOMP_SPINCOUNT of the child; None: what `import minigrpo` has set."""
        self.name = name
        # Spawned, not forked: a forked child of a process with threads may hang, and would share its memory pages.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(program, setup, theirs), name=name, daemon=True)
        with environment({} if spins is None else {"GOMP_SPINCOUNT": str(spins)}):
            self._process.start()
        theirs.close()
        self.facts: Mapping[str, Any] = {}

    def __enter__(self) -> Side:
        facts = self._receive()
        assert isinstance(facts, dict)
        self.facts = facts
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, _: TracebackType | None) -> None:
        if fault is None:
            self._pipe.send(STOP)
            self._process.join(60)
        if self._process.is_alive():
            self._process.kill()

    def step(self) -> Step:
        busy = busy_seconds()
        self._pipe.send(GO)
        step = self._receive()
        assert isinstance(step, Step)
        return replace(step, others=max(0.0, busy_seconds() - busy - step.cpu_seconds))

    def _receive(self) -> object:
        try:
            message = self._pipe.recv()
        except EOFError:
            raise BenchmarkError(f"{self.name} died without a word (out of memory?).") from None
        if isinstance(message, BaseException):
            raise message
        return message


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment inside the block: a child that is started there gets them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _serve(program: Program, setup: Setup, pipe: Connection) -> None:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(setup.threads)
    try:
        program(setup, StepGate(pipe, setup.device))
    except FinishedError:
        return
    except BenchmarkError as fault:
        pipe.send(fault)
    except Exception:
        pipe.send(BenchmarkError(traceback.format_exc()))
