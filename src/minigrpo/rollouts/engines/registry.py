"""Open the rollout engine that the recipe names, or with `auto` the one that fits the architecture."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from minigrpo.config.schema import Recipe
from minigrpo.distributed.place import Place
from minigrpo.errors import ModelError, RecipeError
from minigrpo.models.limits import check_engine, has_dora
from minigrpo.types import Engine


def open_engine(policy: Any, recipe: Recipe, rows: int | None = None, *, blocks: bool = False) -> Engine:
    """Open the engine that the recipe names, sampling from the policy's current weights.

    `rows`: completions decoded side by side; None takes the recipe's number. `blocks`: spend memory on weights in
    blocks, where the engine gains by it (rollouts/engines/native.py).
    """
    from minigrpo.rollouts.engines.decoder import decoder_supports

    name = engine_name(recipe, policy.model, policy.device.type)
    if name in ("native", "slots") and not decoder_supports(policy.model):
        kind = policy.model.config.model_type
        raise RecipeError(f"rollout.engine {name} does not know the architecture {kind!r}. Use auto, or transformers")
    check_engine(policy.model, name)
    opened = {"blocks": True} if blocks and name == "native" else {}
    return ENGINES[name](policy, recipe, rows or recipe.rollout.rows, **opened)


def engine_name(recipe: Recipe, model: Any, device: str) -> str:
    """Return the recipe's engine, or the one that "auto" stands for on this kind of device (cpu, cuda ...).

    On a GPU that is `slots`: launching a small model's kernels one by one takes longer than they do. 4-bit layers stay
    with `native`: nobody has captured their kernels yet.
    """
    from minigrpo.rollouts.engines.decoder import decoder_supports

    if recipe.rollout.engine != "auto":
        return recipe.rollout.engine
    if not decoder_supports(model) or has_dora(model):
        return "transformers"
    # Captured graphs read weights at fixed addresses, and those of a sharded model come and go.
    whole = not _may_shard(recipe, Place.size_of(os.environ))
    return "slots" if device == "cuda" and recipe.model.quantize == "none" and whole else "native"


def shards(recipe: Recipe, model: Any, device: str, ranks: int) -> bool:
    """Tell whether so many ranks shard the model (distributed/shards.py).

    Only the native engine copies the weights that it samples from; others would read slices. Raise RecipeError where
    the recipe insists.
    """
    if not _may_shard(recipe, ranks):
        return False
    engine = engine_name(recipe, model, device)
    if engine != "native" and recipe.train.shard == "on":
        raise RecipeError(
            f"train.shard needs rollout.engine native, and this run samples with {engine}. Leave it at auto"
        )
    return engine == "native"


def _may_shard(recipe: Recipe, ranks: int) -> bool:
    train = recipe.train
    return ranks > 1 and train.full and train.shard != "off" and train.optimizer == "adamw"


def release_caches(engine: Engine) -> None:
    """Have an engine that keeps caches between its calls free them: `slots`. It makes new ones when it samples next.

    Whoever plans memory from what is free calls this first, because the plan counts those caches itself.
    """
    release = getattr(engine, "release_caches", None)
    if release is not None:
        release()


def stop_ids(policy: Any) -> frozenset[int]:
    """Return every token that ends an answer.

    The model's own list (chat models have several) and the tokenizer's eos.
    """
    generation = getattr(policy.model, "generation_config", None)
    listed = getattr(generation, "eos_token_id", None)
    named = [*(listed if isinstance(listed, list) else [listed]), policy.tokenizer.eos_token_id]
    ids = frozenset(int(token) for token in named if token is not None)
    if not ids:
        raise ModelError(f"neither the model nor the tokenizer at {policy.path} names an end-of-text token.")
    return ids


def _open_native(policy: Any, recipe: Recipe, rows: int, blocks: bool = False) -> Engine:
    from minigrpo.rollouts.engines.native import NativeEngine

    return NativeEngine(policy, stop_ids=sorted(stop_ids(policy)), rows=rows, blocks=blocks)


def _open_slots(policy: Any, recipe: Recipe, rows: int) -> Engine:
    from minigrpo.rollouts.engines.cuda_graph import SlotEngine

    return SlotEngine(policy, stop_ids=sorted(stop_ids(policy)), rows=rows)


def _open_transformers(policy: Any, recipe: Recipe, rows: int) -> Engine:
    from minigrpo.rollouts.engines.transformers import TransformersEngine

    return TransformersEngine(policy, stop_ids=sorted(stop_ids(policy)), rows=rows)


def _open_vllm(policy: Any, recipe: Recipe, rows: int) -> Engine:
    from minigrpo.rollouts.engines.vllm import open_vllm

    return open_vllm(policy, recipe, rows, sorted(stop_ids(policy)))


ENGINES: Mapping[str, Callable[..., Engine]] = {
    "native": _open_native,
    "slots": _open_slots,
    "transformers": _open_transformers,
    "vllm": _open_vllm,
}
