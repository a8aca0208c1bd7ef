"""What is rehearsed: each trial runs in a process of its own (stage.py) and returns what the tests compare, as JSON.

A trial opens the model on the CPU and on a pretended card through the code that a run goes through: `model.device`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from minigrpo.config.schema import AdapterConfig, ModelConfig, Recipe, RolloutConfig
from minigrpo.models.policy import Policy, open_policy
from minigrpo.rollouts.engines import kv_cache
from minigrpo.rollouts.engines.registry import open_engine
from minigrpo.types import Completion, Engine, Sampling
from tests.helpers.models import rendered, set_lora
from tests.rehearsal.cards import Card, pretended
from tests.rehearsal.device import PretendedGpu
from tests.rehearsal.graphs import Graph, Stream

PROMPTS = (1, 40, 23, 7, 12)
ADAPTER_SIZES = (0.02, 0.05)
"""Entries of B in the two rounds of a trial: as after a few hundred steps of training, twice."""


def engine_recipe(folder: str, device: str, dtype: str, engine: str) -> Recipe:
    return Recipe(
        model=ModelConfig(path=folder, device=device, dtype=dtype),  # type: ignore[arg-type]
        lora=AdapterConfig(rank=8, alpha=16),
        rollout=RolloutConfig(engine=engine, temperature=0.9),  # type: ignore[arg-type]
    )


def said(engine: Engine, *, limit: int = 40, n: int = 4, seed: int = 7) -> list[list[list[Any]]]:
    """Return token ids, log-probabilities and finish of each completion."""
    answers = engine.generate(rendered(PROMPTS), n, Sampling(0.9, limit, seed))
    return [[[list(c.token_ids), list(c.logprobs), c.finish] for c in own] for own in answers]


def two_rounds(recipe: Recipe) -> tuple[Policy, Engine, list[Any]]:
    """Sample, change the weights as an update would, and sample again: a recorded graph must read the new ones."""
    policy = open_policy(recipe)
    set_lora(policy, ADAPTER_SIZES[0])
    engine = open_engine(policy, recipe)
    rounds = []
    for size in ADAPTER_SIZES:
        set_lora(policy, size)
        engine.update(policy)
        rounds.append(said(engine))
    return policy, engine, rounds


def engines(card: Card, guard: Path, *, folder: str, engine: str, dtype: str = "auto") -> dict[str, Any]:
    """Sample on the card and, with the same kind of engine and the same number type, on the CPU."""
    with pretended(card, guard) as gpu:
        policy, opened, on_gpu = two_rounds(engine_recipe(folder, "auto", dtype, engine))
        counted = {"launches": gpu.launches.total(), "replays": sum(graph.replays for graph in Graph.made)}
        name, device, kind = type(opened).__name__, str(policy.device), str(policy.dtype).removeprefix("torch.")
    kinds = {"NativeEngine": "native", "SlotEngine": "slots", "TransformersEngine": "transformers"}
    kv_cache.MAX_COPIED_BYTES = 0  # prompts are shared on a GPU: in 16 bit the other layout rounds otherwise
    _, _, on_cpu = two_rounds(engine_recipe(folder, "cpu", kind, kinds[name]))
    return {"engine": name, "device": device, "dtype": kind, "gpu": on_gpu, "cpu": on_cpu, **counted}


TRIALS: dict[str, Callable[..., Any]] = {"engines": engines}
