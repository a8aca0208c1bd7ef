"""vLLM's limits: which LoRA ranks it takes, and what must be added to a model's config. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes as --max-lora-rank."""


def vllm_max_lora_rank(rank: int) -> int | None:
    """Return the smallest --max-lora-rank that fits an adapter of this rank; None where none does."""
    return next((room for room in VLLM_LORA_RANKS if room >= rank), None)


def vllm_config_overrides(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return vLLM's `hf_overrides` for a config that we do not write; {} where it lacks nothing.

    Nested as the config is: vLLM goes into a text model's own config and changes nothing else there.
    """
    inner = vllm_config_overrides(config["text_config"]) if config.get("text_config") else {}
    return {**ministral3_attention_scale(config), **({"text_config": inner} if inner else {})}


def without_attention_scale(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a merged model's config without vLLM's attention scale, which its base's config may have or lack."""
    inner = {"text_config": without_attention_scale(config["text_config"])} if config.get("text_config") else {}
    return {name: value for name, value in {**config, **inner}.items() if name != "llama_4_scaling"}


def ministral3_attention_scale(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return Ministral 3's attention scale beyond the original context, as vLLM reads it; {} if present."""
    rope = config.get("rope_parameters") or {}
    beta = rope.get("llama_4_scaling_beta")
    if beta is None or config.get("llama_4_scaling") is not None:
        return {}
    begins = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]  # as transformers does
    return {"llama_4_scaling": {"beta": beta, "original_max_position_embeddings": begins}}
