"""Two programs that take turns: each a child process that does one step when told to, then waits.

Interleaved steps meet the same weather: what else the machine does hits both sides. Separate processes keep their
memory peaks apart, and what one library switches on (threads, deterministic kernels) out of the other.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.machine import peak_bytes, reset_peak
from benchmarks.workloads import Workload

GO, STOP = "go", "stop"


class BenchmarkError(Exception):
    """A side failed, or the sides did not do the same work."""


class FinishedError(Exception):
    """Raised in a child where it would wait for its next turn, and there is none."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a side needs to begin: a model folder, a folder to write to, and how many steps it may be asked for."""

    workload: Workload
    folder: Path
    scratch: Path
    threads: int
    dtype: str
    steps: int


@dataclass(frozen=True, slots=True)
class Step:
    """One step of one side. Phases in seconds; what they leave of `seconds` is `other`. Lengths prompt by prompt.

    `cpu_seconds`: what all threads together were given. On one thread it hardly depends on who else is on the machine.
    """

    seconds: float
    cpu_seconds: float
    phases: Mapping[str, float]
    prompt_lengths: tuple[int, ...]
    completion_lengths: tuple[int, ...]
    peak: int

    @property
    def tokens(self) -> int:
        return sum(self.completion_lengths)

    @property
    def rate(self) -> float:
        """Completion tokens per second, end to end."""
        return self.tokens / self.seconds


class Turn:
    """The child's end: `begin` waits until it may, `end` reports."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._began = self._cpu_began = 0.0

    def ready(self, facts: Mapping[str, Any]) -> None:
        """Everything is loaded; `facts` (settings, as a rule) are what is known before the first step."""
        self._pipe.send(dict(facts))

    def begin(self) -> None:
        if self._pipe.recv() == STOP:
            raise FinishedError
        reset_peak()
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def end(
        self, phases: Mapping[str, float], prompt_lengths: Sequence[int], completion_lengths: Sequence[int]
    ) -> None:
        seconds, cpu = time.perf_counter() - self._began, time.process_time() - self._cpu_began
        whole = {**phases, "other": seconds - sum(phases.values())}
        self._pipe.send(Step(seconds, cpu, whole, tuple(prompt_lengths), tuple(completion_lengths), peak_bytes()))


Program = Callable[[Setup, Turn], None]


class Side:
    """The parent's end of one child. Use as a context manager."""

    def __init__(self, name: str, program: Program, setup: Setup) -> None:
        self.name = name
        # Spawned, not forked: a forked child of a process with threads may hang, and would share its memory pages.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(program, setup, theirs), name=name, daemon=True)
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
        self._pipe.send(GO)
        step = self._receive()
        assert isinstance(step, Step)
        return step

    def _receive(self) -> object:
        try:
            message = self._pipe.recv()
        except EOFError:
            raise BenchmarkError(f"{self.name} died without a word (out of memory?).") from None
        if isinstance(message, BaseException):
            raise message
        return message


def _serve(program: Program, setup: Setup, pipe: Connection) -> None:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(setup.threads)
    try:
        program(setup, Turn(pipe))
    except FinishedError:
        return
    except Exception:
        pipe.send(BenchmarkError(traceback.format_exc()))
