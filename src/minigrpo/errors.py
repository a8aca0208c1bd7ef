"""Errors that the user can mend. Their messages are sentences: what, where, and what to do next.

    MinigrpoError            shown as its message alone, exit code 2
    ├── RecipeError, ModelError, TaskError, ArtifactError, SandboxError, DivergenceError
    └── RankLostError        exit code 75
        └── SharedPassError

Anything else that escapes is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import shlex
from pathlib import Path


class MinigrpoError(Exception):
    """Base class of errors that the user can mend.

    `exit_code`: of a command that it ends. `entry`: what docs/troubleshooting.md says of it, by its anchor; one of the
    whole class, unless the raiser names another.
    """

    exit_code = 2
    entry = "any-other-error"

    def __init__(self, *args: object, entry: str | None = None) -> None:
        super().__init__(*args)
        if entry:
            self.entry = entry


class RecipeError(MinigrpoError):
    """A knob is misspelled, out of range or contradicts another."""

    entry = "a-recipe-is-refused"


class ModelError(MinigrpoError):
    """A model folder is missing, broken, or lacks what training needs."""

    entry = "a-model-is-refused"


class TaskError(MinigrpoError):
    """A task is unknown, empty, or its file cannot be used."""

    entry = "a-task-is-refused"


class ArtifactError(MinigrpoError):
    """A file of a run is missing, stale, damaged or in the way."""

    entry = "a-file-of-a-run-is-refused"


class SandboxError(MinigrpoError):
    """Model-written programs cannot be run safely, or at all, on this machine."""

    entry = "programs-cannot-be-run"


class DivergenceError(MinigrpoError):
    """Training produced numbers that cannot be used, again and again."""

    entry = "training-exploded"


class RankLostError(MinigrpoError):
    """One of the processes that train a run together is gone or stands still."""

    exit_code = 75  # sysexits.h: try again
    entry = "a-rank-was-lost"


class SharedPassError(RankLostError):
    """Memory ran out on one of the processes, in a pass that all share."""


MORE = "More: docs/troubleshooting.md#"


def more_at(entry: str) -> str:
    """Name an entry of the troubleshooting page, by its anchor: the line that follows an error."""
    return f"{MORE}{entry}"


def last_words(stderr: str) -> str:
    """Return the last line that a command wrote, its error where it ended with one; "" where it wrote nothing."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.startswith(MORE)]
    return lines[-1] if lines else ""


def command_line(*words: object) -> str:
    """Write a command that can be pasted into a POSIX shell, whatever the names in it hold:
    command_line("minigrpo", "merge", run.path, "--force").

    A path that begins with a dash is written so that no program takes it for an option.
    """
    texts = (f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word) for word in words)
    return shlex.join(texts)


def install_hint(extra: str) -> str:
    """Name the pip line that installs an optional part of the package."""
    return f"pip install 'minigrpo[{extra}]'"
