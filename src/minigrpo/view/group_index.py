"""Find groups in a groups.jsonl that may be half a gigabyte and still grow, without ever holding the file.

The index keeps where each line begins, with its step and its prompt: it reads the file once, in blocks, and later only
what was appended. Lines are parsed when somebody asks for them; what is needed of each completion is kept, compactly.
"""

from __future__ import annotations

import json
import re
import threading
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

from minigrpo.runs.logger import group_of_line
from minigrpo.view.growing_file import GrowingFile

HEAD = re.compile(rb'\{"step": (\d{1,9}), "prompt": ("(?:[^"\\]|\\.)*")')
"""How the logger begins a line. A line that begins otherwise is parsed as a whole."""
MOST_FACTS = 16_384
"""Groups whose facts are kept: some 40 MB."""
LONGEST_LABEL = 40

FORMED, RIGHT, CUT, CHEATS = 1, 2, 4, 8


@dataclass(frozen=True, slots=True)
class Facts:
    """What is kept of a group. Arrays hold one value a completion; `parts` one array for each reward function.

    `flags`: FORMED, RIGHT, CUT, CHEATS as bits. `words`: the same number for the same text, but for case and
    punctuation. `labels`: short texts of the target, by which prompts can be pooled.
    """

    step: int
    prompt: str
    rewards: array[float]
    advantages: array[float]
    tokens: array[int]
    flags: bytes
    parts: dict[str, array[float]]
    words: array[int]
    labels: dict[str, str]

    def __len__(self) -> int:
        return len(self.rewards)


class GroupIndex:
    """The lines of one groups.jsonl, numbered from 0. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        self._file = GrowingFile(path)
        self.generation = 0
        self._forget()

    @property
    def path(self) -> Path:
        return self._file.path

    def _forget(self) -> None:
        self._begins, self._lengths = array("Q"), array("L")
        self._steps = array("L")
        self._names: list[str] = []
        self._by_step: dict[int, list[int]] = {}
        self._by_prompt: dict[str, list[int]] = {}
        self._facts: dict[int, Facts | None] = {}
        self.generation += 1

    def refresh(self) -> GroupIndex:
        """Read what was appended since the last time; begin anew where the file is another one."""
        with self._lock:
            for begin, line in self._file.appended(self._forget):
                self._add(begin, line)
        return self

    def _add(self, begin: int, line: bytes) -> None:
        head = _head(line)
        if head is None:
            return
        step, prompt = head
        here = len(self._begins)
        if prompt not in self._by_prompt:
            self._names.append(prompt)
        self._by_step.setdefault(step, []).append(here)
        self._by_prompt.setdefault(prompt, []).append(here)
        self._begins.append(begin)
        self._lengths.append(len(line))
        self._steps.append(step)

    def __len__(self) -> int:
        return len(self._begins)

    @property
    def steps(self) -> list[int]:
        return sorted(self._by_step)

    @property
    def prompts(self) -> list[str]:
        """The prompts' names, in the order in which they were first drawn."""
        return self._names

    def step_of(self, line: int) -> int:
        return self._steps[line]

    def lines_of_step(self, step: int) -> Sequence[int]:
        return self._by_step.get(step, ())

    def lines_of_steps(self, first: int, last: int) -> list[int]:
        """Return the lines of all steps from `first` to `last`, both included."""
        return [line for step in self.steps if first <= step <= last for line in self._by_step[step]]

    def lines_of_prompt(self, prompt: str) -> Sequence[int]:
        return self._by_prompt.get(prompt, ())

    def raw(self, line: int) -> bytes:
        """Read one line as it is; nothing where it is no longer there: a resumed run cut the file back meanwhile."""
        with self._lock:
            if not 0 <= line < len(self):
                return b""
            return self._at(line)

    def _at(self, line: int) -> bytes:
        with self.path.open("rb") as stream:
            stream.seek(self._begins[line])
            return stream.read(self._lengths[line])

    def group(self, line: int) -> dict[str, Any] | None:
        """Parse one line; None where it is damaged, or is no longer there."""
        return group_of_line(self.raw(line))

    def facts(self, line: int) -> Facts | None:
        """Return what is kept of a group; None where its line is damaged."""
        with self._lock:
            if line not in self._facts:
                while len(self._facts) >= MOST_FACTS:
                    del self._facts[next(iter(self._facts))]
                group = self.group(line)
                self._facts[line] = _facts(group) if group else None
            return self._facts[line]

    def all_facts(self, lines: Sequence[int]) -> Iterator[tuple[int, Facts]]:
        for line in lines:
            if (found := self.facts(line)) is not None:
                yield line, found


def _head(line: bytes) -> tuple[int, str] | None:
    """Return step and prompt of a line, parsing no more of it than its beginning where that is the logger's."""
    with suppress(ValueError):
        if found := HEAD.match(line):
            return int(found[1]), str(json.loads(found[2]))
    group = group_of_line(line)
    if group is None or not isinstance(group["step"], int) or not 0 <= group["step"] < 10**9:
        return None
    return group["step"], str(group.get("prompt", ""))


def _facts(group: dict[str, Any]) -> Facts | None:
    completions = group["completions"]
    if not isinstance(completions, list) or not all(isinstance(each, dict) for each in completions):
        return None
    names = sorted({name for each in completions for name in _mapping(each.get("parts"))})
    target = _mapping(group.get("target"))
    return Facts(
        step=int(group["step"]),
        prompt=str(group.get("prompt", "")),
        rewards=array("d", [number(each.get("reward")) for each in completions]),
        advantages=array("d", [number(each.get("advantage")) for each in completions]),
        tokens=array("L", [max(0, int(number(each.get("tokens"), 0))) for each in completions]),
        flags=bytes(map(_flags, completions)),
        parts={
            name: array("d", [number(_mapping(each.get("parts")).get(name)) for each in completions]) for name in names
        },
        words=array(
            "L", [zlib.crc32(plain_words(str(each.get("text"))).encode(errors="replace")) for each in completions]
        ),
        labels={name: text for name, text in target.items() if isinstance(text, str) and len(text) <= LONGEST_LABEL},
    )


def _flags(completion: dict[str, Any]) -> int:
    facts = (
        completion.get("formed"),
        completion.get("solved"),
        completion.get("finish") == "length",
        cheats(completion),
    )
    return sum(bit for bit, holds in zip((FORMED, RIGHT, CUT, CHEATS), facts, strict=True) if holds)


def cheats(completion: dict[str, Any]) -> bool:
    """Return whether a reward function said so: a note with cheating in its name, or a part so named below 0."""
    noted = any("cheat" in name for name in _mapping(completion.get("notes")))
    parts = _mapping(completion.get("parts"))
    return noted or any("cheat" in name and number(value, 0) < 0 for name, value in parts.items())


def number(value: Any, missing: float = nan) -> float:
    """Return a number as it is, and `missing` for anything else."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else missing


def plain_words(text: str) -> str:
    """Return a text without case and punctuation: texts that differ in nothing else are near-duplicates."""
    return " ".join(re.findall(r"\w+", text.lower())) or text


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
