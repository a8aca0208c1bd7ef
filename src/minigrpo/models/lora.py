"""LoRA through PEFT, with dropout masks drawn from named seeds.

PEFT writes and reads the adapter, so every other tool can, and PEFT decides which layers `all-linear` means. Two
things are ours: the adapter stays in the decoder where a vision tower stands beside it, and dropout is drawn from
(seed, step, token, module, channel), so that it is the same on recomputation, after a resume and in any micro-batch,
and off wherever log-probabilities are compared.
"""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minigrpo.config.schema import AdapterConfig
from minigrpo.errors import ArtifactError, MinigrpoError, ModelError, RecipeError, command_line
from minigrpo.models import lora_linear
from minigrpo.models.adapter import ADAPTER_FILE, require_finite_adapter
from minigrpo.models.lora_linear import SeededDropout
from minigrpo.models.peft_compat import prepare_peft, without_peft_warning
from minigrpo.models.safetensors_io import read_header
from minigrpo.utils.rng import name_key


def add_lora(model: nn.Module, config: AdapterConfig, *, seed: int) -> tuple[Any, list[SeededDropout]]:
    """Return the model under a fresh PEFT adapter (float32, B = 0), and the dropouts inside it."""
    prepare_peft()
    from peft import LoraConfig, get_peft_model

    targets = lora_targets(model, config.targets)
    lora_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        use_rslora=config.rslora,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(name_key(seed, "lora"))
    try:
        with without_peft_warning():
            wrapped = get_peft_model(model, lora_config).eval()
    except ValueError as fault:
        raise RecipeError(
            f"lora.targets {config.targets!r} fits no layer of this model ({str(fault)[:80]}...). "
            f"Its linear layers: {', '.join(linear_layer_names(model))}; or all-linear"
        ) from None
    if not isinstance(wrapped.get_output_embeddings(), nn.Linear):
        raise RecipeError(
            f"lora.targets {config.targets!r} includes the output head, which is scored without an adapter here. "
            "Leave it out; all-linear does."
        )
    lora_linear.fuse_lora_layers(wrapped)
    return wrapped, _seed_dropouts(wrapped) if config.dropout else []


def lora_targets(model: Any, targets: str) -> str | list[str]:
    """Return `targets` as PEFT takes them: names of layers, or one pattern of whole names.

    A pattern where the model has linear layers beside its decoder and head: those of a vision tower bear the same
    names as the decoder's, and stay as they are. Raise RecipeError for a name that no linear layer has: an embedding
    could be trained, and not be merged.
    """
    names = [target.strip() for target in targets.split(",")]
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    own = {id(module) for module in decoder.modules()}
    if targets != "all-linear":
        linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        _check_names(model, targets, [name for name, m in linear if id(m) in own or m is head])
    if all(id(m) in own or m is head for m in model.modules() if isinstance(m, nn.Linear)):
        return targets if targets == "all-linear" else names
    names = _layer_names(model, targets)
    names_by_id = {id(module): name for name, module in model.named_modules()}
    alternatives = "|".join(re.escape(name) for name in names)
    pattern = rf"{re.escape(names_by_id[id(decoder)])}\.(.+\.)?({alternatives})"
    # Named, the head must be met, so that it is refused and not passed over.
    return rf"{pattern}|{re.escape(names_by_id[id(head)])}" if names_by_id[id(head)] in names else pattern


def _layer_names(model: Any, targets: str) -> list[str]:
    return linear_layer_names(model) if targets == "all-linear" else [name.strip() for name in targets.split(",")]


def _check_names(model: Any, targets: str, layers: Sequence[str]) -> None:
    """Raise RecipeError for names that fit none of these layers by PEFT's rule: a name's last parts."""
    names = _layer_names(model, targets)
    missing = [name for name in names if not any(f".{layer}".endswith(f".{name}") and name for layer in layers)]
    if not missing:
        return
    what = " and ".join(repr(name) if name else "an empty name" for name in dict.fromkeys(missing))
    linear = linear_layer_names(model)
    near = [close for name in missing for close in difflib.get_close_matches(name, linear, n=1)]
    hint = f" Did you mean {' and '.join(dict.fromkeys(near))}?" if near else ""
    raise RecipeError(
        f"lora.targets {targets!r}: {what} fits no linear layer of this model.{hint} Those are: {', '.join(linear)}; "
        "or all-linear"
    )


def linear_layer_names(model: Any) -> list[str]:
    """Return the last parts of the names of the decoder's linear layers."""
    head = model.get_output_embeddings()
    layers = [name for name, m in model.get_decoder().named_modules() if isinstance(m, nn.Linear) and m is not head]
    return sorted({name.rsplit(".", 1)[-1] for name in layers})


def own_model(model: Any) -> Any:
    """Return transformers' own model, without PEFT's around it. An adapter inside it stays active."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def attach_adapter(model: nn.Module, folder: Path) -> Any:
    """Return the model under a finished adapter, as PEFT reads it.

    Raise ArtifactError for a file that is missing, damaged or not finite, and ModelError where the two do not belong
    together.
    """
    prepare_peft()
    from peft import PeftModel

    if folder.is_dir():
        require_finite_adapter(folder)
    with without_peft_warning():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")  # else the rest would stay as it began
        try:
            return PeftModel.from_pretrained(model, str(folder)).eval()
        except MinigrpoError:
            raise
        except Exception as fault:  # of PEFT, torch, and Python where adapter_config.json holds something else
            reason = " ".join(str(fault).split())[:200]
            look = command_line("minigrpo", "check", folder, "--base", "MODEL")
            raise ModelError(
                f"PEFT cannot put {folder} on its base: {reason}. Is that the model it was trained on? Look: {look}"
            ) from None


def save_adapter(model: Any, folder: Path) -> None:
    """Write a PEFT adapter; the same adapter gives the same bytes in every process.

    PEFT keeps the target names in a set, whose order changes with the process, so they are written again in order.
    """
    model.save_pretrained(folder)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()
        file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def load_adapter(model: Any, folder: Path) -> None:
    """Copy an adapter's tensors into the model's own adapter, exactly."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    file = folder / ADAPTER_FILE
    if not file.is_file():
        train = command_line("minigrpo", "train", "RECIPE", "--run", folder.parent)
        raise ArtifactError(f"{file} is missing. Train first: {train}")
    read_header(file)
    outcome = set_peft_model_state_dict(model, load_file(file))
    unexpected = [key for key in outcome.unexpected_keys if "lora_" in key]
    missing = [key for key in outcome.missing_keys if "lora_" in key]
    if unexpected or missing:
        raise ArtifactError(f"{file} belongs to another model or another lora setting: {(unexpected + missing)[0]}")


def _seed_dropouts(model: nn.Module) -> list[SeededDropout]:
    dropouts = []
    for name, module in model.named_modules():
        for adapter, dropout in getattr(module, "lora_dropout", {}).items():
            if isinstance(dropout, nn.Dropout):
                module.lora_dropout[adapter] = SeededDropout(dropout.p, name)
                dropouts.append(module.lora_dropout[adapter])
    return dropouts
