"""Choose where a proof computes and in which number type, before anything is loaded: what has room for it.

float32 wherever the model fits in it: its rounding is nothing beside whatever is judged. Else the 16 bits in which the
base is stored: their rounding counts as distance then, so a right artefact may fail where training did little, and a
wrong one does not pass for it. Where they do not fit either, that is said, for a kernel that runs out of memory kills
without a word.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from minigrpo.delivery.artifacts.merged_weights import dtype_name
from minigrpo.errors import ModelError
from minigrpo.models.model_files import BaseFiles
from minigrpo.utils.memory import free_memory

SPARE = 1.1
"""Times its weights, what a model takes with its forward passes over the short texts of a proof."""
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class ProofPlace:
    """Where a proof computes, and in which number type."""

    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    @property
    def precision(self) -> str:
        return dtype_name(self.dtype)


def pick_proof_place(base: BaseFiles, device: torch.device, *, exact: bool = False) -> ProofPlace:
    """Return the place for models of this base's size: `device` if one fits there, else the CPU.

    Main memory must hold it in any case: weights are read there. `exact`: float32 or nothing. Raise ModelError where
    there is no room.
    """
    wanted = [torch.float32] if exact else list(dict.fromkeys((torch.float32, base.dtype)))
    free = free_memory(CPU)
    for dtype in wanted:
        need = model_bytes(base, dtype) * SPARE
        if need <= free:
            fits = device.type == "cpu" or need <= free_memory(device)
            return ProofPlace(device if fits else CPU, dtype)
    needs = " or ".join(f"{model_bytes(base, dtype) * SPARE / 1e9:.1f} GB in {dtype_name(dtype)}" for dtype in wanted)
    raise ModelError(
        f"A proof loads the model of {base.folder}, which takes {needs}, and {free / 1e9:.1f} GB of main memory are "
        "free. Close other programs (restart a notebook that has trained), or take a machine with more. Without it: "
        "minigrpo check RUN --no-model, minigrpo merge RUN --no-proof"
    )


def model_bytes(base: BaseFiles, dtype: torch.dtype) -> int:
    """Return the bytes of the base's weights, loaded in `dtype`."""
    return sum(math.prod(stored.shape) for stored in base.tensors.values()) * dtype.itemsize
