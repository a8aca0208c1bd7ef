"""What cannot be trained or delivered, said when a model is opened: the one place that knows.

Asked for the recipe's model by preflight, plan, warm-up and training alike, before anything is sampled; a model that is
only judged need not fulfil it. `check_trainable` needs a config, `check_experts` the model for what its config does not
tell, and `check_engine` the model under its adapter.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from minigrpo.errors import ModelError, RecipeError
from minigrpo.utils.paths import user_path

_PACKED_ENDING = re.compile(
    r"(-unsloth)?-(bnb-)?[48]-?bit$|-(gptq|awq)(-int\d)?$|-(gptq|awq)-\dbit$|[-.]w\d+a\d+$|-mxfp4$", re.IGNORECASE
)
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names under which configs tell the number of experts."""


def check_trainable(config: Any, source: str, revision: str | None = None) -> None:
    """Raise ModelError where the weights are packed already, lie in files that no stage after training reads, or are a
    mixture of experts.

    `source`: a folder or a Hub id; of the latter, files are seen once they have been downloaded.
    """
    refuse_fp8(config)
    folder = _local_files(source, revision)
    method = packing_method(config)
    if method:
        original = _PACKED_ENDING.sub("", source.rstrip("/"))
        name = f" Its name usually is {original}." if original != source.rstrip("/") else ""
        raise ModelError(
            f"the weights at {source} are packed already ({method}): they can be run, but neither trained here nor "
            f"merged into. Give the 16-bit original as --model.path; to train it in 4 bit: --model.quantize nf4.{name}"
        )
    if expert_count(config) > 1:
        raise ModelError(_mixture_message(source))
    if folder is not None and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{source} holds its weights in *.bin files alone, which could be trained, but not be merged or exported. "
            f"Convert them, and give the new folder as --model.path: {convert_command(source)}"
        )


def _local_files(source: str, revision: str | None) -> Path | None:
    folder = user_path(source)
    if folder.is_dir():
        return folder
    if source.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


def convert_command(source: str) -> str:
    """Return the command that saves a model again in safetensors, in a folder beside it."""
    there = f"{Path(source).name}-safetensors" if not Path(source).is_dir() else f"{source.rstrip('/')}-safetensors"
    code = (
        f"import transformers as t; t.AutoModelForCausalLM.from_pretrained({source!r}, dtype='auto')"
        f".save_pretrained({there!r}); t.AutoTokenizer.from_pretrained({source!r}).save_pretrained({there!r})"
    )
    return f"python -c {shlex.quote(code)}"


def packing_method(config: Any) -> str | None:
    """Return how config.json says that the weights are packed, such as "gptq, 4 bit"; None where they are not."""
    inner = getattr(config, "text_config", None)
    found = getattr(config, "quantization_config", None) or getattr(inner, "quantization_config", None)
    if not found:
        return None
    told = found if isinstance(found, dict) else found.to_dict()
    method = str(told.get("quant_method", "") or "quantised").rpartition(".")[2]
    bits = 4 if told.get("load_in_4bit") or told.get("_load_in_4bit") else told.get("bits") or told.get("w_bit")
    return f"{method}, {bits} bit" if bits else method


def refuse_fp8(config: Any) -> None:
    """Raise ModelError where the weights are in 8-bit floating point: they can be run, but not be trained."""
    if not is_fp8(config):
        return
    name = str(config.name_or_path).rstrip("/")
    other = name[: -len("-FP8")] if name.upper().endswith("-FP8") else f"{name}-BF16"
    raise ModelError(
        f"the weights at {name} are quantised to FP8: they can be run, but not be trained. Give their BF16 variant "
        f"as --model.path: its name usually is {other}"
    )


def is_fp8(config: Any) -> bool:
    """Tell whether config.json declares FP8 weights: by the method's name, or as a format of compressed-tensors."""
    quantization = getattr(config, "quantization_config", None) or {}
    quantization = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = str(quantization.get("quant_method", ""))
    return "fp8" in method or (method == "compressed-tensors" and "float" in str(quantization.get("format", "")))


def check_experts(model: Any, source: str) -> None:
    """Raise ModelError where the experts of a layer are one parameter, with a dimension for the expert."""
    if any(weight.dim() == 3 and "experts." in name for name, weight in model.named_parameters()):
        raise ModelError(_mixture_message(source))


def expert_count(config: Any) -> int:
    """Return how many experts a layer chooses from, as config.json says; 1 for a dense model."""
    inner = getattr(config, "text_config", None)
    told = [getattr(part, name, None) for part in (config, inner) for name in _EXPERT_COUNTS]
    return max((count for count in told if isinstance(count, int)), default=1)


def _mixture_message(source: str) -> str:
    return (
        f"the model at {source} is a mixture of experts, which are one tensor in memory and many in its files: it "
        "could be trained, but not be merged or exported. Use a dense model"
    )


def check_engine(model: Any, engine: str) -> None:
    """Raise RecipeError where an engine cannot sample from the model's adapter: only transformers computes DoRA."""
    if engine != "transformers" and has_dora(model):
        raise RecipeError(
            f"rollout.engine {engine} cannot sample from a DoRA adapter. Use --rollout.engine transformers, or merge "
            "it first: minigrpo merge ADAPTER"
        )


def has_dora(model: Any) -> bool:
    """Tell whether an adapter rescales rows (DoRA)."""
    return any(any(dict(module.use_dora).values()) for module in model.modules() if hasattr(module, "use_dora"))
