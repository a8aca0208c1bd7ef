"""Make a run of an adapter that another tool trained, so that every later stage can prove, judge and publish it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe
from minigrpo.errors import ArtifactError, RecipeError
from minigrpo.runs.lock import run_lock
from minigrpo.runs.manifest import check_folder, create_run, settle_base, stamp
from minigrpo.runs.rundir import RunDir, complete_folder, find_run, write_json


def adopt(
    folder: Path,
    run: RunDir,
    *,
    base: str | None = None,
    recipe: str | None = None,
    knobs: Iterable[tuple[str, Any]] = (),
) -> RunDir:
    """Copy a PEFT adapter's folder into a new run, whose recipe names its base and the task that it is judged by.

    `base`: where the base lies; None: as the adapter says. `recipe`: whose task and limits count; `knobs`: over it.
    Raises RecipeError where no task is named, ArtifactError where the adapter is part of a run already or is damaged,
    ModelError where it does not fit the base.
    """
    from minigrpo.delivery.artifacts.merged_weights import weight_changes
    from minigrpo.models.adapter import read_adapter
    from minigrpo.models.loading import open_tokenizer
    from minigrpo.models.model_files import find_base

    knobs = list(knobs)
    with run_lock(run):
        if (found := find_run(folder)) is not None:
            raise ArtifactError(f"{folder} belongs to the run {found.run.path} already.")
        if recipe is None and all(name != "task.name" for name, _ in knobs):
            raise RecipeError("No task was named. Say by which it is judged: --task.name NAME, or --recipe RECIPE")
        adapter = read_adapter(folder)
        named = base or adapter.base
        if named is None:
            raise ArtifactError(f"{folder / 'adapter_config.json'} names no base model. Say which: --base MODEL")
        theirs = load_recipe(recipe, [*_facts(adapter.config, named), *knobs])
        check_folder(theirs, run, resume=False)
        files = find_base(theirs.model.path, revision=theirs.model.revision, seed=theirs.seed)
        weight_changes(files, adapter)
        tokenizer = None if (folder / "tokenizer_config.json").is_file() else open_tokenizer(files.folder)
        create_run(theirs, run)
        settle_base(run, theirs.model.path, files.fingerprint())
        _copy_adapter(folder, run, theirs, tokenizer)
    return run


def _facts(config: Mapping[str, Any], base: str) -> list[tuple[str, Any]]:
    """Return what a recipe can say of the adapter, as knobs."""
    facts: list[tuple[str, Any]] = [
        ("model.path", base),
        ("lora.rank", config["r"]),
        ("lora.alpha", config["lora_alpha"]),
    ]
    targets = config.get("target_modules")
    if isinstance(targets, list) and targets:
        facts.append(("lora.targets", ",".join(sorted(targets))))
    return [*facts, ("lora.rslora", bool(config.get("use_rslora")))]


def _copy_adapter(folder: Path, run: RunDir, recipe: Recipe, tokenizer: Any) -> None:
    """Copy the adapter. `tokenizer`: the base's, where it lies without one: whoever loads it looks for it there."""
    with complete_folder(run.adapter) as draft:
        for file in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
            if file.suffix != ".pt" and file.name != "made.json":  # the optimizer's state, and another tool's stamps
                shutil.copy2(file, draft / file.name)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        write_json(draft / "made.json", {"made": stamp("adopt", recipe)})
