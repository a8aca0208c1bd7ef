"""Show the progress of long work: a callback that reports it, and a bar or plain lines in the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console

from minigrpo.ui.heartbeat import Heartbeat
from minigrpo.ui.live import duration, panel_fits, time_left
from minigrpo.ui.screen import Screen


class Report(Protocol):
    """Reports how far a long piece of work is; `note` is a few words: the loss, the accuracy so far."""

    def __call__(self, done: int, total: int = ..., note: str = ...) -> None: ...


def no_report(done: int, total: int = 0, note: str = "") -> None:
    """Report nothing."""


def part_of(report: Report, before: int, total: int) -> Report:
    """Return a report for a part of a piece of work, of which so much was done before."""
    return lambda done, _=0, note="": report(before + done, total, note)


@contextmanager
def stage(name: str, total: int, console: Console | None = None) -> Iterator[Report]:
    """Show the progress of a long piece of work: `with stage("evaluate", 500) as report: report(done, total, note)`."""
    console = console or Screen(stderr=True)
    began = time.monotonic()
    if not panel_fits(console):
        lines = _StageLines(name, total, console)
        with lines.heartbeat:
            yield lines.report
    else:
        with _bar(console) as bar:
            task = bar.add_task(name, total=total or None, note="")

            def report(done: int, total: int = total, note: str = "") -> None:
                bar.update(task, completed=done, total=total or None, note=note)

            yield report
    console.print(f"{name}: done in {duration(time.monotonic() - began)}", highlight=False, markup=False)


def _bar(console: Console) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        transient=True,
    )


class _StageLines:
    """Prints plain lines for logs: the first report, then one every few seconds, and one while nothing is reported."""

    def __init__(self, name: str, total: int, console: Console, every: float = 5.0) -> None:
        self.name, self.total, self.console, self.every = name, total, console, every
        self.began = self.counted_from = self.last = time.monotonic()
        self.words = ""
        self.heartbeat = Heartbeat(self._show_elapsed)

    def report(self, done: int, total: int | None = None, note: str = "") -> None:
        now, total, first = time.monotonic(), self.total if total is None else total, not self.words
        if not done:
            self.counted_from = now  # what came before the first of them says nothing of how long the others take
        count = f"{done}/{total}" if total else str(done or "")
        if not first:
            count = ", ".join(filter(None, (count, time_left(done, total, now - self.counted_from))))
        self.words = "  ".join(filter(None, (count, note)))
        if self.words and (first or now - self.last >= self.every):
            self._print(self.words)

    def _show_elapsed(self) -> None:
        elapsed = f"{duration(time.monotonic() - self.began)} so far"
        self._print(f"{self.words}, {elapsed}" if self.words else elapsed)

    def _print(self, words: str) -> None:
        self.console.print(f"{self.name}: {words}", highlight=False, markup=False, soft_wrap=True)
        self.last = time.monotonic()
        self.heartbeat.touch()
