"""The installed versions, and the version that began a run: another version may not be able to read it."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # minigrpo itself, run from its source folder
        return None


def this_version() -> str:
    return installed("minigrpo") or "unknown"


@cache
def hash_code() -> str:
    """Return the SHA-256 of this package's own source: names and contents of its modules, in sorted order."""
    here, total = Path(__file__).parent, hashlib.sha256()
    for file in sorted(here.rglob("*.py")):
        total.update(f"{file.relative_to(here).as_posix()}\n".encode())
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def begun_by_another(recipe: Path) -> str:
    """Return a sentence that names both versions where another one began this unreadable recipe's run; else ""."""
    try:
        then = json.loads(recipe.with_name("made.json").read_text(encoding="utf-8"))["minigrpo"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""  # a recipe without a run, or a run whose record cannot be trusted
    if recipe.name != "recipe.yaml" or not isinstance(then, str) or then == this_version():
        return ""
    shown = "".join(c for c in then[:20] if c.isprintable())
    return (
        f"{recipe.parent} was begun by minigrpo {shown}; this is {this_version()}, which cannot read its recipe. Go on "
        f"with {shown}, or begin another run: --run runs/NAME. "
    )
