"""Measure whether an artefact is still the policy that was trained: from the models' own distributions, in float32
wherever that has room (place.py).

The trained policy is what PEFT makes of base and adapter, so the merge is compared with code other than its own. One
model is open at a time; of each, only its distributions on a few held texts are kept.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigrpo.delivery.artifacts.source import TrainedSource
from minigrpo.delivery.parity.kl import (
    FLOAT32_KL,
    MAX_KL,
    MAX_RELATIVE_KL,
    OTHER_TEXTS,
    ZERO_KL,
    Divergence,
    compare_distributions,
)
from minigrpo.delivery.parity.place import ProofPlace, pick_proof_place
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
    compared with. `base_elsewhere`: on texts of other kinds. `unrounded`: how far PEFT's own merge is, in float32.
    `injected`: the distributions of the base's own model with the merged weights in it. Both where there are any.
    `place`: where all of them were computed, and the rest has to be."""

    place: ProofPlace
    held: HeldTexts
    trained: Sequence[Tensor]
    base: Divergence
    base_elsewhere: Divergence | None
    injected: Sequence[Tensor] | None = None
    unrounded: Divergence | None = None

    @property
    def base_rows(self) -> list[Divergence]:
        return [self.base, *([self.base_elsewhere] if self.base_elsewhere else [])]

    @property
    def nothing_learned(self) -> bool:
        """Tell whether base and trained policy give the same distributions."""
        return self.base.mean_kl <= ZERO_KL


def place_of(source: TrainedSource, base: BaseFiles, *, exact: bool = False) -> ProofPlace:
    """Return where the proofs of a run compute. `exact`: in float32, or not at all. So are weights that were trained as
    a whole, for 16 bits would round the training away. Raises ModelError where there is no room."""
    return pick_proof_place(base, pick_device(source.recipe.model.device), exact=exact or source.full)


def trained_reference(
    source: TrainedSource, base: BaseFiles, merged: BaseFiles | None = None, *, exact: bool = False
) -> ParityReference:
    """Open the base with its adapter and compare the two; for a full-parameter run, open the trained model, then its
    base. `merged`: weights that are then put into the base's model, which no merged config has any part in; before
    that, PEFT merges the adapter there. `exact`: as in `place_of`.

    Raises ArtifactError where the policy does not say the same twice, ModelError where memory has no room.
    """
    place = place_of(source, base, exact=exact)
    if source.full:
        held, trained = _full_model_logprobs(source, place)
        with open_for_proof(base.folder, source, place) as (model, _):
            rows = compare_texts("base", text_logprobs(model, held.all), trained, held)
            return ParityReference(place, held, trained, *rows, _injected_logprobs(model, merged, held.all))
    with open_for_proof(base.folder, source, place) as (model, tokenizer):
        model = attach_adapter(model, source.folder)
        held, trained = _score_trained(model, tokenizer, source)
        _require_repeatable(model, held.texts, trained)
        with model.disable_adapter():
            found = text_logprobs(model, held.all)
            rows = compare_texts("base", found, trained, held, precision=place.precision)
        if merged is None:
            return ParityReference(place, held, trained, *rows)
        if place.dtype != torch.float32:  # where PEFT's merge would be rounded, too
            return ParityReference(place, held, trained, *rows, _injected_logprobs(model.unload(), merged, held.all))
        plain = model.merge_and_unload()
        here = trained[: len(held.texts)]
        unrounded = compare_distributions("merged by PEFT", text_logprobs(plain, held.texts), here)
        return ParityReference(place, held, trained, *rows, _injected_logprobs(plain, merged, held.all), unrounded)


def compare_texts(
    name: str,
    found: Iterable[Tensor],
    reference: Sequence[Tensor],
    held: HeldTexts,
    *,
    base_kl: float | None = None,
    limit: float | None = None,
    precision: str = "float32",
) -> tuple[Divergence, Divergence | None]:
    """Compare two sets of log-probabilities on the task's texts, and, apart from them, on the others, if there are any.

    `limit`: of relative KL on the task's texts. A stage that has one may not be further away than MAX_KL elsewhere.
    """
    here, each = len(held.texts), iter(found)
    compare = partial(compare_distributions, precision=precision)
    row = compare(name, islice(each, here), reference[:here], base_kl=base_kl, limit=limit)
    if not held.others:
        return row, None
    ceiling = None if limit is None else MAX_KL
    return row, compare(f"{name}{OTHER_TEXTS}", each, reference[here:], ceiling=ceiling)


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


def _full_model_logprobs(source: TrainedSource, place: ProofPlace) -> tuple[HeldTexts, Sequence[Tensor]]:
    with open_for_proof(source.folder, source, place) as (model, tokenizer):
        return _score_trained(model, tokenizer, source)


def _packed_policy_logprobs(
    base: BaseFiles, source: TrainedSource, place: ProofPlace, texts: Sequence[ScoredText]
) -> Sequence[Tensor]:
    with open_for_proof(base.folder, source, place, four_bit=True) as (model, _):
        return StoredLogprobs(text_logprobs(attach_adapter(model, source.folder), texts))


def merged_logprobs(folder: Path, place: ProofPlace, texts: Sequence[ScoredText]) -> Sequence[Tensor]:
    """Return a merged folder's distributions on the texts, loaded with transformers. Raises ModelError for missing or
    unexpected weights."""
    model = load_strictly(folder, place.dtype).to(place.device).eval()
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
    also return what is wrong besides the distance, if anything is."""
    found = merged_logprobs(folder, reference.place, reference.held.all)
    return compare_merged(found, source, base, reference), broken_link(found, reference)


def compare_merged(
    found: Sequence[Tensor], source: TrainedSource, base: BaseFiles, reference: ParityReference
) -> list[Divergence]:
    """Return the rows of the proof. `found`: the merged model's distributions."""
    held, place = reference.held, reference.place
    compare = partial(compare_texts, base_kl=reference.base.mean_kl, precision=place.precision)
    merged = compare("merged", found, reference.trained, held, limit=MAX_RELATIVE_KL)
    rows = [*reference.base_rows, *merged]
    if trained_in_4bit(source) and find_spec("bitsandbytes"):
        packed = _packed_policy_logprobs(base, source, place, held.all)
        rows += compare(PACKED_ROW, found, packed, held)
    return [row for row in rows if row is not None]


def broken_link(found: Sequence[Tensor], reference: ParityReference) -> str | None:
    """Say what is wrong between the trained policy and a merged folder as transformers loads it, besides rounding; None
    where nothing is. `found`: the folder's distributions.

    PEFT's policy says what PEFT's merge says; every weight is that merge's, rounded once (weights.py); and the folder
    says what the base's own model says with these weights. What is left is what rounding costs.
    """
    unrounded, injected = reference.unrounded, reference.injected
    if unrounded is not None and not unrounded.mean_kl <= FLOAT32_KL:
        return (
            f"PEFT's own merge, in float32, is {unrounded.mean_kl:.2g} nats a token away from the policy that PEFT runs"
            f" (limit {FLOAT32_KL:g}): its adapter does what merged weights cannot. Serve base and adapter side by "
            "side."
        )
    loaded = compare_distributions("loaded", found, injected) if injected is not None else None
    if loaded is None or loaded.mean_kl <= ZERO_KL:
        return None
    return (
        f"Its weights are right, but transformers makes another model of the folder: {loaded.mean_kl:.2g} nats a token "
        f"away from the base's own with these weights (limit {ZERO_KL:g}). Its config.json differs from the base's."
    )


@contextmanager
def open_for_proof(
    folder: Path, source: TrainedSource, place: ProofPlace, *, four_bit: bool = False
) -> Iterator[tuple[Any, Any]]:
    """Open (model, tokenizer) at the place of a proof and release them at the end. The tokenizer is the one that
    training used."""
    gc.collect()
    saved = (source.folder / "tokenizer_config.json").is_file()
    loaded = open_model(
        str(folder),
        revision=None,
        dtype=place.dtype,
        device=place.device,
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


def load_strictly(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a model with transformers, on the CPU. Raises ModelError for missing, unexpected or mismatched weights."""
    gc.collect()
    opener = model_class(open_config(folder))
    try:
        with no_progress_bars():
            model, info = opener.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except MinigrpoError:
        raise
    except Exception as fault:  # transformers and safetensors raise some twenty kinds between them
        reason = " ".join(str(fault).split())[:200]
        raise ModelError(f"{folder} could not be loaded: {type(fault).__name__}: {reason}") from fault
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ModelError(f"{folder} does not load as it should: {kind.replace('_', ' ')}: {sorted(info[kind])[0]}")
    return model
