"""Compare every tensor of a compressed folder with the merged model's, unpacked by the few lines of `schemes`.

    scales      what the values of their group ask for, rounded once
    values      the nearest of the format's grid: within half a step there, and what rounding adds on the way
    the rest    bit for bit: tensors that stay, tokenizer, chat template, generation config; config.json but for its
                quantization_config, which must say what was packed

Shapes: O rows of a weight, I columns, G groups of a row that share a scale.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigrpo.delivery.compressed.schemes import PackingPlan, Scheme, half_e4m3_step
from minigrpo.delivery.parity.weights import name_faults
from minigrpo.models.model_files import WEIGHTS_FILE, WEIGHTS_INDEX, BaseFiles
from minigrpo.models.safetensors_io import StoredTensor, read_header
from minigrpo.runs.manifest import kept_files
from minigrpo.runs.rundir import digest, read_json

E4M3_MAX = 448.0
SLACK = 1e-6
"""Share of a value that float32 rounds off in a few operations."""
FUSED = re.compile(r"(.+\.)(q_proj|k_proj|v_proj|gate_proj|up_proj)$")
"""Layers that vLLM computes as one, with one global scale: the first three of a parent, and the last two."""


@dataclass(frozen=True, slots=True)
class PackedProof:
    """The result: tensors compared, layers packed, values unpacked. `error`: the largest of a layer, its root mean
    square over the layer's."""

    tensors: int
    packed: int
    values: int
    error: float
    faults: tuple[str, ...] = ()

    @property
    def fault(self) -> str | None:
        return name_faults(self.faults) if self.faults else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"faults": list(self.faults)}


def prove_packed(folder: Path, merged: BaseFiles, scheme: Scheme, plan: PackingPlan) -> PackedProof:
    """Compare a folder with the model that it was made from. Raises ArtifactError where a file of it cannot be read."""
    here = {name: stored for file in sorted(folder.glob("*.safetensors")) for name, stored in _tensors(file).items()}
    expected = _expected(merged, scheme, plan)
    faults = [f"{name} is missing" for name in sorted(expected.keys() - here.keys())]
    faults += [f"{name} was added" for name in sorted(here.keys() - expected.keys())]
    wrong = [name for name in sorted(expected.keys() & here.keys()) if here[name].shape != expected[name]]
    faults += [f"{name} has another shape" for name in wrong]
    proved, layers = not faults, list[_Layer]()
    for module in plan.packed if proved else ():
        layer = _Layer(scheme, {part: here[f"{module}.{part}"] for part in scheme.parts})
        layer.compare(module, merged.tensors[f"{module}.weight"])
        layers.append(layer)
        faults += [f"{module}: {fault}"] if (fault := layer.fault()) else []
    faults += _fused_faults(layers) if scheme.name == "NVFP4" else []
    packed = {f"{module}.weight" for module in plan.packed}
    for name in sorted(merged.tensors.keys() - packed) if proved else ():
        if not _is_same(here[name], merged.tensors[name]):
            faults.append(f"{name} is not the merged model's, bit for bit")
    faults += _file_faults(folder, merged, here) + _config_faults(folder, merged, scheme, plan)
    values = sum(layer.values for layer in layers)
    return PackedProof(
        len(expected), len(layers), values, max((each.error for each in layers), default=0.0), tuple(faults)
    )


def _tensors(file: Path) -> Mapping[str, StoredTensor]:
    return read_header(file).tensors


def _expected(merged: BaseFiles, scheme: Scheme, plan: PackingPlan) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that the folder must hold."""
    packed = {f"{module}.weight" for module in plan.packed}
    expected = {name: stored.shape for name, stored in merged.tensors.items() if name not in packed}
    for module in plan.packed:
        shapes = scheme.part_shapes(*merged.tensors[f"{module}.weight"].shape)
        expected |= {f"{module}.{part}": shape for part, shape in shapes.items()}
    return expected


def _is_same(one: StoredTensor, other: StoredTensor) -> bool:
    def raw(stored: StoredTensor, rows: tuple[int, int]) -> Tensor:
        return stored.read(*rows).contiguous().flatten().view(torch.uint8)

    return one.dtype == other.dtype and all(torch.equal(raw(one, rows), raw(other, rows)) for rows in one.blocks())


class _Layer:
    """A packed layer, and what its blocks of rows add up to."""

    def __init__(self, scheme: Scheme, parts: Mapping[str, StoredTensor]) -> None:
        self.scheme, self.parts, self.name = scheme, parts, ""
        self.values = self.outside = self.scales = self.wrong_scales = 0
        self.size = self.loss = self.largest = self.largest_scale = 0.0
        self.shape_fault = False
        self.global_scale = float(parts["weight_global_scale"].read()) if "weight_global_scale" in parts else 1.0

    def compare(self, name: str, right: StoredTensor) -> None:
        """Compare with the merged model's weight, block by block."""
        self.name = name
        if "weight_shape" in self.parts:
            self.shape_fault = tuple(self.parts["weight_shape"].read().tolist()) != right.shape
        for first, last in right.blocks():
            stored_OX = self.parts[self.scheme.parts[0]].read(first, last)
            scale_OG = self.parts["weight_scale"].read(first, last)
            self._add(self.scheme.codes(stored_OX), scale_OG, right.read(first, last))

    def _add(self, codes_OI: Tensor, stored_OG: Tensor, right_OI: Tensor) -> None:
        roundoff = torch.finfo(right_OI.dtype).eps / 2
        groups = stored_OG.shape[1]
        right_OGX = right_OI.float().unflatten(1, (groups, -1))
        amax_OG, scale_OG = right_OGX.abs().amax(-1), stored_OG.float() / self.global_scale
        fits_OG = (
            self._block_scales_fit(stored_OG.float(), amax_OG, roundoff)
            if self.scheme.name == "NVFP4"
            else _scales_fit(stored_OG, amax_OG / self.scheme.end, right_OI.dtype)
        )
        off_OGX = codes_OI.unflatten(1, (groups, -1)) * scale_OG[..., None] - right_OGX
        half_OGX = self.scheme.half_step(right_OGX.abs() / scale_OG[..., None]) * scale_OG[..., None]
        # The quotient of value and scale is rounded to the weight's type before it is rounded to the grid, and so is
        # the scale before that: a group's largest value may be that much beyond the end of the grid.
        bound_OGX = half_OGX * (1 + SLACK) + (2 * roundoff + SLACK) * right_OGX.abs()
        self.outside += int((~(off_OGX.abs() <= bound_OGX)).sum())  # NaN is outside, too
        self.values += right_OI.numel()
        self.scales += fits_OG.numel()
        self.wrong_scales += int((~fits_OG).sum())
        self.size += float(right_OGX.double().square().sum())
        self.loss += float(off_OGX.double().square().sum())
        self.largest = max(self.largest, float(amax_OG.max()))
        self.largest_scale = max(self.largest_scale, float(stored_OG.float().max()))

    def _block_scales_fit(self, stored_OG: Tensor, amax_OG: Tensor, roundoff: float) -> Tensor:
        """Tell which e4m3 scales are the nearest to what their 16 values ask for; 1/8 stands for those that round to
        zero."""
        asked_OG = amax_OG / self.scheme.end * self.global_scale
        slack_OG = (2 * roundoff + SLACK) * asked_OG
        near_OG = (stored_OG - asked_OG).abs() <= half_e4m3_step(asked_OG) + slack_OG
        return torch.where(stored_OG == 0.125, near_OG | (asked_OG - slack_OG <= 2.0**-10), near_OG)

    @property
    def error(self) -> float:
        return math.sqrt(self.loss / self.size) if self.size else 0.0

    def fault(self) -> str | None:
        """Say what is wrong with the layer; None where nothing is."""
        told = ["weight_shape is not the weight's shape"] if self.shape_fault else []
        if self.wrong_scales:
            told.append(f"{self.wrong_scales:,} of {self.scales:,} scales are not what the values ask for")
        if self.outside:
            told.append(f"{self.outside:,} of {self.values:,} values are beyond what {self.scheme.name} rounds")
        return ", ".join(told) or None


def _scales_fit(stored_OG: Tensor, asked_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """Tell which scales are those asked for, in the weight's type and to its last digit; one that rounds to zero is
    replaced by the type's epsilon."""
    limits = torch.finfo(dtype)
    rounded_OG = asked_OG.to(dtype)
    right_OG = torch.where(rounded_OG == 0, limits.eps, rounded_OG.float())
    tiniest = limits.smallest_normal * limits.eps
    return (stored_OG.float() - right_OG).abs() <= right_OG * limits.eps + tiniest


def _fused_faults(layers: list[_Layer]) -> list[str]:
    """Name layers that vLLM computes as one and whose global scales differ, and those that do not use e4m3 up to its
    end."""
    sets: dict[str, list[_Layer]] = {}
    for layer in layers:
        found = FUSED.match(layer.name)
        kind = "qkv" if found and found[2] in ("q_proj", "k_proj", "v_proj") else "gate_up"
        sets.setdefault(f"{found[1]}{kind}" if found else layer.name, []).append(layer)
    faults = []
    for name, fused in sets.items():
        if len({layer.global_scale for layer in fused}) > 1:
            faults.append(f"{name}: the global scales differ, and vLLM uses one for all of them")
        elif max(layer.largest for layer in fused) and max(each.largest_scale for each in fused) != E4M3_MAX:
            faults.append(f"{name}: the global scale is not what the largest value asks for")
    return faults


def _file_faults(folder: Path, merged: BaseFiles, here: Mapping[str, StoredTensor]) -> list[str]:
    """Compare the files beside the weights, and the index with the tensors."""
    own = {*merged.headers, WEIGHTS_FILE, WEIGHTS_INDEX, "config.json"}
    then = {name: file for name, file in kept_files(merged.folder).items() if name not in own}
    now = {name: file for name, file in kept_files(folder).items() if name not in own}
    faults = [f"{name} is missing" for name in sorted(then.keys() - now.keys())]
    faults += [f"{name} was added" for name in sorted(now.keys() - then.keys())]
    common = sorted(then.keys() & now.keys())
    faults += [f"{name} is not the merged model's" for name in common if digest(then[name]) != digest(now[name])]
    index = folder / WEIGHTS_INDEX
    places = read_json(index).get("weight_map") if index.is_file() else None
    if places is not None and places != {name: stored.file.name for name, stored in here.items()}:
        faults.append(f"{WEIGHTS_INDEX} does not say where the tensors are")
    return faults


def _config_faults(folder: Path, merged: BaseFiles, scheme: Scheme, plan: PackingPlan) -> list[str]:
    """Compare config.json with the merged model's, and its quantization_config with what was packed."""
    config = read_json(folder / "config.json")
    said: Any = config.pop("quantization_config", None) if isinstance(config, dict) else None
    faults = [] if config == json.loads(json.dumps(merged.config)) else ["config.json is not the merged model's"]
    try:
        (group,) = said["config_groups"].values()
        is_right = all(
            (
                *(said["quant_method"] == "compressed-tensors", said["quantization_status"] == "compressed"),
                *(said["format"] == group["format"] == scheme.layout, group["targets"] == ["Linear"]),
                *(said["ignore"] == list(plan.ignored), not said.get("kv_cache_scheme")),
                *(not said.get("transform_config"), group.get("output_activations") is None),
                _says(group["weights"], scheme.arguments),
                _says(group["input_activations"], scheme.activations),
            )
        )
    except (TypeError, KeyError, ValueError, AttributeError):
        is_right = False
    if not is_right:
        faults.append(f"config.json does not say what {scheme.name} is")
    return faults


def _says(found: Any, wanted: Mapping[str, Any] | None) -> bool:
    if wanted is None or found is None:
        return found is None and wanted is None
    return all(found.get(name) == value for name, value in wanted.items())
