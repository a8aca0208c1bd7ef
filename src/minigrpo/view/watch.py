"""Follow a run from another terminal, by its files alone: a panel that redraws itself, or a line now and then."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import isfinite
from typing import Any, Literal

from rich.console import Console

from minigrpo.errors import ArtifactError, command_line
from minigrpo.runs.lock import holder
from minigrpo.runs.logger import read_events
from minigrpo.runs.rundir import RunDir
from minigrpo.ui.group_lines import GROUP_EVERY, pick_group
from minigrpo.ui.live import WINDOW, LivePanel, Snapshot, duration, panel_fits
from minigrpo.ui.plain_text import printable
from minigrpo.ui.screen import Screen
from minigrpo.view.library import OpenRun, is_run

Outcome = Literal["ended", "killed", "failed", "waits"]
EXIT_CODES: dict[Outcome, int] = {"ended": 0, "killed": 1, "failed": 1, "waits": 3}
LOOK = 1.0
"""Seconds between looks at the run's files."""
LINE_EVERY = 10.0
"""Seconds between lines, where the output is no terminal."""
SILENT_STEPS, SILENT_SECONDS = 5, 60.0
"""A step that takes so many times as long as usual, and so many seconds, is told of."""
AFTER_TRAINING = ("evaluate", "check", "merge", "export", "question")
"""What `minigrpo run` does after training, by the names in seconds.json."""
TRAINING = "training"
GOES_ON = ("run", "quickstart")
"""Commands that go on after training."""
KNOWN_EVENTS = ("began", "resumed", "ended", "stopped", "failed")


@dataclass(frozen=True, slots=True)
class Status:
    """What a run is doing: a `phase` in words, and how it came to rest, where no process works on it any more."""

    phase: str
    outcome: Outcome | None = None


def watch_run(
    run: RunDir,
    console: Console | None = None,
    *,
    wait: bool = False,
    look: float = LOOK,
    line_every: float = LINE_EVERY,
) -> Outcome:
    """Show a run until no process works on it any more, and return how it came to rest.

    `wait`: go on where it waits for somebody to begin or resume it. Raise ArtifactError where there is no run.
    """
    if not (wait or is_run(run.path) or run.lock.is_file()):
        raise ArtifactError(f"{run.path} holds no run. Name a run's folder; to wait until there is one, add --wait.")
    console = console or Screen()
    if (outcome := _await_recipe(run, console, wait, look)) is not None:
        return outcome
    opened = OpenRun(run.path.absolute().name, run.path)
    total, fits = last_step(opened) or 0, panel_fits(console)
    display = _Panel(console, opened.name, total) if fits else _Lines(console, opened.name, total, line_every)
    news = _News(opened)
    try:
        while True:
            status = status_of(opened)
            told = news.look(status)
            display.show(status, news.snapshot, told)
            if status.outcome and _is_over(status, wait):
                return status.outcome
            time.sleep(look)
    finally:
        display.close()


def _is_over(status: Status, wait: bool) -> bool:
    return status.outcome is not None and not (wait and status.outcome == "waits")


def _await_recipe(run: RunDir, console: Console, wait: bool, look: float) -> Outcome | None:
    """Wait until there is a run to be opened; return the outcome where nobody works on it, and `wait` is not asked."""
    said = ""
    while not is_run(run.path):
        status = status_of(OpenRun(run.path.absolute().name, run.path))
        if status.phase != said:
            _say(console, f"{run.path.absolute().name} {status.phase}")
            said = status.phase
        if _is_over(status, wait):
            return status.outcome
        time.sleep(look)
    return None


def status_of(run: OpenRun) -> Status:
    """Tell from its lock, its events and its stages' files what a run is doing."""
    run.metrics.refresh()
    events = [event for event in read_events(run.run) if event["event"] in KNOWN_EVENTS]
    last = events[-1] if events else None
    state = run.state()
    if state == "running":
        return Status(_phase(run, None if last is None else str(last["event"])))
    if state == "killed" or (last is not None and last["event"] in ("began", "resumed")):
        return Status(f"was killed {_at(run)}: its process is gone. {_go_on(run)}", "killed")
    if last is not None and last["event"] == "failed":
        return Status(f"failed {_at(run)}: {last.get('text') or 'nobody noted why'}", "failed")
    if (last is not None and last["event"] == "ended") or _is_done(run):
        return Status(f"ended {_at(run)}", "ended")
    return Status(f"waits {_at(run)}: no process works on it. {_go_on(run)}", "waits")


def last_step(run: OpenRun) -> int | None:
    """Return the step after which the run's training ends; None where its recipe cannot be read."""
    return run.recipe.train.last_step if run.recipe else None


def _is_done(run: OpenRun) -> bool:
    """Tell whether a run of before events were noted has done its last step."""
    return bool(len(run.metrics)) and run.metrics.steps[-1] == last_step(run)


def _at(run: OpenRun) -> str:
    steps = run.metrics.steps
    of = last_step(run)
    return (f"after step {steps[-1]}" if steps else "before its first step") + (f" of {of}" if of else "")


def _go_on(run: OpenRun) -> str:
    if not run.run.exists():
        return "It is not begun yet."
    return f"It goes on with: {command_line('minigrpo', 'run', run.run.path, '--resume')}"


def _phase(run: OpenRun, event: str | None) -> str:
    """Say in words what the process that holds the run is at."""
    found = holder(run.run)
    verb = _verb(found.command) if found else ""
    done = run.read(run.run.path / "seconds.json")
    if event in ("began", "resumed"):
        return TRAINING
    if event in ("ended", "stopped", "failed") and verb in GOES_ON:
        return next((name for name in AFTER_TRAINING if name not in done), "publishing, or the last lines")
    if verb and verb not in (*GOES_ON, "train"):
        return verb
    if run.run.preflight.is_file() or "preflight" in done:
        return "before the first step: after preflight"
    return "before the first step: opening the model, preflight"


def _verb(command: str) -> str:
    """Return the command's name: "train" of `minigrpo train my.yaml`."""
    words = command.split()[1:2]
    return words[0] if words and not words[0].startswith("-") else ""


# ---- what is new of it


class _News:
    """What a run has become since the last look: its state as a display takes it, and sentences to be told once."""

    def __init__(self, run: OpenRun) -> None:
        self._run = run
        self._generation, self._alarms = run.metrics.generation, 0
        self._changed = time.monotonic()
        self._told_silence = False
        self.snapshot = Snapshot(since=time.monotonic())

    def look(self, status: Status) -> list[str]:
        """Update `snapshot`, and return the sentences."""
        log = self._run.metrics
        if log.generation != self._generation:  # a resume cut the log back: its alarms are told anew
            self._generation, self._alarms = log.generation, 0
        if len(log) and log.steps[-1] != self.snapshot.step:
            self._changed, self._told_silence = time.monotonic(), False
            self.snapshot = self._snapshot()
        alarms = log.alarms()
        told = [f"step {mark['step']}: {mark['text']}" for mark in alarms[self._alarms :]]
        told = [f"{len(told)} alarms so far, the newest: {told[-1]}"] if not self._alarms and len(told) > 1 else told
        self._alarms = len(alarms)
        return told if status.outcome else [*told, *self._silence(status)]

    def _snapshot(self) -> Snapshot:
        log = self._run.metrics
        seconds = [value if isfinite(value) else 0.0 for value in log.columns.get("seconds", ())]
        figures = {name: column[-1] for name, column in log.columns.items() if isfinite(column[-1])}
        return Snapshot(
            step=log.steps[-1],
            rewards=tuple(value for value in log.columns.get("reward", ()) if isfinite(value)),
            metrics=figures,
            group=self._group(log.steps[-1]),
            since=time.monotonic() - sum(seconds),
            stamps=tuple(accumulate(seconds[-WINDOW:], initial=0.0)) if seconds else (),
        )

    def _group(self, step: int) -> Mapping[str, Any] | None:
        shown = self.snapshot.group
        if shown is not None and step < shown["step"] + GROUP_EVERY:
            return shown
        index = self._run.groups.refresh()
        groups = (index.group(line) for line in index.lines_of_step(step))
        return pick_group([group for group in groups if group is not None])

    def _silence(self, status: Status) -> list[str]:
        """Say once that a step lasts far longer than usual, which may mean that its process hangs."""
        stamps, silent = self.snapshot.stamps, time.monotonic() - self._changed
        usual = (stamps[-1] - stamps[0]) / (len(stamps) - 1) if len(stamps) > 1 else 0.0
        late = status.phase == TRAINING and silent > max(SILENT_SECONDS, SILENT_STEPS * usual)
        if not late or self._told_silence:
            return []
        self._told_silence = True
        return [f"Nothing new for {duration(silent)}; a step took {duration(usual)}. Its process is there."]


# ---- how it is shown


class _Lines:
    """Prints a line of the newest step, at most one every few seconds, with what there is to tell besides."""

    def __init__(self, console: Console, name: str, total: int, every: float) -> None:
        self._console, self._name, self._total, self._every = console, name, total, every
        self._printed = -every
        self._shown: tuple[int, str] | None = None
        self._waiting: list[str] = []

    def show(self, status: Status, snapshot: Snapshot, told: list[str]) -> None:
        self._waiting += told
        now = (snapshot.step, status.phase)
        is_due = status.outcome is not None or time.monotonic() >= self._printed + self._every
        if not is_due or (now == self._shown and not self._waiting):
            return
        is_new = snapshot.step > 0 and (self._shown is None or self._shown[0] != snapshot.step)
        lines = [self._line(status, snapshot)] if is_new or not status.outcome else []
        ending = [f"{self._name} {status.phase}"] if status.outcome else []
        _say(self._console, *self._waiting, *lines, *ending)
        self._waiting, self._shown, self._printed = [], now, time.monotonic()

    def _line(self, status: Status, snapshot: Snapshot) -> str:
        step = f"step {snapshot.step}" + (f"/{self._total}" if self._total else "")
        phase = "" if status.outcome or status.phase == TRAINING else status.phase
        left = snapshot.time_left(self._total) if status.phase == TRAINING else ""
        return "  ".join(filter(None, (step, *snapshot.facts(), left, phase)))

    def close(self) -> None:
        """Leave what stands there."""


class _Panel:
    """Redraws a panel in place."""

    def __init__(self, console: Console, name: str, total: int) -> None:
        self._console, self._name = console, name
        self._panel = LivePanel(console, total)
        self._is_open = False

    def show(self, status: Status, snapshot: Snapshot, told: list[str]) -> None:
        self._panel.set_activity(status.phase)
        self._panel.show(snapshot)
        if not self._is_open:
            self._panel.open(snapshot)
            self._is_open = True
        _say(self._console, *told)
        if status.outcome:
            self.close()
            _say(self._console, f"{self._name} {status.phase}")

    def close(self) -> None:
        self._panel.close()


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(printable(line), highlight=False, markup=False, soft_wrap=True)
