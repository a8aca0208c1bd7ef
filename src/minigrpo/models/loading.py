"""Load a model and its tokenizer from a folder, a Hub id or the embedded model, with errors that say what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from minigrpo.errors import ModelError
from minigrpo.models.chat_template import PROBE_QUESTION, check_tokenizer, render, set_template_options
from minigrpo.models.limits import check_experts, check_trainable, refuse_fp8
from minigrpo.models.quantize import quantize_four_bit
from minigrpo.types import Prompt
from minigrpo.ui.progress import Report, no_report
from minigrpo.utils.cpu import bfloat16_instructions
from minigrpo.utils.process import no_progress_bars

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """An ordinary transformers model with its tokenizer. `warnings`: what may go wrong with its chat template."""

    model: Any
    tokenizer: Any
    path: str
    warnings: tuple[str, ...] = ()


def pick_device(name: str) -> torch.device:
    """Return the device of that name, and make a GPU with a number the current one.

    What names no device (a graph's capture, the peak of memory, libraries) then means it, too. Raise ModelError where
    it cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as fault:
        reason = str(fault).splitlines()[0]
        raise ModelError(f"model.device {name!r} cannot be used here ({reason}). See: minigrpo doctor") from None
    return device


LARGE_WIDTH = 512
"""Hidden size from which a CPU with bfloat16 in hardware is quicker in it: at 896, twice as quick as in float32, with
half of the memory. Products of narrow layers are so short that converting their inputs costs more than it saves."""


def pick_dtype(name: str | torch.dtype, device: torch.device, config: Any, *, full: bool = False) -> torch.dtype:
    """Return the dtype of that name for a model of this config. `full`: every parameter is trained.

    "auto": bfloat16 where a GPU has it in hardware (a T4 only emulates it: float16 there). On a CPU, bfloat16 where it
    has that in hardware and the model is large, else float32; float32 also where every parameter is trained.
    """
    if isinstance(name, torch.dtype):
        return name
    if name != "auto":
        if device.type == "cpu" and TORCH_DTYPES[name] != torch.float32:
            check_dtype_support(name)
        return TORCH_DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    large = int(getattr(config.get_text_config(), "hidden_size", 0)) >= LARGE_WIDTH
    return torch.bfloat16 if large and not full and _has_bfloat16() else torch.float32


def _has_bfloat16() -> bool:
    """Return whether the CPU has bfloat16 in hardware, and executes what it announces."""
    try:
        check_dtype_support("bfloat16")
    except ModelError:
        return False
    return bool(bfloat16_instructions())


@cache
def check_dtype_support(dtype: str) -> None:
    """Raise ModelError where 16-bit arithmetic would kill the process.

    Some virtual machines announce matrix instructions (AMX) that they then refuse. Only trying tells, so a child
    process tries.
    """
    if not hasattr(os, "fork"):
        return
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the pool of threads was not forked
        ones = torch.ones(64, 64, dtype=TORCH_DTYPES[dtype])
        ones @ ones
        os._exit(0)
    if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        raise ModelError(
            f"model.dtype {dtype}: this machine announces matrix instructions that it does not execute, so the process "
            "would be killed. Start it with ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 in the environment, or use "
            "--model.dtype float32"
        )


def resolve_model_path(path: str, seed: int, report: Report = no_report) -> str:
    """Return the folder or Hub id that a path stands for; `seedling` is built (once) and stands for its folder."""
    if path.partition(":")[0] == "seedling":
        from minigrpo.models.embedded import seedling

        return str(seedling.resolve_seedling(path, seed, report))
    return path


def open_model(
    path: str,
    *,
    revision: str | None,
    dtype: str | torch.dtype,
    device: torch.device,
    seed: int = 0,
    full: bool = False,
    template: Mapping[str, Any] | None = None,
    four_bit: bool = False,
    trained: bool = False,
    report: Report = no_report,
) -> LoadedModel:
    """Load a model and its tokenizer.

    `dtype` and `full`: as in `pick_dtype`. `template`: options of the chat template, which the tokenizer keeps from
    then on. `four_bit`: linear layers are packed (quantize.py), one by one, so the device never holds the model
    unpacked. `trained`: it is to be trained and delivered, not only judged (limits.py). Raise ModelError where the
    model is missing or broken, cannot be trained, or its tokenizer cannot render a conversation.
    """
    source = resolve_model_path(path, seed, report)
    folder = Path(source).expanduser()
    if folder.exists():
        _check_folder(folder)
        source = str(folder)
    elif source.count("/") != 1 or source.startswith((".", "/", "~", "runs/")):
        raise ModelError(
            f"model.path {path!r}: there is no such folder, and it is not a Hub id (owner/name). "
            "To try without a model of your own: --model.path seedling"
        )

    def dtype_of(config: Any) -> torch.dtype:
        if trained:
            check_trainable(config, source, revision)
        return pick_dtype(dtype, device, config, full=full)

    with no_progress_bars():
        model, tokenizer = _load(source, revision, dtype_of)
    if trained:  # now the files of a Hub id are there, too
        check_trainable(model.config, source, revision)
        check_experts(model, source)
    set_template_options(tokenizer, template or {})
    warnings = check_tokenizer(tokenizer)
    _check_vocabulary(model, tokenizer, source)
    if four_bit:
        model = quantize_four_bit(model, device)
    return LoadedModel(model.to(device).eval(), tokenizer, source, warnings)


def _load(source: str, revision: str | None, dtype_of: Callable[[Any], torch.dtype]) -> tuple[Any, Any]:
    config = open_config(source, revision)
    chosen, opener = dtype_of(config), model_class(config)
    tokenizer = open_tokenizer(source, revision)
    try:
        model, info = opener.from_pretrained(source, revision=revision, dtype=chosen, output_loading_info=True)
    except ModelError:
        raise
    except Exception as fault:  # transformers, safetensors and the Hub client raise some twenty kinds between them
        raise _not_loaded(f"the model at {source} could not be loaded", fault) from fault
    if missing := sorted(info["missing_keys"]):  # transformers would fill them with random values, and warn
        raise ModelError(
            f"{source} lacks {missing[0]} (and {len(missing) - 1} others), which its config.json asks for. Download or "
            "save the model again."
        )
    return model, tokenizer


def open_config(source: str | Path, revision: str | None = None) -> Any:
    """Return transformers' config of a folder or Hub id. Raise ModelError where it has none that can be used."""
    from transformers import AutoConfig

    folder = Path(source)
    what = f"{folder / 'config.json'} cannot be used"
    if folder.is_dir():
        _read_config(folder)
    else:
        what = f"the model at {source} could not be loaded"
    try:
        return AutoConfig.from_pretrained(source, revision=revision)
    except Exception as fault:
        raise _not_loaded(what, fault) from fault


def open_tokenizer(source: str | Path, revision: str | None = None) -> Any:
    """Return the tokenizer of a folder or Hub id. Raise ModelError where it has none that reads text."""
    from transformers import AutoTokenizer

    folder = Path(source)
    file = next((folder / name for name in _TOKENIZERS if (folder / name).is_file()), None)
    if folder.is_dir() and file is None:
        raise ModelError(
            f"{folder / 'tokenizer.json'} is missing, so text cannot become tokens. Download it, or save it again: "
            "tokenizer.save_pretrained(FOLDER)"
        )
    what = f"{file or f'the tokenizer of {source}'} could not be loaded"
    try:
        # Where mistral-common is installed, transformers would take its tokenizer, which knows no chat template.
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, mistral_format=False)
        reads = bool(tokenizer("a", add_special_tokens=False)["input_ids"])
    except Exception as fault:
        raise _not_loaded(what, fault) from fault
    if not reads:
        raise ModelError(f"{what}: it knows no token of the text 'a'. Download or save it again.")
    return tokenizer


_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
"""Files of which a tokenizer has at least one."""


def _not_loaded(what: str, fault: Exception) -> ModelError:
    return ModelError(f"{what}: {type(fault).__name__}: {' '.join(str(fault).split())[:300]}")


def model_class(config: Any) -> Any:
    """Return transformers' auto class for a model that writes text from this config; some also read images.

    Raise ModelError where the weights are in 8-bit floating point: they can be run, but not be trained.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    refuse_fp8(config)
    reads_pictures = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    writes = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if reads_pictures and not writes else AutoModelForCausalLM


def adapter_base(folder: Path) -> str | None:
    """Return the base model that an adapter folder names, or None where the folder holds no adapter."""
    config = folder / "adapter_config.json"
    if not config.is_file():
        return None
    try:
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        raise ModelError(f"{config} is damaged: it is not a PEFT adapter's JSON. Train or download it again.") from None
    if not base:
        raise ModelError(f"{config} names no base model (base_model_name_or_path). Add it, or evaluate a merged model.")
    return str(base)


def _check_vocabulary(model: Any, tokenizer: Any, source: str) -> None:
    """Raise ModelError where the tokenizer has ids that the model lacks.

    Only tokens that are used count: some tokenizer classes add one of their own that no text contains.
    """
    rows = model.get_input_embeddings().num_embeddings
    used = [tokenizer.eos_token_id, *render(tokenizer, Prompt("check", (PROBE_QUESTION,))).ids]
    if max(used) >= rows:
        raise ModelError(
            f"the tokenizer at {source} has a token with id {max(used)}, but the model knows {rows} tokens. "
            "Tokenizer and model do not belong together: save both from the same source."
        )


def _check_folder(folder: Path) -> None:
    _read_config(folder)
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ModelError(
            f"{folder} has a config.json but no weights (*.safetensors). Download or save the model again."
        )


def _read_config(folder: Path) -> None:
    """Raise ModelError where a folder's config.json is missing, damaged or asks for impossible sizes."""
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{folder} holds no config.json, so it is not a model folder. Give the folder that has it.")
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as fault:
        raise ModelError(f"{config} is damaged: {fault}. Download or save the model again.") from None
    if not isinstance(found, dict):
        raise ModelError(f"{config} is damaged: it is no JSON object. Download or save the model again.")
    check_sizes(found, config)


_LARGEST = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 1 << 24),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"), 1 << 14),
    "max_position_embeddings": 1 << 40,
}
"""Sizes in config.json, each with a number that no model comes near: more is a damaged file, and would be allocated."""


def check_sizes(config: Mapping[str, Any], file: Path) -> None:
    """Raise ModelError where config.json asks for a size that no model has. null stands for a default."""
    inner = config.get("text_config")
    parts = (config, inner if isinstance(inner, dict) else {})
    for name, value in ((name, part[name]) for part in parts for name in part.keys() & _LARGEST.keys()):
        for size in value if isinstance(value, list) else [value]:
            if size is not None and not (type(size) is int and 0 < size <= _LARGEST[name]):
                raise ModelError(
                    f"{file}: {name} is {str(size)[:40]}, and must be between 1 and {_LARGEST[name]}. Download or "
                    "save the model again."
                )
