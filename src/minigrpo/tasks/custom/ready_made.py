"""Rewards that need no function of yours: `judge:FILE` (a model that judges) and `classifier:FOLDER` (a reward model).

They stand for a reward function wherever one may stand: as `task.name`, as a name in FILE.py, in a list of functions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from minigrpo.errors import TaskError
from minigrpo.tasks.custom.classifier import Classifier
from minigrpo.tasks.custom.judge import Judge
from minigrpo.utils.paths import user_path

READY_MADE: dict[str, Callable[[Path], Callable[..., Any]]] = {"judge": Judge.read, "classifier": Classifier}
"""What opens the file or folder after the colon."""


def is_ready_made(value: Any) -> bool:
    return isinstance(value, str) and value.partition(":")[0] in READY_MADE and ":" in value


def open_ready_made(value: Any, folder: Path) -> Any:
    """Open `judge:FILE` or `classifier:FOLDER`, from `folder` where the path is relative; leave anything else alone.

    A list or tuple is returned with each of its places opened. Raise TaskError where the file is missing or faulty.
    """
    if isinstance(value, list | tuple):
        return [open_ready_made(one, folder) for one in value]
    if not is_ready_made(value):
        return value
    kind, _, place = value.partition(":")
    if not place:
        raise TaskError(f"{value!r} names nothing. Write judge:FILE.yaml or classifier:FOLDER.")
    return READY_MADE[kind](folder / user_path(place))
