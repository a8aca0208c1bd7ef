"""Read a model's config: its text architecture, and whether a prompt leaves room for an answer. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minigrpo.errors import ModelError
from minigrpo.models.chat_template import render
from minigrpo.types import Prompt, Rendered

CAUSAL_DECODERS = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3", "ministral3"})
"""Decoders whose every layer is plain causal attention through transformers' attention interface, with or without a
sliding window: tokens affect one another through attention alone. So siblings can share a row, and the native engine's
decoder can run the model."""
MULTIMODAL_WRAPPERS = frozenset({"mistral3"})
"""Models for text and images that pass text unchanged to the text model inside them."""


def text_config(config: Any) -> Any:
    """Return the config of the text model: of a multimodal wrapper, that of the model inside it."""
    return config.get_text_config() if config.model_type in MULTIMODAL_WRAPPERS else config


def context_length(model: Any) -> int | None:
    """Return how many tokens the model can read at once; None where its config does not say (a recurrent model)."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None


def check_room(prompts: Sequence[Rendered], max_tokens: int, context: int | None) -> None:
    """Raise ModelError for the first prompt whose longest answer would not fit the context."""
    for asked in prompts if context is not None else ():
        room = context - len(asked.ids)  # type: ignore[operator]
        if room < max_tokens:
            cure = f"Lower --rollout.max_tokens to {room} or leave it out." if room > 0 else "Leave it out."
            size = sum(len(str(message["content"]).encode("utf-8", "replace")) for message in asked.prompt.messages)
            if room <= 0 and len(asked.ids) > size:  # a token is a byte at least
                cure += f" Its messages are {size} bytes: the rest is what the chat template adds."
            raise ModelError(
                f"Prompt {asked.prompt.id} has {len(asked.ids)} tokens: with rollout.max_tokens {max_tokens} that is "
                f"more than the {context} that the model can read. {cure}"
            )


def check_prompts(prompts: Sequence[Prompt], tokenizer: Any, max_tokens: int, model: Any) -> None:
    """Run `check_room` before a run begins, on every prompt that it may use."""
    check_room([render(tokenizer, prompt) for prompt in prompts], max_tokens, context_length(model))


def longest_prompt(prompts: Sequence[Prompt], tokenizer: Any) -> int:
    """Return the length of the longest prompt in tokens."""
    return max(len(render(tokenizer, prompt).ids) for prompt in prompts)
