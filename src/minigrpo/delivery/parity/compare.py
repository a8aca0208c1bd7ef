"""Whether an artefact still is the policy that was trained: asked of the models themselves, in float32.

The trained policy is what PEFT makes of base and adapter, so the merge is held against other code than its own. One
model is open at a time; what is kept of each are its distributions on a few held texts.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigrpo.delivery.artifacts.merged_weights import bytes_of
from minigrpo.delivery.artifacts.source import TrainedSource
from minigrpo.delivery.parity.kl import LIMIT, NOTHING, Divergence, compare
from minigrpo.delivery.parity.texts import HeldTexts, ScoredText, distributions, held_texts, sampled_texts
from minigrpo.errors import MinigrpoError, ModelError
from minigrpo.models.loading import model_class, open_model, pick_device
from minigrpo.models.lora import attach_adapter
from minigrpo.models.model_files import BaseFiles
from minigrpo.runs.rundir import RunDir
from minigrpo.types import Task
from minigrpo.utils.process import no_progress_bars


@dataclass(frozen=True, slots=True)
class Reference:
    """The trained policy on the held texts, and how far the base is from it: the measure of all that follows."""

    held: HeldTexts
    trained: tuple[Tensor, ...]
    base: Divergence

    @property
    def nothing_learned(self) -> bool:
        return self.base.mean_kl <= NOTHING


def device_for(source: TrainedSource, base: BaseFiles) -> torch.device:
    """The recipe's, if a model in float32 has room there, with a tenth for its passes; else the CPU."""
    device = pick_device(source.recipe.model.device)
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 1.1 * bytes_of(base, torch.float32):
        return torch.device("cpu")
    return device


def trained_truth(source: TrainedSource, base: BaseFiles) -> Reference:
    """Opens the base with the adapter beside it; of a full-parameter run the model, and then its base."""
    device = device_for(source, base)
    if source.full:
        held, trained = _of_full(source, device)
        found = _of_base(base, source, device, held.texts)
        return Reference(held, trained, compare("base", found, trained))
    with opened(base.folder, source, device) as (model, tokenizer):
        model = attach_adapter(model, source.folder)
        held, trained = _said(model, tokenizer, source)
        with model.disable_adapter():
            return Reference(held, trained, compare("base", distributions(model, held.texts), trained))


# Each of these ends before the next begins, and lets its model go: two may not fit side by side.


def _of_full(source: TrainedSource, device: torch.device) -> tuple[HeldTexts, tuple[Tensor, ...]]:
    with opened(source.folder, source, device) as (model, tokenizer):
        return _said(model, tokenizer, source)


def _of_base(
    base: BaseFiles, source: TrainedSource, device: torch.device, texts: Sequence[ScoredText]
) -> tuple[Tensor, ...]:
    with opened(base.folder, source, device) as (model, _):
        return tuple(distributions(model, texts))


def _of_packed(
    base: BaseFiles, source: TrainedSource, device: torch.device, texts: Sequence[ScoredText]
) -> tuple[Tensor, ...]:
    with opened(base.folder, source, device, four_bit=True) as (model, _):
        return tuple(distributions(attach_adapter(model, source.folder), texts))


def of_merged(folder: Path, device: torch.device, texts: Sequence[ScoredText]) -> tuple[Tensor, ...]:
    """What a merged folder says, as transformers loads it. Raises ModelError where a weight is missing or too many."""
    model = as_loaded(folder).to(device).eval()
    return tuple(distributions(model, texts))


def packed_base(source: TrainedSource) -> bool:
    return source.recipe.model.quantize == "nf4"


def _said(model: Any, tokenizer: Any, source: TrainedSource) -> tuple[HeldTexts, tuple[Tensor, ...]]:
    return what_is_said(model, tokenizer, source.run, task_of(source.run))


def what_is_said(
    model: Any, tokenizer: Any, run: RunDir | None, task: Task | None
) -> tuple[HeldTexts, tuple[Tensor, ...]]:
    """The texts of a run, or else the model's own, and the model's distributions on them."""
    vocabulary = model.get_input_embeddings().num_embeddings
    held = held_texts(run, task, tokenizer, vocabulary)
    held = held or sampled_texts(model, tokenizer, task, vocabulary)
    return held, tuple(distributions(model, held.texts))


def task_of(run: RunDir | None) -> Task | None:
    """The run's task; where its file or data are gone, other texts serve as well."""
    from minigrpo.config.load import load_recipe
    from minigrpo.tasks.registry import open_task

    try:
        return open_task(load_recipe(str(run.path))) if run else None
    except MinigrpoError:
        return None


def prove(folder: Path, source: TrainedSource, base: BaseFiles, truth: Reference) -> list[Divergence]:
    """The merged model against the trained policy; where the base was in 4 bit while it trained, against that, too."""
    return judged(of_merged(folder, device_for(source, base), truth.held.texts), source, base, truth)


def judged(found: tuple[Tensor, ...], source: TrainedSource, base: BaseFiles, truth: Reference) -> list[Divergence]:
    """The rows of a proof. `found`: what the merged model says."""
    device, texts = device_for(source, base), truth.held.texts
    against = {"base_kl": truth.base.mean_kl}
    rows = [truth.base, compare("merged", found, truth.trained, **against, limit=LIMIT)]
    if packed_base(source) and find_spec("bitsandbytes"):
        packed = _of_packed(base, source, device, texts)
        rows.append(compare("merged (4-bit policy)", found, packed, **against))
    return rows


@contextmanager
def opened(
    folder: Path, source: TrainedSource, device: torch.device, *, four_bit: bool = False
) -> Iterator[tuple[Any, Any]]:
    """(model, tokenizer), in float32, let go of at the end; the tokenizer is the one that training used."""
    from transformers import AutoTokenizer

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
    tokenizer = AutoTokenizer.from_pretrained(source.folder) if saved else loaded.tokenizer
    try:
        yield loaded.model, tokenizer
    finally:
        del loaded
        gc.collect()


def as_loaded(folder: Path) -> Any:
    """As transformers loads it; raises ModelError where one weight is missing, or one too many."""
    from transformers import AutoConfig

    gc.collect()
    opener = model_class(AutoConfig.from_pretrained(folder))
    with no_progress_bars():
        model, info = opener.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ModelError(f"{folder} does not load as it should: {kind.replace('_', ' ')}: {sorted(info[kind])[0]}")
    return model
