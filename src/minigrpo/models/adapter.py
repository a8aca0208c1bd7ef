"""LoRA adapters as numbers: the low-rank pair of each linear layer, in a model and in PEFT's files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigrpo.errors import ArtifactError, ModelError
from minigrpo.models.safetensors_io import FLOAT_DTYPES, SafetensorsHeader, StoredTensor, read_header

ADAPTER_FILE = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_TENSOR_ENDINGS = {
    **{".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_magnitude_vector": "magnitude"},
    **{".lora_magnitude_vector.weight": "magnitude", ".lora_embedding_A": "A", ".lora_embedding_B": "B"},
}
"""Endings of tensor names in PEFT's files, and the part of the adapter that each stands for."""

_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva_base")
"""Initialisations that change the base's own weights: base + adapter is then not what was trained."""

_UNSUPPORTED_OPTIONS = {
    "target_parameters": "adapts parameters that are no layers",
    "trainable_token_indices": "trains single rows of the embedding",
    "layer_replication": "repeats layers of its base",
    "use_qalora": "is a QALoRA adapter",
    "use_bdlora": "is a block-diagonal adapter",
    "alora_invocation_tokens": "is switched on by certain tokens only",
    "lora_bias": "has a bias of its own (lora_bias)",
}


def active_lora(module: Any) -> tuple[Tensor, Tensor, float] | None:
    """Return (A [r, in], B [out, r], scale) of a layer's active PEFT LoRA adapter; None where there is none.

    The layer computes x W' + scale * (x A') B'. Raise ModelError for adapters that are more than one such pair.
    """
    if not hasattr(module, "lora_A") or module.disable_adapters:
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    if not active:
        return None
    if len(active) > 1 or module.merged or getattr(module, "use_dora", {}).get(active[0], False):
        raise ModelError("only one plain LoRA adapter at a time can be sampled from: use --rollout.engine transformers")
    name = active[0]
    return module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name])


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The adapter of one layer, as stored on the disk.

    The weight becomes W + scale B A; with a magnitude m (DoRA), each row of that is rescaled to the norm in m.

    `flipped`: the weight is stored as [in, out], so the transposed product is added to it.
    """

    module: str
    a: StoredTensor
    b: StoredTensor
    scale: float
    magnitude: StoredTensor | None = None
    flipped: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the weight that the pair is added to."""
        rows, columns = self.b.shape[0], self.a.shape[1]
        return (columns, rows) if self.flipped else (rows, columns)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (left, right) in float32: left @ right is added to the weight. Raise ArtifactError on NaN."""
        a_RI, b_OR = self.a.read().float(), self.b.read().float()
        _require_finite(self.a, a_RI)
        _require_finite(self.b, b_OR)
        return (a_RI.T.contiguous(), self.scale * b_OR.T) if self.flipped else (self.scale * b_OR, a_RI)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's files: names and shapes, no values.

    `pairs` by module; `whole`: tensors that replace a parameter of the base, by its name in memory.
    """

    folder: Path
    config: Mapping[str, Any]
    pairs: Mapping[str, LoraPair]
    whole: Mapping[str, StoredTensor]

    @property
    def base(self) -> str | None:
        return self.config.get("base_model_name_or_path") or None

    @property
    def targets(self) -> str | list[str]:
        """Return a pattern of module names, or the endings that they may have."""
        targets = self.config.get("target_modules") or []
        return targets if isinstance(targets, str) else sorted(targets)


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder.

    Raise ArtifactError where a file is missing or damaged, ModelError for a kind of adapter that is not supported.
    """
    config = read_adapter_config(folder)
    file = folder / ADAPTER_FILE
    parts: dict[str, dict[str, StoredTensor]] = {}
    whole: dict[str, StoredTensor] = {}
    for key, stored in read_adapter_header(folder).tensors.items():
        name = key.removeprefix(_PEFT_PREFIX)
        end = next((end for end in _TENSOR_ENDINGS if name.endswith(end)), None)
        if end is not None:
            parts.setdefault(name.removesuffix(end), {})[_TENSOR_ENDINGS[end]] = stored
        elif ".lora_" in name or "trainable_tokens" in name:
            raise ModelError(f"{file} holds {key}, which is no part of a plain or DoRA adapter.")
        else:
            whole[name.replace(".modules_to_save", "").replace(".base_layer", "")] = stored
    pairs = {module: _pair(module, found, config, file) for module, found in parts.items()}
    # PEFT saves a copy of an embedding that it adapts: the base has the same.
    whole = {name: stored for name, stored in whole.items() if name.removesuffix(".weight") not in pairs}
    if not pairs and not whole:
        raise ArtifactError(f"{file} holds no tensors: nothing was saved. Train again.")
    return Adapter(folder, config, pairs, whole)


def read_adapter_header(folder: Path) -> SafetensorsHeader:
    """Read which tensors an adapter holds. Raise ArtifactError where PEFT's file is missing or damaged, or where its
    names are another tool's."""
    file = folder / ADAPTER_FILE
    if not file.is_file():
        if (old := folder / "adapter_model.bin").is_file():
            raise ArtifactError(
                f"{file} is missing; {old.name} is a pickle, which may run anything when it is read. If you trust it, "
                "write it anew in Python: safetensors.torch.save_file(torch.load(BIN, weights_only=True), FILE)"
            )
        raise ArtifactError(f"{file} is missing. Copy or download the adapter again, or train it.")
    header = read_header(file)
    foreign = next((name for name in header.tensors if not name.startswith(_PEFT_PREFIX)), None)
    if foreign is not None:
        raise ArtifactError(
            f"{file} holds {foreign}, but names of PEFT's adapters begin with {_PEFT_PREFIX}: another tool wrote it. "
            "Save it again with PEFT, or merge it with that tool."
        )
    return header


def require_finite_adapter(folder: Path) -> None:
    """Raise ArtifactError where a value of an adapter is NaN or infinite, or its file is not PEFT's."""
    for stored in read_adapter_header(folder).tensors.values():
        if stored.dtype in FLOAT_DTYPES:
            for first, last in stored.blocks():
                _require_finite(stored, stored.read(first, last))


def _require_finite(stored: StoredTensor, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise ArtifactError(
            f"{stored.file}: {stored.name} holds values that are not finite (NaN or infinity), so the training failed. "
            "Take an earlier checkpoint, or train again at a lower train.lr."
        )


def read_adapter_config(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"{file} is missing, so {folder} is no adapter. Train first: minigrpo train RECIPE"
        ) from None
    except (OSError, ValueError, RecursionError) as fault:
        raise ArtifactError(f"{file} is damaged ({fault}). Copy or download the adapter again, or train it.") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ModelError(f"{file} is of type {kind}; only LoRA and its variants DoRA and rsLoRA are understood.")
    _check_options(config, file)
    for name, what in _UNSUPPORTED_OPTIONS.items():
        if config.get(name):
            raise ModelError(f"The adapter {folder} {what}, which cannot be read here. Merge it with PEFT.")
    begun = str(config.get("init_lora_weights", "")).lower()
    if begun.startswith(_INITS_THAT_CHANGE_THE_BASE):
        raise ModelError(
            f"The adapter {folder} began as {begun}, which changes the base's own weights. Save it again with PEFT's "
            "path_initial_model_for_weight_conversion, which makes a plain adapter of it."
        )
    return config


def _is_pattern(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # a comparison with NaN is false


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= LARGEST_RANK


def _is_layers(value: Any) -> bool:
    return type(value) is int or (isinstance(value, list) and all(type(one) is int for one in value))


def _is_table(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(_is_pattern(name) and fits(one) for name, one in value.items())


LARGEST_RANK = 1 << 16
_OPTIONS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, f"a whole number, 1 to {LARGEST_RANK}"),
    "lora_alpha": (_is_number, "a number"),
    "target_modules": (lambda value: _is_texts(value) or _is_pattern(value), "a list of names, or a pattern"),
    "exclude_modules": (lambda value: _is_texts(value) or _is_pattern(value), "a list of names, or a pattern"),
    "modules_to_save": (_is_texts, "a list of names"),
    "layers_to_transform": (_is_layers, "a whole number, or a list of them"),
    "rank_pattern": (lambda value: _is_table(value, _is_rank), "ranks by patterns of names"),
    "alpha_pattern": (lambda value: _is_table(value, _is_number), "numbers by patterns of names"),
    "base_model_name_or_path": (lambda value: isinstance(value, str), "text"),
    "revision": (lambda value: isinstance(value, str), "text"),
    **dict.fromkeys(
        ("use_rslora", "use_dora", "fan_in_fan_out"), (lambda value: isinstance(value, bool), "true or false")
    ),
}
"""Options of an adapter that are read here: a test of the value, and what it may be. null stands for PEFT's default."""
_NEEDED = ("r", "lora_alpha")
"""Options without which an adapter says nothing."""


def _check_options(config: Mapping[str, Any], file: Path) -> None:
    """Raise ArtifactError for an option that PEFT would not have written."""
    for name, (fits, words) in _OPTIONS.items():
        value = config.get(name)
        if not fits(value) if value is not None else name in _NEEDED:
            raise ArtifactError(
                f"{file}: {name} is {json.dumps(value)[:80]}, and must be {words}. Copy or download the adapter again."
            )


def _pair(module: str, parts: Mapping[str, StoredTensor], config: Mapping[str, Any], file: Path) -> LoraPair:
    if missing := sorted({"A", "B"} - parts.keys()):
        raise ArtifactError(f"{file} has no lora_{missing[0]} for {module}: half of the adapter is missing.")
    a, b, magnitude = parts["A"], parts["B"], parts.get("magnitude")
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise ModelError(f"{file}: {module} has an A of shape {a.shape} and a B of shape {b.shape}; no pair of layers.")
    if not min(*a.shape, *b.shape):
        raise ArtifactError(f"{file}: {module} has an A of shape {a.shape} and a B of shape {b.shape}: it is empty.")
    if magnitude is not None and math.prod(magnitude.shape) != b.shape[0]:
        raise ArtifactError(f"{file}: {module} has {b.shape[0]} rows, and a magnitude of shape {magnitude.shape}.")
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise ArtifactError(f"{file}: {module} and use_dora in adapter_config.json contradict one another.")
    flipped = bool(config.get("fan_in_fan_out")) or "lora_embedding" in a.name
    if flipped and magnitude is not None:
        raise ModelError(f"{file}: {module} is a DoRA adapter of a transposed layer. Merge it with PEFT.")
    alpha = _alpha(module, config)
    rank = a.shape[0]
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraPair(module, a, b, scale, magnitude, flipped)


def _alpha(module: str, config: Mapping[str, Any]) -> float:
    """Return a module's alpha by PEFT's own rule. (Its rank is the tensors' shape.)"""
    pattern = config.get("alpha_pattern") or {}
    if not pattern:
        return float(config["lora_alpha"])
    from peft.utils.other import get_pattern_key

    return float(pattern.get(get_pattern_key(pattern.keys(), module), config["lora_alpha"]))


@dataclass(frozen=True, slots=True)
class PairStats:
    """Statistics of one pair: Frobenius norms of A, B and their product, and the share of exact zeros in A and B."""

    module: str
    rank: int
    norm_a: float
    norm_b: float
    norm_delta: float
    zeros: float
    finite: bool

    @property
    def untrained(self) -> bool:
        """Tell whether B is still zero, as at the start: one gradient step changes all of it."""
        return self.finite and self.norm_b == 0


def pair_stats(pair: LoraPair) -> PairStats:
    """Measure a pair. The squared norm of B A is the trace of (A A')(B' B), rank x rank: no need of the product."""
    a_RI, b_OR = pair.a.read().double(), pair.b.read().double()
    finite = bool(torch.isfinite(a_RI).all() and torch.isfinite(b_OR).all())
    finite = finite and (pair.magnitude is None or bool(torch.isfinite(pair.magnitude.read()).all()))
    zeros = float((a_RI == 0).sum() + (b_OR == 0).sum()) / max(1, a_RI.numel() + b_OR.numel())
    square = float(((a_RI @ a_RI.T) * (b_OR.T @ b_OR)).sum()) if finite else math.nan
    delta = pair.scale * math.sqrt(max(0.0, square)) if finite else math.nan
    norms = (float(a_RI.norm()), float(b_OR.norm())) if finite else (math.nan, math.nan)
    return PairStats(pair.module, pair.rank, *norms, delta, zeros, finite)
