"""Show the progress of long work: a callback that reports it, and a bar or plain lines in the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console

from minigrpo.ui.live import duration, panel_fits


class Report(Protocol):
    """Reports how far a long piece of work is; `note` is a few words: the loss, the accuracy so far."""

    def __call__(self, done: int, total: int = ..., note: str = ...) -> None: ...


def no_report(done: int, total: int = 0, note: str = "") -> None:
    """Report nothing."""


@contextmanager
def stage(name: str, total: int, console: Console | None = None) -> Iterator[Report]:
    """Show the progress of a long piece of work: `with stage("evaluate", 500) as report: report(done, total, note)`."""
    console = console or Console(stderr=True)
    began = time.monotonic()
    if not panel_fits(console):
        yield _stage_lines(name, total, console)
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


def _stage_lines(name: str, total: int, console: Console, every: float = 5.0) -> Report:
    """Print plain lines for logs: the first report, then one every few seconds; `stage` prints the end."""
    began = last = time.monotonic()
    first = True

    def report(done: int, total: int = total, note: str = "") -> None:
        nonlocal last, first
        now = time.monotonic()
        if first or now - last >= every:
            left = f", {duration((now - began) / done * (total - done))} left" if 0 < done < total and not first else ""
            words = f"{name}: {done}/{total}{left}{f'  {note}' if note else ''}"
            console.print(words, highlight=False, markup=False, soft_wrap=True)
            last, first = now, False

    return report
