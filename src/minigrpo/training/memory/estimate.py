"""Plan memory from the model's config and tokenizer alone, before weights are loaded and without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from minigrpo.config.schema import Recipe
from minigrpo.errors import ModelError
from minigrpo.models.chat_template import check_tokenizer, set_template_options
from minigrpo.models.context_window import longest_prompt
from minigrpo.models.limits import check_trainable
from minigrpo.models.loading import TORCH_DTYPES, open_config, open_tokenizer, pick_device, pick_dtype
from minigrpo.models.policy import check_full_training
from minigrpo.rollouts.groups import prompts_of
from minigrpo.tasks.registry import open_task
from minigrpo.training.memory.machine import gpu_of_size, this_device
from minigrpo.training.memory.meta import UnplannableError
from minigrpo.training.memory.planner import Device, Plan, make_plan
from minigrpo.utils.paths import user_path
from minigrpo.utils.process import no_progress_bars


@dataclass(frozen=True, slots=True)
class ModelSketch:
    """A model's config and tokenizer, without its weights."""

    config: Any
    tokenizer: Any


def forecast(recipe: Recipe, gpu_memory: float | None = None) -> Plan:
    """Return the plan of a whole run on a GPU of `gpu_memory` GB, or on this machine.

    Raises ModelError where the model's config or tokenizer cannot be read, its memory depends on its weights, or its
    number type is too coarse for train.full.
    """
    check_full_training(recipe)
    sketch = read_sketch(recipe)
    device = _gpu(recipe, gpu_memory) if gpu_memory else _this_machine(recipe, sketch.config)
    prompt = longest_prompt(prompts_of(open_task(recipe), "train"), sketch.tokenizer)
    try:
        return make_plan(sketch.config, recipe, device, prompt)
    except UnplannableError as fault:
        raise ModelError(
            f"the memory of {recipe.model.path} cannot be told from its config: its shapes depend on values ({fault}). "
            "A run measures it instead"
        ) from None


def _gpu(recipe: Recipe, gigabytes: float) -> Device:
    """Return a GPU of that size. Weights are counted as on a GPU: bfloat16 and float16 take the same."""
    auto = torch.float32 if recipe.train.full else torch.bfloat16
    dtype = auto if recipe.model.dtype == "auto" else TORCH_DTYPES[recipe.model.dtype]
    return gpu_of_size(min(gigabytes, recipe.train.memory or gigabytes), dtype)


def _this_machine(recipe: Recipe, config: Any) -> Device:
    import peft  # noqa: F401  (what a run imports must count in what the program takes)

    device = pick_device(recipe.model.device)
    dtype = pick_dtype(recipe.model.dtype, device, config, full=recipe.train.full)
    return this_device(recipe.train, device, dtype)


def read_sketch(recipe: Recipe) -> ModelSketch:
    """Read config and tokenizer. Raises ModelError where the folder or Hub id holds no readable config or tokenizer, or
    its model cannot be trained."""
    from minigrpo.models.embedded import seedling

    path, revision = recipe.model.path, recipe.model.revision
    if seedling.is_seedling(path):
        return ModelSketch(*seedling.make_config_and_tokenizer(path, recipe.seed))
    folder = user_path(path)
    source = str(folder) if folder.exists() else path
    with no_progress_bars():
        config, tokenizer = open_config(source, revision), open_tokenizer(source, revision)
    check_trainable(config, source, revision)
    set_template_options(tokenizer, recipe.model.template)
    check_tokenizer(tokenizer)
    return ModelSketch(config, tokenizer)
