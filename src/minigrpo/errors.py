"""Errors that the user can mend. Their messages are sentences: what, where, and what to do next.

    MinigrpoError            shown as its message alone, exit code 2
    ├── RecipeError          a knob is misspelled, out of range or contradicts another
    ├── ModelError           a model folder is missing, broken, or lacks what training needs
    ├── TaskError            a task is unknown, empty, or its file cannot be used
    ├── ArtifactError        a file of a run is missing, stale, damaged or in the way
    ├── SandboxError         model-written programs cannot be run safely, or at all, on this machine
    ├── DivergenceError      training produced numbers that cannot be used, again and again
    └── RankLostError        one of the processes that train a run together is gone or stands still; exit code 75
        └── SharedPassError  memory ran out on one of them in a pass that all share

Anything else that escapes is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import shlex
from pathlib import Path


class MinigrpoError(Exception):
    """Base class of errors that the user can mend. `exit_code`: of a command that it ends."""

    exit_code = 2


class RecipeError(MinigrpoError):
    pass


class ModelError(MinigrpoError):
    pass


class TaskError(MinigrpoError):
    pass


class ArtifactError(MinigrpoError):
    pass


class SandboxError(MinigrpoError):
    pass


class DivergenceError(MinigrpoError):
    pass


class RankLostError(MinigrpoError):
    exit_code = 75  # sysexits.h: try again


class SharedPassError(RankLostError):
    pass


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
