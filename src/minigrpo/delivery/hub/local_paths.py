"""Places of this machine in what is published: hidden where we write the text, found where files go as they are."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minigrpo.delivery.hub.client import RepoFile
from minigrpo.errors import MinigrpoError

OWN_FILES = ("recipe.yaml", "made.json", "base.json", "adapter_config.json", "check.json", "comparison.json")
"""Names of files of a run that may name a place of this machine because we wrote it there."""
LOCAL_PATH = re.compile(r"""(?<![\w.:/\\])(?:~?/|[A-Za-z]:[\\/])[^\s"'<>|,;]+""")


def hide_paths(value: Any) -> Any:
    """Return a recipe's values with paths cut to their last part and addresses removed: they are of this machine."""
    if isinstance(value, dict):
        return {name: hide_paths(each) for name, each in value.items()}
    if isinstance(value, list):
        return [hide_paths(each) for each in value]
    if not isinstance(value, str):
        return value
    if "://" in value:
        return "(an address)"
    local = re.match(r"(/|~|\.{1,2}[\\/]|[A-Za-z]:[\\/])", value)
    return re.split(r"[\\/]", value.rstrip("\\/"))[-1] if local and " " not in value else value


def refuse_local_paths(items: Sequence[RepoFile], command: str) -> None:
    """Raise MinigrpoError where a file names a place of this machine. `command`: what publishes it all the same."""
    found = {each.name: paths for each in items if (paths := paths_of_this_machine(each))}
    if not found:
        return
    name, paths = next(iter(found.items()))
    more = f", and so do {len(found) - 1} more files" if len(found) > 1 else ""
    raise MinigrpoError(
        f"{name} names {paths[0]}, a place of this machine{more}. Nothing was sent. They would go as they are, because "
        f"the chain has their hashes. If whoever sees the repository may read that: {command} --with-paths"
    )


def paths_of_this_machine(file: RepoFile) -> list[str]:
    """Return the paths in one of our own files that are places of this machine: they exist, or lie in its home.

    Other files hold texts of a data set and a model, where a path says nothing of this machine.
    """
    if Path(file.name).name not in OWN_FILES:
        return []
    data = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
    home = os.path.expanduser("~")
    found = dict.fromkeys(LOCAL_PATH.findall(data.decode("utf-8", errors="replace")))
    return [path for path in found if path.startswith(("~", f"{home}{os.sep}")) or os.path.lexists(_place(path))]


def _place(path: str) -> str:
    """Return the path without what a task's name has behind it: FILE.py:NAME."""
    return path if os.path.lexists(path) else path.rpartition(":")[0] or path
