"""Which version this is, and which one began a run: what one version wrote, another may not be able to read."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # minigrpo itself, run from its source folder
        return None


def this_version() -> str:
    return installed("minigrpo") or "unknown"


def begun_by_another(recipe: Path) -> str:
    """Of a run's own recipe.yaml that cannot be read: both versions, where another one began the run; else nothing."""
    try:
        then = json.loads(recipe.with_name("made.json").read_text(encoding="utf-8"))["minigrpo"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""  # a recipe without a run, or a run whose own words cannot be trusted
    if recipe.name != "recipe.yaml" or not isinstance(then, str) or then == this_version():
        return ""
    shown = "".join(c for c in then[:20] if c.isprintable())
    return (
        f"{recipe.parent} was begun by minigrpo {shown}; this is {this_version()}, which cannot read its recipe. Go on "
        f"with {shown}, or begin another run: --run runs/NAME. "
    )
