"""The folder in which the package keeps what it built or fetched once."""

from __future__ import annotations

import os
from pathlib import Path

from minigrpo.utils.paths import user_path


def cache_dir() -> Path:
    """Return the folder's path; it need not exist yet."""
    return user_path(os.environ.get("MINIGRPO_CACHE") or "~/.cache/minigrpo")
