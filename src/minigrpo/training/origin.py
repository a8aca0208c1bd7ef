"""What a run begins from, as hashes in its chain: recipe, code, base, warm-up, data, the task's own files, machine.

Not covered: files that a task's file imports or reads by itself, and what lies behind a network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from minigrpo.config.load import task_files
from minigrpo.config.schema import Recipe, TaskConfig
from minigrpo.runs.chain import append_link, read_chain
from minigrpo.runs.manifest import read_sealed
from minigrpo.runs.rundir import RunDir, digest
from minigrpo.training.checkpoint import Machine
from minigrpo.types import Prompt
from minigrpo.versions import hash_code, this_version


def record_origin(run: RunDir, recipe: Recipe, data: str, machine: Machine, *, after: int) -> None:
    """Add what this session begins from to the chain, unless the chain says the same already."""
    now = origin(run, recipe, data) | {"machine": asdict(machine)}
    begun = [link.facts for link in read_chain(run) if link.kind == "begin"]
    if not begun or {name: value for name, value in begun[-1].items() if name != "after"} != now:
        append_link(run, "begin", {"after": after, **now})


def origin(run: RunDir, recipe: Recipe, data: str | None) -> dict[str, Any]:
    """Return the hashes of what the run begins from now. `data`: `hash_prompts` of the training prompts."""
    return {
        "recipe": read_sealed(run.made)["sha256"] if run.made.is_file() else None,
        "minigrpo": this_version(),
        "code": hash_code(),
        "base": read_sealed(run.base)["sha256"] if run.base.is_file() else None,
        "warmup": digest(run.warmup) if recipe.warmup.steps and run.warmup.is_dir() else None,
        "data": data,
        "task": hash_task_files(recipe.task),
    }


def hash_prompts(prompts: Iterable[Prompt]) -> str:
    """Return the SHA-256 of prompts: ids, messages and targets, in their order."""
    total = hashlib.sha256()
    for prompt in prompts:
        row = [prompt.id, [dict(message) for message in prompt.messages], prompt.target]
        # An object has no text of its own that is the same in every process: its type stands for it.
        total.update(json.dumps(row, default=lambda value: type(value).__name__, skipkeys=True).encode())
    return total.hexdigest()


def hash_task_files(config: TaskConfig) -> dict[str, str]:
    """Hash the files and folders of this machine that the task's knobs name, by their names without the folders."""
    return {path.name: digest(path) for path in task_files(config)}
