"""The compressed formats: what is stored of a layer, on which grid its values lie, and which layers are packed.

    FP8      e4m3, one scale a row; vLLM rounds activations to FP8 as well, token by token
    W4A16    16 steps, one scale for 128 values of a row, rounded to nearest
    NVFP4    e2m1, one e4m3 scale for 16 values, one float32 scale for the layer; activations stay in 16 bits

Shapes: O rows of a weight, I columns, G groups of a row that share a scale.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minigrpo.delivery.gguf.quantize import FORMATS
from minigrpo.errors import MinigrpoError, ModelError
from minigrpo.models.model_files import BaseFiles
from minigrpo.models.safetensors_io import StoredTensor

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_VALUES = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
_IN_LAYER = re.compile(r"\blayers\.\d+\.")


@dataclass(frozen=True, slots=True)
class Scheme:
    """A format. `preset`: llm-compressor's name. `layout`: the name in config.json. `group`: values that share a
    scale; 0: a row. `end`: a group's largest value over its scale. `parts`: what is stored of a layer in place of its
    weight."""

    name: str
    preset: str
    layout: str
    group: int
    end: float
    parts: tuple[str, ...]
    arguments: Mapping[str, Any]
    activations: Mapping[str, Any] | None = None

    def part_shapes(self, rows: int, width: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each part of a layer's weight."""
        groups = width // self.group if self.group else 1
        packed = {"FP8": width, "W4A16": width // 8, "NVFP4": width // 2}[self.name]
        shapes = {"weight_scale": (rows, groups), "weight_shape": (2,), "weight_global_scale": (1,)}
        return {part: shapes.get(part, (rows, packed)) for part in self.parts}

    def codes(self, stored_OX: Tensor) -> Tensor:
        """Unpack what is stored of some rows to the grid's own numbers [O, I], in float32."""
        if self.name == "FP8":
            return stored_OX.float()
        nibbles_OX = stored_OX.contiguous().view(torch.uint8)  # the first value is in the lower half of the first byte
        codes_OI = torch.stack((nibbles_OX & 15, nibbles_OX >> 4), -1).flatten(1)
        return codes_OI.float() - 8 if self.name == "W4A16" else _E2M1_VALUES[codes_OI.long()]

    def half_step(self, sizes: Tensor) -> Tensor:
        """Return half of the grid's step at each size, in units of the scale."""
        if self.name == "FP8":
            return half_e4m3_step(sizes)
        if self.name == "W4A16":
            return torch.full_like(sizes, 0.5)
        return torch.where(sizes < 2, 0.25, torch.where(sizes < 4, 0.5, 1.0))


def half_e4m3_step(sizes: Tensor) -> Tensor:
    """Return half the distance of e4m3's neighbours at each size: three bits after the point, from 2^-6 on."""
    exponents = torch.frexp(sizes.clamp_min(2.0**-6)).exponent
    return torch.ldexp(torch.ones_like(sizes), exponents - 5)


_WEIGHTS = {"symmetric": True, "dynamic": False}
SCHEMES = {
    "FP8": Scheme(
        *("FP8", "FP8_DYNAMIC", "float-quantized", 0, 448.0, ("weight", "weight_scale")),
        {**_WEIGHTS, "num_bits": 8, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True},
    ),
    "W4A16": Scheme(
        *("W4A16", "W4A16", "pack-quantized", 128, 7.5, ("weight_packed", "weight_scale", "weight_shape")),
        {**_WEIGHTS, "num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
    ),
    "NVFP4": Scheme(
        *("NVFP4", "NVFP4A16", "nvfp4-pack-quantized", 16, 6.0),
        ("weight_packed", "weight_scale", "weight_global_scale"),
        {**_WEIGHTS, "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ),
}


def split_formats(formats: Sequence[str]) -> tuple[list[str], list[Scheme]]:
    """Return (GGUF formats, compressed ones) of names in any case. Raises MinigrpoError for unknown names."""
    names = list(dict.fromkeys(part.strip().upper() for text in formats for part in text.split(",") if part.strip()))
    if unknown := [name for name in names if name not in SCHEMES and name not in FORMATS]:
        raise MinigrpoError(
            f"--format {unknown[0]} is not known. There are, as GGUF: {', '.join(FORMATS)}; for vLLM: "
            f"{', '.join(SCHEMES)}"
        )
    return [name for name in names if name not in SCHEMES], [SCHEMES[name] for name in names if name in SCHEMES]


@dataclass(frozen=True, slots=True)
class PackingPlan:
    """Which modules are packed, and the entries of config.json's `ignore`. `kept`: layers whose width does not divide
    by the group."""

    packed: tuple[str, ...]
    ignored: tuple[str, ...]
    kept: tuple[str, ...]


def packing_plan(base: BaseFiles, scheme: Scheme) -> PackingPlan:
    """Choose the layers: every linear one of the text model's blocks. Embeddings, heads and vision towers stay.

    Raises ModelError where there are none, and for mixtures of experts.
    """
    if any(".experts." in name for name in base.tensors):
        raise ModelError(f"{base.folder} is a mixture of experts, which cannot be exported as {scheme.name} here.")
    modules = {name.removesuffix(".weight"): each for name, each in base.tensors.items() if name.endswith(".weight")}
    inside = [name for name, stored in modules.items() if _is_layer(base, stored)]
    packed = tuple(name for name in inside if not scheme.group or modules[name].width % scheme.group == 0)
    if not packed:
        raise ModelError(
            f"{base.folder} has no layers that {scheme.name} can pack"
            + (f": no width divides by {scheme.group}. Another format: --format FP8" if inside else ".")
        )
    kept = tuple(name for name in inside if name not in packed)
    others = [name for name in modules if name not in packed and not name.endswith("norm")]
    ignored = tuple(dict.fromkeys(("lm_head", *_ignore_entries(base, others))))
    return PackingPlan(packed, ignored, kept)


def _is_layer(base: BaseFiles, stored: StoredTensor) -> bool:
    return len(stored.shape) == 2 and bool(_IN_LAYER.search(stored.name)) and base.is_text(stored.name)


def _ignore_entries(base: BaseFiles, modules: Sequence[str]) -> Iterator[str]:
    """Yield the modules by name, or, where programs put other prefixes before the names, by what they share."""
    for module in modules:
        if "text_config" not in base.config:
            yield module
        elif base.is_text(f"{module}.weight"):
            yield f"re:.*{re.escape(module.rpartition('model.')[2])}$"
        else:
            yield f"re:.*{re.escape(module.removeprefix('model.').partition('.')[0])}.*"
