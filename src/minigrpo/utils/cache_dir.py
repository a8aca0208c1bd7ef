"""Where the package keeps what it built or fetched once. No torch."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Name the folder; it need not be there yet."""
    return Path(os.environ.get("MINIGRPO_CACHE") or "~/.cache/minigrpo").expanduser()
