"""What a run leaves for the eye: one line per step in metrics.jsonl, one per group in groups.jsonl, and the terminal.

Both files only grow; a checkpoint remembers how long they were (`positions`), and a resumed run cuts them back to that
length (`rewind`), so that no step stands there twice.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console

from minigrpo.display import Board, Lines, Pulse, View, board_fits, duration
from minigrpo.errors import ArtifactError
from minigrpo.rundir import RunDir, sync
from minigrpo.types import Group


class Report(Protocol):
    """How long work tells where it is; `note` is a few words: the loss, the accuracy so far."""

    def __call__(self, done: int, total: int = ..., note: str = ...) -> None: ...


class Track:
    """The record of one run, written as it happens. Use as a context manager: the display lives in between.

    `step` counts finished steps, from 1. Progress goes to stderr, so that a command's result alone is on stdout.
    """

    def __init__(
        self, run: RunDir, total_steps: int, *, show_samples: bool = False, console: Console | None = None
    ) -> None:
        self.run = run
        self.total_steps = total_steps
        self.show_samples = show_samples
        self._console = console or Console(stderr=True)
        view = Board if board_fits(self._console) else Lines
        self._view: View = view(self._console, total_steps)
        self._pulse = Pulse()

    def __enter__(self) -> Track:
        self._pulse = Pulse(rewards=tuple(_past_rewards(self.run.metrics)), since=time.monotonic())
        self._view.open(self._pulse)
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, _: TracebackType | None) -> None:
        self._view.close()

    def record(
        self,
        step: int,
        metrics: Mapping[str, float],
        groups: Sequence[Group],
        advantages_PG: Sequence[Sequence[float]],
    ) -> None:
        """Write down step number `step`, and show it."""
        # Groups first: whoever sees a step in metrics.jsonl finds its groups.
        rows = [_group_row(step, group, row_G) for group, row_G in zip(groups, advantages_PG, strict=True)]
        _append(self.run.groups, rows)
        _append(self.run.metrics, [{"step": step, **metrics}])
        self._pulse = self._pulse.after(step, metrics, groups, _sample(groups) if self.show_samples else None)
        self._view.show(self._pulse)

    def say(self, text: str) -> None:
        """A remark for the person who watches; it stands above the display."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def positions(self) -> dict[str, int]:
        """Length of both files in bytes, on the disk itself: what a checkpoint stores."""
        return {path.name: _synced_length(path) for path in (self.run.metrics, self.run.groups)}

    def rewind(self, positions: Mapping[str, int]) -> None:
        """Cut both files back to what a checkpoint stored; {} empties them. Touches nothing unless both can be cut."""
        lengths = {path: positions.get(path.name, 0) for path in (self.run.metrics, self.run.groups)}
        for path, length in lengths.items():
            _check(path, length)
        for path, length in lengths.items():
            if path.exists():
                os.truncate(path, length)


@contextmanager
def stage(name: str, total: int, console: Console | None = None) -> Iterator[Report]:
    """Progress of any long work: `with stage("evaluate", 500) as report: report(done, total, note)`."""
    console = console or Console(stderr=True)
    began = time.monotonic()
    if not board_fits(console):
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
    """Plain lines for logs: the first report, then one every few seconds; the end is told by `stage`."""
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


def _group_row(step: int, group: Group, advantages_G: Sequence[float]) -> dict[str, Any]:
    return {
        "step": step,
        "prompt": group.prompt.id,
        "messages": group.prompt.messages,
        "target": group.prompt.target,
        "completions": [
            {
                "text": completion.text,
                "tokens": len(completion.token_ids),
                "finish": completion.finish,
                "reward": grade.reward,
                "parts": grade.parts,
                "formed": grade.formed,
                "solved": grade.solved,
                "advantage": advantage,
            }
            for completion, grade, advantage in zip(group.completions, group.grades, advantages_G, strict=True)
        ],
    }


def _sample(groups: Sequence[Group]) -> str | None:
    """The first completion of the step: any choice by reward would flatter."""
    if not groups:
        return None
    group = groups[0]
    question = str(group.prompt.messages[-1].get("content", "")) if group.prompt.messages else ""
    return f"{question.strip()}\n→ {group.completions[0].text.strip()}  [reward {group.grades[0].reward:g}]"


def _clean(value: Any) -> Any:
    """A value that JSON can hold: NaN and infinity are null there, and an array is its numbers."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return _clean(value.tolist()) if hasattr(value, "tolist") else str(value)


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """ASCII JSON: model output may hold lone surrogates, or line separators that split a line for some readers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="ascii", newline="\n") as stream:
        stream.writelines(json.dumps(_clean(row), allow_nan=False) + "\n" for row in rows)


def _synced_length(path: Path) -> int:
    if not path.exists():
        return 0
    sync(path)
    return path.stat().st_size


def _check(path: Path, length: int) -> None:
    """The first `length` bytes must be there, and be whole lines."""
    if length == 0:
        return
    advice = "Start anew in another folder with --run, or remove the checkpoint that says so."
    if not path.exists():
        raise ArtifactError(f"{path} is missing, but the checkpoint was saved with {length} bytes of it. {advice}")
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        stream.seek(max(length - 1, 0))
        whole = stream.read(1) == b"\n"
    if size < length:
        raise ArtifactError(f"{path} has {size} bytes, but the checkpoint was saved with {length}. {advice}")
    if not whole:
        raise ArtifactError(f"{path} was changed since the checkpoint was saved (byte {length} ends no line). {advice}")


def _past_rewards(path: Path) -> Iterator[float]:
    """The curve of a resumed run begins where the run began. A line that a crash cut short is passed over."""
    if not path.exists():
        return
    with path.open("rb") as stream:
        for line in stream:
            try:
                reward = json.loads(line).get("reward")
            except (ValueError, AttributeError):
                continue
            if isinstance(reward, int | float):
                yield float(reward)
