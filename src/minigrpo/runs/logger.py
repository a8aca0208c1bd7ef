"""Log a run: one line per step in metrics.jsonl, one per group in groups.jsonl, and the terminal. Read the logs back.

events.jsonl tells when training began, went on and ended; only appended to, it is no part of what is resumed. Within a
session the two others only grow. A checkpoint stores their lengths and a hash of that much (`positions`); a
resumed run cuts them back to that length (`rewind`), so that no step is logged twice and none has changed. The hash
grows with the files: a process reads each byte once, from memory that the system still has.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from rich.console import Console

from minigrpo.errors import ArtifactError
from minigrpo.runs.rundir import RunDir, make_folder, sync, writing
from minigrpo.runs.trackers.tracking import Tracking
from minigrpo.types import Group
from minigrpo.ui.group_lines import GROUP_EVERY, pick_group
from minigrpo.ui.live import LivePanel, PlainLog, ProgressView, Snapshot, panel_fits
from minigrpo.ui.screen import Screen
from minigrpo.utils.json_values import json_ready

Event = Literal["began", "resumed", "ended", "stopped", "failed"]
"""stopped: somebody asked for it. A process that is killed notes nothing: then no end follows its beginning."""

METRICS_COLUMNS = ("step",)
GROUP_COLUMNS = ("step", "completions")
"""What a line of each file holds at least."""
EVENT_COLUMNS = ("event", "step")


class RunLogger:
    """Writes the logs of one run and shows its progress. A context manager: it opens and closes the display.

    `step` counts finished steps, from 1. Progress goes to stderr, so that a command's result alone is on stdout.
    """

    def __init__(
        self,
        run: RunDir,
        total_steps: int,
        *,
        show_samples: bool = False,
        console: Console | None = None,
        tracking: Tracking | None = None,
    ) -> None:
        self._tracking = tracking
        self.run = run
        self.total_steps = total_steps
        self.show_samples = show_samples
        self._console = console or Screen(stderr=True)
        view = LivePanel if panel_fits(self._console) else PlainLog
        self._view: ProgressView = view(self._console, total_steps)
        self._snapshot = Snapshot()
        self._prefixes = {path: Prefix(path) for path in (run.metrics, run.groups)}

    def __enter__(self) -> RunLogger:
        self._snapshot = Snapshot(rewards=tuple(_logged_rewards(self.run)), since=time.monotonic())
        self._view.open(self._snapshot)
        if self._tracking is not None:
            self._tracking.begin(_logged_steps(self.run), self.say, partial(read_metrics, self.run))
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, _: TracebackType | None) -> None:
        if self._tracking is not None:
            self._tracking.end()
        self._view.close()

    def record(
        self,
        step: int,
        metrics: Mapping[str, float],
        groups: Sequence[Group],
        advantages_PG: Sequence[Sequence[float]],
    ) -> None:
        """Log step number `step` and show it."""
        # Groups first: whoever sees a step in metrics.jsonl finds its groups.
        rows = [group_row(step, group, row_G) for group, row_G in zip(groups, advantages_PG, strict=True)]
        _append(self.run.groups, rows)
        _append(self.run.metrics, [{"step": step, **metrics}])
        self._snapshot = self._snapshot.after(step, metrics, groups, _sample(groups) if self.show_samples else None)
        if step % GROUP_EVERY == 1 or self._snapshot.group is None:
            self._snapshot = replace(self._snapshot, group=pick_group(rows))
        self._view.show(self._snapshot)
        if self._tracking is not None:
            self._tracking.send(step, metrics, rows)

    def say(self, text: str) -> None:
        """Print a sentence for the person who watches, above the display."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def note(self, event: Event, step: int, text: str = "") -> None:
        """Note in events.jsonl that training began, went on or ended after so many steps, with the time of day."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        _append(self.run.events, [{"time": now, "event": event, "step": step, "text": text}])

    def set_activity(self, words: str) -> None:
        """Say what the step is doing now; the display shows it."""
        self._view.set_activity(words)

    def positions(self) -> dict[str, dict[str, Any]]:
        """Return length in bytes and SHA-256 of both files, after fsync: what a checkpoint stores."""
        return {path.name: prefix.whole() for path, prefix in self._prefixes.items()}

    def rewind(self, positions: Mapping[str, Mapping[str, Any]]) -> None:
        """Cut both files back to what a checkpoint stored; {} empties them. Change nothing unless both can be cut.

        Raise ArtifactError where the part to keep has changed.
        """
        kept = {path: positions.get(path.name, {"bytes": 0}) for path in self._prefixes}
        self._prefixes = {path: Prefix(path) for path in kept}
        for path, then in kept.items():
            self._prefixes[path].check(then)
        for path, then in kept.items():
            if path.exists():
                with writing(path):
                    os.truncate(path, then["bytes"])


class RankLog:
    """The log of a rank that does not lead: it writes and shows nothing, and says only what is this rank's own."""

    def __init__(self, run: RunDir, rank: int) -> None:
        self.run, self.rank = run, rank

    def __enter__(self) -> RankLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, _: TracebackType | None) -> None:
        pass

    def say(self, text: str) -> None:
        Screen(stderr=True).print(f"rank {self.rank}: {text}", highlight=False, markup=False, soft_wrap=True)

    def record(
        self, step: int, metrics: Mapping[str, float], groups: Sequence[Group], advantages_PG: Sequence[Sequence[float]]
    ) -> None:
        pass

    def note(self, event: Event, step: int, text: str = "") -> None:
        pass

    def set_activity(self, words: str) -> None:
        pass

    def positions(self) -> dict[str, dict[str, Any]]:
        return {}

    def rewind(self, positions: Mapping[str, Mapping[str, Any]]) -> None:
        pass


class Prefix:
    """The hash of the beginning of a growing file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._length = 0
        self._hash = hashlib.sha256()

    def whole(self) -> dict[str, Any]:
        """Return length and hash of the whole file, after fsync."""
        if self.path.exists():
            with writing(self.path):
                sync(self.path)
        return self._upto(self.path.stat().st_size if self.path.exists() else 0)

    def check(self, then: Mapping[str, Any]) -> None:
        """Raise ArtifactError where the first bytes are not what they were when a checkpoint stored them."""
        length = then["bytes"]
        if length == 0:
            return
        advice = "Remove the newest checkpoint to go back to the one before it, or start anew elsewhere with --run."
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < length:
            what = f"has {size} bytes" if self.path.exists() else "is missing"
            raise ArtifactError(f"{self.path} {what}, but the checkpoint was saved with {length}. {advice}")
        if not self.matches(then):
            raise ArtifactError(f"{self.path} was changed since the checkpoint was saved. {advice}")

    def matches(self, then: Mapping[str, Any]) -> bool:
        """Return whether the file begins with what a checkpoint stored: so many bytes, of that hash."""
        return then["bytes"] == 0 or (self.path.is_file() and self._upto(then["bytes"]) == then)

    def _upto(self, length: int) -> dict[str, Any]:
        if length < self._length:
            self._length, self._hash = 0, hashlib.sha256()
        if length > self._length:
            with self.path.open("rb") as stream:
                stream.seek(self._length)
                while block := stream.read(min(1 << 20, length - self._length)):
                    self._hash.update(block)
                    self._length += len(block)
        length = self._length  # less, where the file is shorter
        return {"bytes": length, "sha256": self._hash.hexdigest()}


def _logged_steps(run: RunDir) -> int:
    """Return the last step that was logged, 0 before the first."""
    newest = (metrics_of_line(line) for line in lines_backwards(run.metrics))
    return next((int(row["step"]) for row in newest if row is not None), 0)


def _logged_rewards(run: RunDir) -> Iterator[float]:
    """Yield the rewards logged so far, so that the curve of a resumed run begins at its first step."""
    for row in read_metrics(run):
        if isinstance(row.get("reward"), int | float):
            yield float(row["reward"])


def group_row(step: int, group: Group, advantages_G: Sequence[float]) -> dict[str, Any]:
    return {
        "step": step,
        "prompt": group.prompt.id,
        "messages": group.prompt.messages,
        "target": group.prompt.target,
        "ids": hash_ids(group),
        "completions": [
            {
                **({"opening": completion.opening} if completion.opening else {}),
                **({"sampler": completion.sampler} if completion.sampler else {}),
                "text": completion.text,
                "tokens": len(completion.token_ids),
                "finish": completion.finish,
                "reward": grade.reward,
                "parts": grade.parts,
                "formed": grade.formed,
                "solved": grade.solved,
                "advantage": advantage,
                **({"notes": grade.notes} if grade.notes else {}),
            }
            for completion, grade, advantage in zip(group.completions, group.grades, advantages_G, strict=True)
        ],
    }


def hash_ids(group: Group) -> str:
    """Return the SHA-256 of a group's token ids, those of the prompt and of each completion: the sample itself."""
    ids = [list(group.prompt_ids), *(list(completion.token_ids) for completion in group.completions)]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def _sample(groups: Sequence[Group]) -> str | None:
    """Return the step's first completion as text: any choice by reward would flatter."""
    if not groups:
        return None
    group = groups[0]
    question = str(group.prompt.messages[-1].get("content", "")) if group.prompt.messages else ""
    return f"{question.strip()}\n→ {group.completions[0].text.strip()}  [reward {group.grades[0].reward:g}]"


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows as ASCII JSON: model output may hold lone surrogates, or separators at which some readers split.

    A full disk can leave half a line; `rewind` cuts it off.
    """
    make_folder(path.parent)
    with writing(path), path.open("a", encoding="ascii", newline="\n") as stream:
        stream.writelines(row_text(row) + "\n" for row in rows)


def row_text(row: Mapping[str, Any]) -> str:
    """Write a row as its line in the log, without its end."""
    return json.dumps(json_ready(row), allow_nan=False)


def read_metrics(run: RunDir, *, strict: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the figures of each step, in order; nothing where there is no log.

    Skip a line that holds no step (a crash cut it short, or it is just being written); `strict` raises ArtifactError
    for it.
    """
    return _rows(run.metrics, METRICS_COLUMNS, _lines(run.metrics), strict)


def last_logged_step(run: RunDir) -> int:
    """Return the newest step in the log, whether a checkpoint holds it or not; 0 where there is none."""
    return max((int(row["step"]) for row in read_metrics(run)), default=0)


def read_groups(run: RunDir, *, newest_first: bool = False, strict: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the logged groups, each with its completions; `newest_first` reads no more of the file than is taken.

    Lines that hold no group are treated as in `read_metrics`.
    """
    lines = lines_backwards(run.groups) if newest_first else _lines(run.groups)
    return _rows(run.groups, GROUP_COLUMNS, lines, strict)


def read_events(run: RunDir) -> Iterator[dict[str, Any]]:
    """Yield what `RunLogger.note` noted, in order; nothing for runs of versions that noted nothing."""
    return _rows(run.events, EVENT_COLUMNS, _lines(run.events), strict=False)


def metrics_of_line(line: bytes) -> dict[str, Any] | None:
    """Read one line of metrics.jsonl; None where it holds no step."""
    return _row(line, METRICS_COLUMNS)


def group_of_line(line: bytes) -> dict[str, Any] | None:
    """Read one line of groups.jsonl; None where it holds no group."""
    return _row(line, GROUP_COLUMNS)


def _rows(path: Path, columns: Sequence[str], lines: Iterable[bytes], strict: bool) -> Iterator[dict[str, Any]]:
    for line in filter(bytes.strip, lines):
        row = _row(line, columns)
        if row is not None:
            yield row
        elif strict:
            raise ArtifactError(
                f"{path} is damaged in the line that begins with {line[:40].decode(errors='replace')!r}. Begin another "
                "run: --run runs/NAME"
            )


def _row(line: bytes, columns: Sequence[str]) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or brackets without end
        return None
    return row if isinstance(row, dict) and all(column in row for column in columns) else None


def _lines(path: Path) -> Iterator[bytes]:
    if path.is_file():
        with path.open("rb") as stream:
            yield from stream


def system_message(run: RunDir) -> str:
    """Return the system message used in training: without it the model is asked something else."""
    try:
        first = next(read_groups(run), {})["messages"][0]
        return str(first["content"]) if first["role"] == "system" else ""
    except (LookupError, TypeError):
        return ""


def lines_backwards(path: Path, block: int = 1 << 16) -> Iterator[bytes]:
    """Yield the lines from the last to the first, without their ends."""
    if not path.is_file():
        return
    begun: list[bytes] = []  # the pieces of a line whose beginning is not yet read, the last piece first
    with path.open("rb") as stream:
        place = stream.seek(0, os.SEEK_END)
        while place:
            size = min(block, place)
            place = stream.seek(place - size)
            first, *others = stream.read(size).split(b"\n")
            if others:
                yield b"".join(reversed([*begun, others[-1]]))
                yield from reversed(others[:-1])
                begun = []
            begun.append(first)
    yield b"".join(reversed(begun))
