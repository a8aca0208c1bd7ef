"""What vLLM asks for in its own words: room for an adapter, and settings that a config may lack. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Adapter ranks that vLLM can be told to make room for."""


def lora_room(rank: int) -> int | None:
    """Give the least --max-lora-rank that holds an adapter of this rank; None where it is beyond all of them."""
    return next((room for room in LORA_RANKS if room >= rank), None)


def missing_for_vllm(config: Mapping[str, Any]) -> dict[str, Any]:
    """What vLLM's `hf_overrides` must say where the config is not ours to write; {} where it finds all it needs.

    Nested as the config is: vLLM goes into a text model's own config and changes nothing else there.
    """
    inner = missing_for_vllm(config["text_config"]) if config.get("text_config") else {}
    return {**attention_scale(config), **({"text_config": inner} if inner else {})}


def without_scale(config: Mapping[str, Any]) -> dict[str, Any]:
    """A merged model's config without what vLLM is told by it: of its base, the config may say that or not."""
    inner = {"text_config": without_scale(config["text_config"])} if config.get("text_config") else {}
    return {name: value for name, value in {**config, **inner}.items() if name != "llama_4_scaling"}


def attention_scale(config: Mapping[str, Any]) -> dict[str, Any]:
    """Ministral 3's, beyond the original context, in the words in which vLLM asks for it; {} where it is said."""
    rope = config.get("rope_parameters") or {}
    beta = rope.get("llama_4_scaling_beta")
    if beta is None or config.get("llama_4_scaling") is not None:
        return {}
    begins = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]  # as transformers does
    return {"llama_4_scaling": {"beta": beta, "original_max_position_embeddings": begins}}
