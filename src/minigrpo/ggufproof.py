"""Whether llama.cpp, given an exported file, says what the merged model says: position by position, token by token.

Shapes: N scored positions of a text, V vocabulary.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigrpo.divergence import LIMIT, Divergence, compare
from minigrpo.engines.llamacpp import LlamaCpp
from minigrpo.errors import MinigrpoError
from minigrpo.held import HeldTexts, distributions, held_texts, sampled_texts
from minigrpo.loading import model_class
from minigrpo.pretokenizer import token_faults
from minigrpo.render import QUESTION
from minigrpo.rollout import prompts_of
from minigrpo.rundir import RunDir, read_json
from minigrpo.types import Message

GREATEST = {"F32": 1e-4}
"""Of a log-probability, at any position: with the same arithmetic nothing else than a wrong mapping is larger."""
MEAN_KL = {"F32": 1e-8, "F16": 2e-5, "BF16": 1e-3, "Q8_0": 1e-4}
"""Nats a token. llama.cpp rounds what flows through a layer to the file's type, so even a lossless BF16 file differs.
Formats that stand in neither table have no limit of their own: their distance is told."""
UNMEASURED = {"Q8_0": 1e-2}
"""In their stead where nobody knows what training did: of a model that was not trained here. Chat models of some
billions of weights lose about 0.001 in eight bits."""
RARE = math.log(1e-5)
"""Log-probabilities of tokens that are rarer than this may differ by anything: nobody will ever see them."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The merged model on the held texts. `base_kl`: what training did, in nats a token; None where it is unknown."""

    held: HeldTexts
    merged: tuple[Tensor, ...]
    prompts: tuple[tuple[Message, ...], ...]
    tokenizer: Any
    base_kl: float | None

    @property
    def longest(self) -> int:
        return max(len(text.ids) for text in self.held.texts)


@dataclass(frozen=True, slots=True)
class Proof:
    """`row`: the distance. `greatest`: largest difference of a log-probability. `faults`: why the file is refused."""

    row: Divergence
    greatest: float
    faults: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        return self.row.to_dict() | {"greatest": self.greatest, "faults": list(self.faults), "ok": self.ok}


def reference(folder: Path, run: RunDir | None) -> Reference:
    """Opens the merged model in float32, asks it, and lets go of it."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = _task(run)
    model: Any = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32).eval()
    vocabulary = model.get_input_embeddings().num_embeddings
    held = held_texts(run.groups if run else None, task, tokenizer, vocabulary)
    held = held or sampled_texts(model, tokenizer, task, vocabulary)
    merged = tuple(distributions(model, held.texts))
    del model
    gc.collect()
    asked = tuple(tuple(prompt.messages) for prompt in prompts_of(task, "test", 8)) if task else ()
    return Reference(held, merged, (*asked, (QUESTION,)), tokenizer, _base_kl(run))


def _task(run: RunDir | None) -> Any:
    """The run's task; where its file or data are gone, other texts serve as well."""
    from minigrpo.recipefile import load_recipe
    from minigrpo.tasks import open_task

    try:
        return open_task(load_recipe(str(run.path))) if run else None
    except MinigrpoError:
        return None


def _base_kl(run: RunDir | None) -> float | None:
    """What the merge measured of base against trained policy."""
    stages = read_json(run.parity).get("stages", []) if run and run.parity.is_file() else []
    return next((row["mean_kl"] for row in stages if row["name"] == "base"), None)


def prove_file(file: Path, kind: str, truth: Reference) -> Proof:
    """Loads the file in llama.cpp. `kind`: F16, Q8_0 and the like."""
    with LlamaCpp(file, context=truth.longest + 8) as llama:
        if llama.facts.vocabulary != truth.merged[0].shape[-1]:
            raise MinigrpoError(
                f"{file} knows {llama.facts.vocabulary} tokens and the model {truth.merged[0].shape[-1]}. It was made "
                "from another model: export again with --force"
            )
        found = list(llama.distributions(truth.held.texts))
        tokens = tuple(token_faults(llama, truth.tokenizer, truth.prompts))
    row = compare(f"gguf {kind}", found, truth.merged, base_kl=truth.base_kl)
    greatest = max(_greatest(each, other) for each, other in zip(found, truth.merged, strict=True))
    return Proof(row, greatest, (*tokens, *_too_far(row, greatest, kind, truth.base_kl is not None)))


def _greatest(found_NV: Tensor, truth_NV: Tensor) -> float:
    seen_NV = torch.maximum(found_NV, truth_NV) >= RARE
    return float((found_NV - truth_NV).abs()[seen_NV].max())


def _too_far(row: Divergence, greatest: float, kind: str, measured: bool) -> Iterator[str]:
    limits = MEAN_KL if measured else MEAN_KL | UNMEASURED
    if kind not in limits or row.mean_kl <= limits[kind]:
        return
    if kind in GREATEST:
        if greatest > GREATEST[kind]:
            yield (
                f"In {kind} nothing is rounded, and yet a log-probability differs by {greatest:.2g} (limit "
                f"{GREATEST[kind]:g}): tensors or settings were written wrongly. Report it with the model's name."
            )
        return
    if row.relative_kl is None or row.relative_kl > LIMIT:
        share = "" if row.relative_kl is None else f", {row.relative_kl:.2g} of what training did (limit {LIMIT:g})"
        yield (
            f"Its distance from the merged model is {row.mean_kl:.2g} nats a token (limit {limits[kind]:g}){share}. "
            f"{_remedy(kind)}"
        )


def _remedy(kind: str) -> str:
    if kind == "Q8_0":
        return "Export as F16 or BF16, or train longer, so that the change is larger than the rounding."
    return "Export as F32: if that is refused, too, the model was written wrongly; if not, this type is too coarse."


def outline(truth: Reference) -> dict[str, Any]:
    """What every proof was made on."""
    texts: Sequence[Any] = truth.held.texts
    return {"texts": len(texts), "tokens": sum(text.scored for text in texts), "source": truth.held.source}
