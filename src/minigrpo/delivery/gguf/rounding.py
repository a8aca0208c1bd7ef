"""Compute what a file's type costs without the file: the merged model in transformers, with its weights, and what
enters each of its linear layers, rounded as llama.cpp rounds them on a CPU.

    F16, BF16   both are cast
    Q8_0        both in blocks of 32 that share a step: a 127th of the largest value, itself rounded to float16

A right file is as far from the merged model as this is, to a few hundredths (docs/export.md).

Shapes: R rows of a weight, W its width.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigrpo.delivery.gguf.weights import BLOCK
from minigrpo.delivery.parity.compare import compare_texts, load_strictly
from minigrpo.delivery.parity.kl import FLOAT32_KL, Divergence
from minigrpo.delivery.parity.texts import HeldTexts, ScoredText, text_logprobs
from minigrpo.models.safetensors_io import BLOCK_ELEMENTS

MAX_TIMES_ROUNDING = 2.0
"""Largest distance of a right file, over what rounding costs here. The weights' error is the very same; a layer's input
may be rounded the other way where the two computations differ in their last bit. At worst none agrees: then they are
two draws of one noise, with equal means. The limit leaves room for an error as large as all rounding together; measured
are 0.99 to 1.10 (docs/export.md)."""
MEASURED_PROCESSORS = ("x86_64", "AMD64")
"""Where that was measured. On ARM llama.cpp also adds up in float16."""


def explain_rounding(
    folder: Path, kind: str, held: HeldTexts, merged: Sequence[Tensor]
) -> tuple[Divergence, Divergence | None] | None:
    """Return how far the merged model moves when it is rounded to that type, on the task's texts and on others; None
    where it is not known how llama.cpp rounds: for other types, and on other processors."""
    if kind not in ROUNDINGS or platform.machine() not in MEASURED_PROCESSORS:
        return None
    return compare_texts(f"rounding {kind}", rounded_logprobs(folder, kind, held.all), merged, held)


def max_distance(cost: Divergence) -> float:
    """Return how far from the merged model a right file may be, in nats a token."""
    return MAX_TIMES_ROUNDING * cost.mean_kl + FLOAT32_KL


def rounded_logprobs(folder: Path, kind: str, texts: Sequence[ScoredText]) -> Iterator[Tensor]:
    """Open the model, round it, and yield its log-probabilities [N, V] of each text."""
    model = load_strictly(folder).eval()
    _round_weights(model, kind)
    yield from text_logprobs(model, texts)


@torch.no_grad()
def _round_weights(model: nn.Module, kind: str) -> None:
    """Round the matrices in place, and from now on what enters the linear layers. Vectors stay in float32."""
    done: set[int] = set()  # a tied head is the embedding
    for module in model.modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        weight_RW = module.weight
        rounded = _rounding(kind, weight_RW.shape[-1])
        if id(weight_RW) not in done:
            for rows_RW in weight_RW.split(max(1, BLOCK_ELEMENTS // weight_RW.shape[-1])):
                rows_RW.copy_(rounded(rows_RW))
        done.add(id(weight_RW))
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(_round_input(rounded))


def _round_input(rounded: Callable[[Tensor], Tensor]) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda module, inputs: (rounded(inputs[0]), *inputs[1:])


def _rounding(kind: str, width: int) -> Callable[[Tensor], Tensor]:
    """Return the rounding of rows of that width: those that are no whole number of blocks are stored in F16."""
    return ROUNDINGS[kind if kind != "Q8_0" or width % BLOCK == 0 else "F16"]


def _to_q8_0(values: Tensor) -> Tensor:
    blocks = values.reshape(-1, BLOCK)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    whole = (blocks * torch.where(step > 0, 1 / step, 0.0)).round()
    return (whole * step.half().float()).reshape(values.shape)


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "F16": lambda values: values.half().float(),
    "BF16": lambda values: values.bfloat16().float(),
    "Q8_0": _to_q8_0,
}
"""Types whose rounding is known -> values as llama.cpp reads them back."""
