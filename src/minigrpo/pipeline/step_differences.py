"""Compare a step that was done again with what the run logged of it: the first difference, in the order of causes.

A prompt that differs gives other answers, an answer another reward, a reward another advantage, and all of them other
figures. So the draws of all groups are compared before any reward, and rewards before advantages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import IO, Any, Literal

from minigrpo.errors import ArtifactError
from minigrpo.runs.rundir import RunDir
from minigrpo.ui.plain_text import printable

Kind = Literal["checkpoint", "log", "prompt", "draw", "reward", "advantage", "metric", "weights", "optimizer", "state"]
CLOCK = ("seconds", "tokens_per_second", "memory_gb", "sent_bytes")
"""Figures of a step, or the first part of their names, that depend on the clock and on what else the machine does."""
SHOWN = 60
"""Characters of a text that a sentence quotes."""


@dataclass(frozen=True, slots=True)
class Difference:
    """What a step did otherwise than its run says. `what`: a sentence; `prompt` and `sibling`, from 1, where it is of
    one answer; `logged` and `replayed`: the two values."""

    kind: Kind
    step: int
    what: str
    prompt: str | None = None
    sibling: int | None = None
    logged: Any = None
    replayed: Any = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class LoggedStep:
    """A step as the run logged it: its figures (None where they are missing) and groups, with the lines themselves."""

    metrics: Mapping[str, Any] | None
    groups: tuple[Mapping[str, Any], ...]
    lines: tuple[bytes, ...]


class LoggedSteps:
    """The logged steps one after the other, from a checkpoint's positions on: no more than a step is in memory."""

    def __init__(self, metrics: IO[bytes], groups: IO[bytes]) -> None:
        self._metrics, self._groups = metrics, groups
        self._held: bytes | None = None

    def take(self, step: int) -> LoggedStep:
        """Return the next step; whatever the log says in its place where that is damaged."""
        row = row_of(self._metrics.readline())
        lines: list[bytes] = []
        while line := self._held or self._groups.readline():
            self._held = None
            if row_of(line).get("step", step) != step:
                self._held = line
                break
            lines.append(line.rstrip(b"\n"))
        return LoggedStep(row if row.get("step") == step else None, tuple(map(row_of, lines)), tuple(lines))


@contextmanager
def open_logged(run: RunDir, start: int, positions: Mapping[str, Mapping[str, Any]]) -> Iterator[LoggedSteps]:
    """Open both logs behind step `start`, of whose checkpoint these are the positions. Raises ArtifactError where one
    is missing."""
    for path in (run.metrics, run.groups):
        if not path.is_file():
            raise ArtifactError(f"{path} is missing, so there is nothing to compare a step with.")
    with run.metrics.open("rb") as metrics, run.groups.open("rb") as groups:
        for stream, path in ((metrics, run.metrics), (groups, run.groups)):
            _seek(stream, positions.get(path.name, {"bytes": 0})["bytes"], start)
        yield LoggedSteps(metrics, groups)


def _seek(stream: IO[bytes], position: int, start: int) -> None:
    """Go to the first line of step `start` + 1: to its position or, where lines before it were changed, by reading."""
    before = row_of(_line_before(stream, position)).get("step")
    stream.seek(position)
    if before == start and row_of(stream.readline()).get("step") == start + 1:
        stream.seek(position)
        return
    stream.seek(place := 0)
    while start and (line := stream.readline()):
        logged = row_of(line).get("step")
        if isinstance(logged, int) and logged > start:
            break
        place += len(line)
    stream.seek(place)


def _line_before(stream: IO[bytes], position: int) -> bytes:
    """Return the line that ends right before this place; b"" where none does."""
    place, found = position, b""
    while place and b"\n" not in found[:-1]:
        size = min(1 << 16, place)
        place = stream.seek(place - size)
        found = stream.read(size) + found
    return found[:-1].rpartition(b"\n")[2] if found.endswith(b"\n") else b""


def row_of(line: bytes) -> dict[str, Any]:
    """Read a line of a log; {} where it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def first_difference(
    step: int, then: LoggedStep, metrics: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> Difference | None:
    """Return the first difference of a step; None where every byte that it logged is the same but the clock's.

    `metrics`, `groups`: what was logged now, read back from JSON.
    """
    if then.metrics is None or len(then.groups) != len(groups):
        had = "no figures" if then.metrics is None else f"{len(then.groups)} groups"
        return Difference("log", step, f"The log has {had} of this step, which has {len(groups)} groups.")
    for compare in (_prompt, _draw, _reward, _advantage, _rest):
        for old, new in zip(then.groups, groups, strict=True):
            if old != new and (found := compare(step, old, new)) is not None:
                return found
    for line, old, new in zip(then.lines, then.groups, groups, strict=True):
        kept = {name: value for name, value in new.items() if name in old}
        if line != json.dumps(kept).encode():
            return Difference("log", step, "its line says the same in other bytes.", old["prompt"])
    return _metric(step, then.metrics, metrics)


def _prompt(step: int, old: Mapping[str, Any], new: Mapping[str, Any]) -> Difference | None:
    for name in ("prompt", "messages", "target"):
        if old.get(name) != new.get(name):
            what = f"another prompt: its {name if name != 'prompt' else 'id'} was {_quote(old.get(name))}, is "
            what += f"{_quote(new.get(name))}. The data, or what draws from it, is another."
            return Difference("prompt", step, what, str(old.get("prompt")), None, old.get(name), new.get(name))
    return None


def _draw(step: int, old: Mapping[str, Any], new: Mapping[str, Any]) -> Difference | None:
    for sibling, one, two in _siblings(old, new):
        before, now = _opened(one), _opened(two)
        if before != now:
            pairs = zip(before, now, strict=False)
            same = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(before), len(now)))
            what = f"another answer: the first {same} characters are the same, then {_quote(before[same:])} was "
            what += f"sampled, and now {_quote(now[same:])}."
            return Difference("draw", step, what, old["prompt"], sibling, before, now)
        for name in ("tokens", "finish"):
            if one.get(name) != two.get(name):
                what = f"the same text in another form: {name} was {one.get(name)}, is {two.get(name)}."
                return Difference("draw", step, what, old["prompt"], sibling, one.get(name), two.get(name))
    if len(old.get("completions", ())) != len(new["completions"]):
        what = f"{len(old.get('completions', ()))} answers are logged, and {len(new['completions'])} were sampled."
        return Difference("draw", step, what, old["prompt"])
    if "ids" in old and old["ids"] != new["ids"]:
        return Difference("draw", step, "the texts are the same, their token ids are not.", old["prompt"])
    return None


def _opened(completion: Mapping[str, Any]) -> str:
    return f"{completion.get('opening', '')}{completion.get('text', '')}"


def _reward(step: int, old: Mapping[str, Any], new: Mapping[str, Any]) -> Difference | None:
    for sibling, one, two in _siblings(old, new):
        names = ("reward", "parts", "formed", "solved")
        differing = [name for name in names if one.get(name) != two.get(name)]
        if differing:
            parts = [name for name in differing if name != "parts"]
            parts += [f"parts.{name}" for name in _changed_keys(one.get("parts") or {}, two.get("parts") or {})]
            pairs = ", ".join(f"{name} was {_at(one, name)}, is {_at(two, name)}" for name in parts)
            what = f"another grade for the same answer {_quote(_opened(two))}: {pairs}."
            return Difference("reward", step, what, old["prompt"], sibling, one.get("reward"), two.get("reward"))
    return None


def _advantage(step: int, old: Mapping[str, Any], new: Mapping[str, Any]) -> Difference | None:
    for sibling, one, two in _siblings(old, new):
        before, now = one.get("advantage"), two.get("advantage")
        if before != now:
            what = f"the same rewards, another advantage: was {before}, is {now}{_by(before, now)}."
            return Difference("advantage", step, what, old["prompt"], sibling, before, now)
    return None


def _rest(step: int, old: Mapping[str, Any], new: Mapping[str, Any]) -> Difference | None:
    for sibling, one, two in _siblings(old, new):
        if names := _changed_keys(one, two):
            what = f"{', '.join(names)}: was {_quote(one.get(names[0]))}, is {_quote(two.get(names[0]))}."
            return Difference("log", step, what, old["prompt"], sibling, one.get(names[0]), two.get(names[0]))
    names = [name for name in _changed_keys(old, new) if not (name == "ids" and "ids" not in old)]
    return Difference("log", step, f"its line differs in {', '.join(names)}.", old["prompt"]) if names else None


def _metric(step: int, old: Mapping[str, Any], new: Mapping[str, Any]) -> Difference | None:
    names = [name for name in _changed_keys(old, new) if name.partition("/")[0] not in CLOCK]
    if not names:
        return None
    name, others = names[0], names[1:]
    before, now = old.get(name), new.get(name)
    what = f"the same groups, another figure: {name} was {before}, is {now}{_by(before, now)}"
    what += f"; so are {', '.join(others)}." if others else "."
    return Difference("metric", step, what, None, None, before, now)


def _siblings(
    old: Mapping[str, Any], new: Mapping[str, Any]
) -> Iterator[tuple[int, Mapping[str, Any], Mapping[str, Any]]]:
    pairs = zip(old.get("completions", ()), new["completions"], strict=False)
    return ((sibling, one, two) for sibling, (one, two) in enumerate(pairs, 1))


def _changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [name for name in {**old, **new} if old.get(name) != new.get(name)]


def _at(completion: Mapping[str, Any], name: str) -> Any:
    section, _, part = name.partition(".")
    value = completion.get(section)
    return value.get(part) if part and isinstance(value, Mapping) else value


def _by(before: Any, now: Any) -> str:
    """Say how far two numbers are apart, relative to the larger."""
    numbers = [value for value in (before, now) if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < 2 or not any(numbers):
        return ""
    return f" (by {abs(before - now) / max(map(abs, numbers)):.1e} of it)"


def _quote(value: Any) -> str:
    text = printable(value if isinstance(value, str) else json.dumps(value, default=str))
    return repr(text[:SHOWN]) + (" ..." if len(text) > SHOWN else "")
