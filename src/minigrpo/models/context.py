"""What a model's config says of text: its architecture, and whether a prompt leaves room for an answer. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minigrpo.errors import ModelError
from minigrpo.models.chat_template import render
from minigrpo.types import Prompt, Rendered

MULTIMODAL_WRAPPERS = frozenset({"mistral3"})
"""Models for text and pictures that hand text to the text model inside them unchanged."""


def text_config(config: Any) -> Any:
    """The config whose model_type says what happens to text: of a wrapper, that of the text model inside it."""
    return config.get_text_config() if config.model_type in MULTIMODAL_WRAPPERS else config


def context_length(model: Any) -> int | None:
    """Tokens that the model can read at once; None where its config does not say (a recurrent model may read any)."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None


def check_room(prompts: Sequence[Rendered], max_tokens: int, context: int | None) -> None:
    """Raises ModelError for the first prompt whose longest answer would not fit."""
    for asked in prompts if context is not None else ():
        room = context - len(asked.ids)  # type: ignore[operator]
        if room < max_tokens:
            cure = f"Lower --rollout.max_tokens to {room} or leave it out." if room > 0 else "Leave it out."
            raise ModelError(
                f"Prompt {asked.prompt.id} has {len(asked.ids)} tokens: with rollout.max_tokens {max_tokens} that is "
                f"more than the {context} that the model can read. {cure}"
            )


def check_prompts(prompts: Sequence[Prompt], tokenizer: Any, max_tokens: int, model: Any) -> None:
    """`check_room` before a run begins, for every prompt that it may ask."""
    check_room([render(tokenizer, prompt) for prompt in prompts], max_tokens, context_length(model))


def longest_prompt(prompts: Sequence[Prompt], tokenizer: Any) -> int:
    """Tokens."""
    return max(len(render(tokenizer, prompt).ids) for prompt in prompts)
