"""Measure whether an artefact is still the policy that was trained: from the models' own distributions, in float32.

The trained policy is what PEFT makes of base and adapter, so the merge is compared with code other than its own. One
model is open at a time; of each, only its distributions on a few held texts are kept.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigrpo.delivery.artifacts.merged_weights import weight_bytes
from minigrpo.delivery.artifacts.source import TrainedSource
from minigrpo.delivery.parity.kl import (
    MAX_KL,
    MAX_RELATIVE_KL,
    OTHER_TEXTS,
    ZERO_KL,
    Divergence,
    compare_distributions,
)
from minigrpo.delivery.parity.texts import (
    HeldTexts,
    ScoredText,
    StoredLogprobs,
    held_texts,
    sampled_texts,
    text_logprobs,
)
from minigrpo.errors import ArtifactError, MinigrpoError, ModelError
from minigrpo.models.loading import model_class, open_config, open_model, open_tokenizer, pick_device
from minigrpo.models.lora import attach_adapter
from minigrpo.models.model_files import BaseFiles
from minigrpo.runs.rundir import RunDir
from minigrpo.types import Task
from minigrpo.utils.process import no_progress_bars

PACKED_ROW = "merged (4-bit policy)"
"""The row that compares the merged model with the policy as it was trained, its base in 4 bit."""


@dataclass(frozen=True, slots=True)
class ParityReference:
    """The trained policy's distributions on all held texts, and how far the base is from it: what all later stages are
    compared with. `base_elsewhere`: on texts of other kinds. `injected`: the distributions of the base's own model with
    the merged weights in it, where there are any."""

    held: HeldTexts
    trained: Sequence[Tensor]
    base: Divergence
    base_elsewhere: Divergence | None
    injected: Sequence[Tensor] | None = None

    @property
    def base_rows(self) -> list[Divergence]:
        return [self.base, *([self.base_elsewhere] if self.base_elsewhere else [])]

    @property
    def nothing_learned(self) -> bool:
        """Tell whether base and trained policy give the same distributions."""
        return self.base.mean_kl <= ZERO_KL


def pick_proof_device(source: TrainedSource, base: BaseFiles) -> torch.device:
    """Return the recipe's device if a float32 model fits there, with a tenth to spare for its forward passes; else the
    CPU."""
    device = pick_device(source.recipe.model.device)
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 1.1 * weight_bytes(base, torch.float32):
        return torch.device("cpu")
    return device


def trained_reference(source: TrainedSource, base: BaseFiles, merged: BaseFiles | None = None) -> ParityReference:
    """Open the base with its adapter and compare the two; for a full-parameter run, open the trained model, then its
    base. `merged`: weights that are then put into the base's model, which no merged config has any part in.

    Raises ArtifactError where the policy does not say the same twice.
    """
    device = pick_proof_device(source, base)
    if source.full:
        held, trained = _full_model_logprobs(source, device)
        with open_in_float32(base.folder, source, device) as (model, _):
            rows = compare_texts("base", text_logprobs(model, held.all), trained, held)
            return ParityReference(held, trained, *rows, _injected_logprobs(model, merged, held.all))
    with open_in_float32(base.folder, source, device) as (model, tokenizer):
        model = attach_adapter(model, source.folder)
        held, trained = _score_trained(model, tokenizer, source)
        _require_repeatable(model, held.texts, trained)
        with model.disable_adapter():
            rows = compare_texts("base", text_logprobs(model, held.all), trained, held)
        return ParityReference(held, trained, *rows, _injected_logprobs(model.unload(), merged, held.all))


def compare_texts(
    name: str,
    found: Iterable[Tensor],
    reference: Sequence[Tensor],
    held: HeldTexts,
    *,
    base_kl: float | None = None,
    limit: float | None = None,
) -> tuple[Divergence, Divergence | None]:
    """Compare two sets of log-probabilities on the task's texts, and, apart from them, on the others, if there are any.

    `limit`: of relative KL on the task's texts. A stage that has one may not be further away than MAX_KL elsewhere.
    """
    here, each = len(held.texts), iter(found)
    row = compare_distributions(name, islice(each, here), reference[:here], base_kl=base_kl, limit=limit)
    if not held.others:
        return row, None
    ceiling = None if limit is None else MAX_KL
    return row, compare_distributions(f"{name}{OTHER_TEXTS}", each, reference[here:], ceiling=ceiling)


def _require_repeatable(model: Any, texts: Sequence[ScoredText], then: Sequence[Tensor]) -> None:
    """Raise ArtifactError where a second pass over the first text differs: something is random, as dropout is."""
    again = next(text_logprobs(model, texts))
    if compare_distributions("again", [again], [then[0]]).mean_kl > ZERO_KL:
        raise ArtifactError(
            "The trained policy says other things the second time: is dropout on? Nothing can be proved."
        )


def _injected_logprobs(model: Any, merged: BaseFiles | None, texts: Sequence[ScoredText]) -> Sequence[Tensor] | None:
    """Put merged weights into the base's model and return its distributions. Raises ArtifactError where one lacks."""
    if merged is None:
        return None
    with torch.no_grad():
        for name, value in model.named_parameters():
            place = merged.on_disk(name)
            if place is None:
                raise ArtifactError(f"{merged.folder} has no {name}, which the base's model needs.")
            value.copy_(merged.tensors[place].read())
    return StoredLogprobs(text_logprobs(model, texts))


# Each of these releases its model before the next opens one: two may not fit in memory together.


def _full_model_logprobs(source: TrainedSource, device: torch.device) -> tuple[HeldTexts, Sequence[Tensor]]:
    with open_in_float32(source.folder, source, device) as (model, tokenizer):
        return _score_trained(model, tokenizer, source)


def _packed_policy_logprobs(
    base: BaseFiles, source: TrainedSource, device: torch.device, texts: Sequence[ScoredText]
) -> Sequence[Tensor]:
    with open_in_float32(base.folder, source, device, four_bit=True) as (model, _):
        return StoredLogprobs(text_logprobs(attach_adapter(model, source.folder), texts))


def merged_logprobs(folder: Path, device: torch.device, texts: Sequence[ScoredText]) -> Sequence[Tensor]:
    """Return a merged folder's distributions on the texts, loaded with transformers. Raises ModelError for missing or
    unexpected weights."""
    model = load_strictly(folder).to(device).eval()
    return StoredLogprobs(text_logprobs(model, texts))


def trained_in_4bit(source: TrainedSource) -> bool:
    """Tell whether the base was quantized to 4 bit during training."""
    return source.recipe.model.quantize == "nf4"


def _score_trained(model: Any, tokenizer: Any, source: TrainedSource) -> tuple[HeldTexts, Sequence[Tensor]]:
    return score_held_texts(model, tokenizer, source.run, find_task(source.run))


def score_held_texts(
    model: Any, tokenizer: Any, run: RunDir | None, task: Task | None
) -> tuple[HeldTexts, Sequence[Tensor]]:
    """Return the run's texts, or else the model's own answers, with texts of other kinds, and the model's distributions
    on all of them."""
    vocabulary = model.get_input_embeddings().num_embeddings
    held = held_texts(run, task, tokenizer, vocabulary)
    held = held or sampled_texts(model, tokenizer, task, vocabulary)
    return held, StoredLogprobs(text_logprobs(model, held.all))


def find_task(run: RunDir | None) -> Task | None:
    """Open the run's task; None where its file or data are gone (other texts then replace its own)."""
    from minigrpo.config.load import load_recipe
    from minigrpo.tasks.registry import open_task

    try:
        return open_task(load_recipe(str(run.path))) if run else None
    except MinigrpoError:
        return None


def prove_merged(
    folder: Path, source: TrainedSource, base: BaseFiles, reference: ParityReference
) -> tuple[list[Divergence], str | None]:
    """Compare the merged model with the trained policy, and with that of 4 bit, if the base was packed during training;
    also return how it differs from the base's model with the same weights, if it does."""
    found = merged_logprobs(folder, pick_proof_device(source, base), reference.held.all)
    return compare_merged(found, source, base, reference), loading_fault(found, reference)


def compare_merged(
    found: Sequence[Tensor], source: TrainedSource, base: BaseFiles, reference: ParityReference
) -> list[Divergence]:
    """Return the rows of the proof. `found`: the merged model's distributions."""
    held, base_kl = reference.held, reference.base.mean_kl
    merged = compare_texts("merged", found, reference.trained, held, base_kl=base_kl, limit=MAX_RELATIVE_KL)
    rows = [*reference.base_rows, *merged]
    if trained_in_4bit(source) and find_spec("bitsandbytes"):
        packed = _packed_policy_logprobs(base, source, pick_proof_device(source, base), held.all)
        rows += compare_texts(PACKED_ROW, found, packed, held, base_kl=base_kl)
    return [row for row in rows if row is not None]


def loading_fault(found: Sequence[Tensor], reference: ParityReference) -> str | None:
    """Say how a merged folder, as transformers loads it, differs from the base's own model with the same weights; None
    where it does not. `found`: the folder's distributions."""
    if reference.injected is None:
        return None
    row = compare_distributions("loaded", found, reference.injected)
    if row.mean_kl <= ZERO_KL:
        return None
    return (
        f"Its weights are right, but transformers makes another model of the folder: {row.mean_kl:.2g} nats a token "
        f"away from the base's own with these weights (limit {ZERO_KL:g}). Its config.json differs from the base's."
    )


@contextmanager
def open_in_float32(
    folder: Path, source: TrainedSource, device: torch.device, *, four_bit: bool = False
) -> Iterator[tuple[Any, Any]]:
    """Open (model, tokenizer) in float32 and release them at the end. The tokenizer is the one that training used."""
    gc.collect()
    saved = (source.folder / "tokenizer_config.json").is_file()
    loaded = open_model(
        str(folder),
        revision=None,
        dtype=torch.float32,
        device=device,
        seed=source.recipe.seed,
        template={} if saved else source.recipe.model.template,
        four_bit=four_bit,
    )
    tokenizer = open_tokenizer(source.folder) if saved else loaded.tokenizer
    try:
        yield loaded.model, tokenizer
    finally:
        del loaded
        gc.collect()


def load_strictly(folder: Path) -> Any:
    """Load a model with transformers. Raises ModelError for missing, unexpected or mismatched weights."""
    gc.collect()
    opener = model_class(open_config(folder))
    try:
        with no_progress_bars():
            model, info = opener.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except MinigrpoError:
        raise
    except Exception as fault:  # transformers and safetensors raise some twenty kinds between them
        reason = " ".join(str(fault).split())[:200]
        raise ModelError(f"{folder} could not be loaded: {type(fault).__name__}: {reason}") from fault
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ModelError(f"{folder} does not load as it should: {kind.replace('_', ' ')}: {sorted(info[kind])[0]}")
    return model
