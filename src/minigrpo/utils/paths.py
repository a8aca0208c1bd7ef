"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

from minigrpo.errors import ArtifactError


def user_path(name: str | Path) -> Path:
    """Return the path that a user's text names, with ~ for a home; whether anything is there is another question.

    Raise ArtifactError where the system will not even look there: pathlib would raise an error of its own later, for a
    name that is too long, say. (It also raises one for the home of a user who is not here, which names nothing.)
    """
    path = Path(os.path.expanduser(name))
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as fault:  # ValueError: a NUL character in it
        text = str(path) if len(str(path)) <= 100 else f"{str(path)[:100]} ..."
        raise ArtifactError(f"{text!r} cannot be looked at: {getattr(fault, 'strerror', None) or fault}.") from None
    return path
