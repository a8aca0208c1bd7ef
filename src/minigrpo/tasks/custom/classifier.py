"""A reward model from a folder as a reward: `classifier:FOLDER` in place of a function, or from Python

    liked = Classifier("reward-model", batch=16)

The folder holds a model of transformers with a classification head of one output, which is the reward. It reads prompt
and completion through its chat template, or as a pair of texts where it has none. Texts that are longer than its
context give None: the model does not apply.

Not covered: its memory is not in the plan of `minigrpo plan`.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigrpo.errors import TaskError
from minigrpo.utils.paths import user_path

Text = str | Sequence[Mapping[str, str]]
"""A prompt or a completion: text, or messages."""


class Classifier:
    """A reward function with TRL's signature. The model is loaded at the first call.

    `batch`: texts in one pass. `device`: "auto" for the first GPU, else the CPU. `max_tokens`: of the longest text that
    is judged; None: what the model's config and tokenizer say.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        batch: int = 16,
        device: str = "auto",
        max_tokens: int | None = None,
        name: str | None = None,
    ) -> None:
        self.folder = user_path(folder)
        if not (self.folder / "config.json").is_file():
            raise TaskError(f"The reward model {self.folder} is no model folder: it holds no config.json.")
        if batch < 1:
            raise TaskError(
                f"The reward model {self.folder} cannot judge {batch} texts in a pass. Give batch=1 or more."
            )
        self.batch, self.device, self.max_tokens = batch, device, max_tokens
        self.__name__ = name or self.folder.resolve().name
        self._lock = threading.Lock()
        self._loaded: tuple[Any, Any] | None = None

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
        with self._lock:  # the threads of several workers share the model
            self._loaded = self._loaded or self._load()
            return self._judge(*self._loaded, list(zip(prompts, completions, strict=True)))

    def _load(self) -> tuple[Any, Any]:
        """Return model and tokenizer. Raise TaskError for a head that is missing or has more than one output."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder)
            with _quiet_loading():
                model, told = AutoModelForSequenceClassification.from_pretrained(self.folder, output_loading_info=True)
        except Exception as fault:  # transformers and safetensors raise some twenty classes of errors
            reason = " ".join(str(fault).split())[:300]
            raise TaskError(
                f"The reward model {self.folder} cannot be loaded: {type(fault).__name__}: {reason}"
            ) from fault
        if missing := sorted(told["missing_keys"]):
            raise TaskError(
                f"The reward model {self.folder} has no weights for {missing[0]}: it was not trained as a classifier."
            )
        if model.config.num_labels != 1:
            raise TaskError(
                f"The reward model {self.folder} has {model.config.num_labels} outputs. A reward needs one "
                "(num_labels=1)."
            )
        # Models that judge by their last token find it by the padding after it.
        known = (model.config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        padding = next(one for one in known if one is not None)
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = padding
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        return model.to(chosen).eval(), tokenizer

    def _judge(self, model: Any, tokenizer: Any, pairs: Sequence[tuple[Text, Text]]) -> list[float | None]:
        import torch

        encoded = [_encode(tokenizer, *pair) for pair in pairs]
        longest = self.max_tokens or _context(model, tokenizer)
        fitting = [place for place, one in enumerate(encoded) if 0 < len(one["input_ids"]) <= longest]
        fitting.sort(key=lambda place: len(encoded[place]["input_ids"]))  # alike lengths share a pass: less padding
        rewards: list[float | None] = [None] * len(pairs)
        for start in range(0, len(fitting), self.batch):
            places = fitting[start : start + self.batch]
            with torch.inference_mode():
                logits_B = model(**_pad([encoded[place] for place in places], model)).logits[:, 0].float()
            for place, reward in zip(places, logits_B.tolist(), strict=True):
                rewards[place] = reward
        return rewards


def _encode(tokenizer: Any, prompt: Text, completion: Text) -> dict[str, list[int]]:
    if tokenizer.chat_template is None:
        encoded = tokenizer(_as_words(prompt), _as_words(completion))
    else:
        messages = [*_as_messages(prompt, "user"), *_as_messages(completion, "assistant")]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        encoded = tokenizer(text, add_special_tokens=False)
    return {name: list(values) for name, values in encoded.items()}


def _pad(texts: Sequence[Mapping[str, list[int]]], model: Any) -> dict[str, Any]:
    """Return what the model takes of the encoded texts, [B, T] each, padded on the right."""
    import torch

    takes = inspect.signature(model.forward).parameters
    padding = {"input_ids": model.config.pad_token_id}
    return {
        name: torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(text[name]) for text in texts], batch_first=True, padding_value=padding.get(name, 0)
        ).to(model.device)
        for name in texts[0]
        if name in takes
    }


def _as_messages(text: Text, role: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}] if isinstance(text, str) else [dict(one) for one in text]


def _as_words(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(str(one["content"]) for one in text)


def _context(model: Any, tokenizer: Any) -> int:
    """Return the tokens of the longest text: the smaller of what config and tokenizer say."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(int(positions or tokenizer.model_max_length), int(tokenizer.model_max_length))


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hide transformers' bars and its advice to train a head, which is refused here."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
