"""Grading beside generation: a group is graded once its last sibling has ended, while others are sampled.

    with Grader(task, workers=4, seconds=60, say=track.say) as grader:
        groups = rollout(engine, task, prompts, ..., grader=grader)

Groups are judged in the order in which they end, and come back in the order of their prompts: the outcome is that of
judging them one after the other. A group from which no grade comes for `seconds`, or for as long as the task's own
limits allow, is given up: what was judged of it stays, the rest gets a reward of NaN with a note. What an async
function awaits is cancelled then, and gives back the locks that it holds. Python cannot stop a thread, so one that
hangs is left behind and replaced; threads are daemons and never keep the process from ending.

Not covered: graders that only work in the main thread (those that set signals), and, with several workers, graders
whose calls disturb one another. A hang inside a C extension that holds Python's lock stops everything.
"""

from __future__ import annotations

import math
import queue
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from minigrpo.config.schema import TaskConfig
from minigrpo.errors import TaskError
from minigrpo.rollouts.grading import iter_grades
from minigrpo.types import Completion, Grade, Prompt, Task
from minigrpo.utils.event_loop import stop_awaiting

MAX_HUNG_GROUPS = 3
"""Groups in a row that may time out before the run stops."""


@dataclass(slots=True)
class GradingJob:
    """One group being graded. `since`: when it began, or its last grade came. `closed`: it timed out, and later results
    of its worker are ignored.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    grades: list[Grade] = field(default_factory=list)
    fault: BaseException | None = None
    since: float = math.inf
    thread: threading.Thread | None = None
    closed: bool = False
    ended: threading.Event = field(default_factory=threading.Event)


class Grader:
    """Grades groups in its own threads. `say` is called once with each message for the user."""

    def __init__(
        self, task: Task, *, workers: int = 1, seconds: float = 60.0, say: Callable[[str], None] | None = None
    ) -> None:
        self.task, self.workers = task, workers
        self.seconds = max(seconds, task.grading_seconds(workers) if task.grading_seconds else 0.0)
        self._say = say or warnings.warn
        self._said: set[str] = set()
        self._jobs: queue.SimpleQueue[GradingJob | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._running: list[GradingJob] = []
        self._hung = 0
        self._grace = min(1.0, seconds / 4)

    @classmethod
    def of(cls, task: Task, config: TaskConfig, say: Callable[[str], None] | None = None) -> Grader:
        return cls(task, workers=config.workers, seconds=config.seconds, say=say)

    def __enter__(self) -> Grader:
        for _ in range(self.workers):
            self._start_worker()
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, _: TracebackType | None) -> None:
        while not self._jobs.empty():
            self._jobs.get()
        for _worker in range(self.workers):
            self._jobs.put(None)
        with self._lock:
            left = list(self._running)
        self._stop_awaiting(left)  # after Ctrl-C or a fault: nobody will collect them
        for sentence in self.task.closing() if self.task.closing else ():
            self._say(sentence)

    def _stop_awaiting(self, jobs: Sequence[GradingJob]) -> None:
        for job in jobs:
            if job.thread is not None:
                stop_awaiting(job.thread, self._grace)

    def open_batch(self, prompts: Sequence[Prompt]) -> PendingGrades:
        return PendingGrades(self, prompts)

    def say_once(self, kind: str, sentence: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._say(sentence)

    def _start_worker(self) -> None:
        threading.Thread(target=self._work, name=f"grader of {self.task.name}", daemon=True).start()

    def submit(self, job: GradingJob) -> None:
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            with self._lock:
                job.since, job.thread = time.monotonic(), threading.current_thread()
                self._running.append(job)
            self._judge(job)
            with self._lock:
                if job.closed:
                    return  # another worker has replaced this one
                self._running.remove(job)
                self._hung = 0
                job.ended.set()

    def _judge(self, job: GradingJob) -> None:
        try:
            for grade in iter_grades(self.task, job.prompt, job.completions):
                if not self._record(job, grade):
                    return
        except BaseException as fault:  # it belongs to whoever collects; here it would only end the thread
            with self._lock:
                job.fault = None if job.closed else fault

    def _record(self, job: GradingJob, grade: Grade) -> bool:
        with self._lock:
            if not job.closed:
                job.grades.append(grade)
                job.since = time.monotonic()
            return not job.closed

    def wait(self, job: GradingJob) -> None:
        """Wait until the job has ended or timed out."""
        while not job.ended.is_set():
            with self._lock:
                soonest = min((running.since for running in self._running), default=math.inf) + self.seconds
            left = min(soonest - time.monotonic(), self.seconds)
            job.ended.wait(max(left, 0.0) + 1e-3)
            self.give_up_late_ones()

    def give_up_late_ones(self) -> None:
        """Close jobs that timed out. Raises TaskError after MAX_HUNG_GROUPS in a row."""
        now = time.monotonic()
        with self._lock:
            late = [job for job in self._running if now - job.since > self.seconds]
            for job in late:
                self._running.remove(job)
                self._hung += 1
                note = {"grader": f"took longer than {self.seconds:g} s"}
                missing = len(job.completions) - len(job.grades)
                job.grades += [Grade(math.nan, formed=False, notes=note)] * missing
                job.closed = True
                job.ended.set()
                self._start_worker()
            hung = self._hung
        self._stop_awaiting(late)
        if late and hung >= MAX_HUNG_GROUPS:
            raise TaskError(
                f"The grader of task {self.task.name} took longer than {self.seconds:g} s on {hung} groups in a row, "
                f"the last of them prompt {late[-1].prompt.id}. Mend what hangs, or raise --task.seconds."
            )


class PendingGrades:
    """The groups of one rollout: submitted as they end, collected in the order of their prompts."""

    def __init__(self, grader: Grader, prompts: Sequence[Prompt]) -> None:
        self.grader, self.prompts = grader, prompts
        self._jobs: dict[int, GradingJob] = {}

    def submit(self, index: int, completions: tuple[Completion, ...]) -> None:
        """Queue a finished group for grading: the engine's `ready` callback."""
        self._jobs[index] = job = GradingJob(self.prompts[index], completions)
        self.grader.submit(job)
        self.grader.give_up_late_ones()

    def collect(self, answers: Sequence[tuple[Completion, ...]]) -> list[tuple[Grade, ...]]:
        """Wait for all grades and return them. Raises the first error in the order of the prompts."""
        for index, completions in enumerate(answers):
            if index not in self._jobs:  # an engine need not tell of every prompt
                self.submit(index, completions)
        graded = []
        for index in range(len(answers)):
            job = self._jobs[index]
            self.grader.wait(job)
            if job.fault is not None:
                raise job.fault
            graded.append(tuple(job.grades))
        return graded
