"""A base model's files: which tensor is in which shard, what is tied, and the files beside the weights.

No weights are loaded; tensors are named as on the disk. `on_disk` maps a parameter's name in memory to that name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minigrpo.errors import ModelError
from minigrpo.models.loading import check_sizes, resolve_model_path
from minigrpo.models.safetensors_io import FLOAT_DTYPES, SafetensorsHeader, StoredTensor, read_header
from minigrpo.models.vllm_compat import ministral3_attention_scale
from minigrpo.runs.rundir import digest
from minigrpo.utils.paths import user_path

WEIGHTS_FILE, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"

PREFIX_RENAMES = (
    ("", ""),
    ("model.language_model.", "language_model.model."),
    ("model.", "language_model.model."),
    ("model.", "model.language_model."),
    ("lm_head", "language_model.lm_head"),
    ("model.", ""),
    ("", "model."),
)
"""Name prefixes in memory and on the disk: models that also read images are saved under older names."""

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.*",
)
COMPANION_FILES = ("generation_config.json", "*processor_config.json", "*.py", "LICENSE*", "NOTICE*")
"""Not the likes of consolidated.safetensors, params.json and tekken.json: a base's weights and tokenizer in another
format beside merged ones would be taken for theirs."""


@dataclass(frozen=True, slots=True)
class BaseFiles:
    """A base model's folder: `headers` by shard, in order; `tensors` of all shards. `dtype`: of most weights."""

    folder: Path
    config: Mapping[str, Any]
    headers: Mapping[str, SafetensorsHeader]
    tensors: Mapping[str, StoredTensor]
    dtype: torch.dtype

    @property
    def sharded(self) -> bool:
        return not (self.folder / WEIGHTS_FILE).is_file()

    @property
    def tied(self) -> bool:
        """Tell whether the output head is the embedding. The outer config counts: it is what transformers asks."""
        inner = self.config.get("text_config") or {}
        return bool(self.config.get("tie_word_embeddings", inner.get("tie_word_embeddings", False)))

    def is_text(self, name: str) -> bool:
        """Tell whether a tensor belongs to the text model, not to a vision tower or its projector."""
        return "text_config" not in self.config or "language_model." in name or "lm_head" in name

    def on_disk(self, name: str) -> str | None:
        """Return the name in the files of a parameter of the model in memory; None where they have none."""
        for here, there in PREFIX_RENAMES:
            renamed = there + name.removeprefix(here)
            if name.startswith(here) and renamed in self.tensors:
                return renamed
        return None

    def fingerprint(self) -> str:
        """Hash config and weights: every byte is read."""
        total = hashlib.sha256()
        for file in (self.folder / "config.json", *(self.folder / shard for shard in self.headers)):
            total.update(f"{file.name} {digest(file)}\n".encode())
        return total.hexdigest()


def find_base(path: str, *, revision: str | None = None, seed: int = 0) -> BaseFiles:
    """Open a base from a folder, a Hub id (downloaded if needed) or the embedded model's name. Raise ModelError."""
    source = resolve_model_path(path, seed)
    folder = user_path(source)
    if not folder.is_dir() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise ModelError(
            f"The base model {source} is not there: it was moved or deleted. Say where it is: --base FOLDER"
        )
    return open_base(folder if folder.is_dir() else _download(source, revision))


def local_fingerprint(path: str, revision: str | None = None) -> str | None:
    """Hash a base in a folder or in the Hub client's cache; None where it lies in no such place, or not in safetensors.
    Nothing is downloaded."""
    folder = user_path(path)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(path, "config.json", revision=revision)
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    try:
        return open_base(folder).fingerprint()
    except ModelError:
        return None


def local_config(path: str, revision: str | None = None) -> dict[str, Any]:
    """Return config.json of a base in a folder or in the Hub client's cache, else {}. Nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    file = user_path(path) / "config.json"
    cached = None
    if not file.is_file() and path.count("/") == 1 and not path.startswith((".", "/", "~")):
        cached = try_to_load_from_cache(path, "config.json", revision=revision)
    file = Path(cached) if isinstance(cached, str) else file
    return _read_json(file, "") if file.is_file() else {}


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    kinds = ["model*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py", "LICENSE*", "NOTICE*"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=kinds))
    except Exception as fault:  # the Hub client raises a dozen kinds, and those of two HTTP libraries
        reason = " ".join(str(fault).split())[:200]
        raise ModelError(
            f"The base model {name} is neither here nor could it be downloaded ({type(fault).__name__}: {reason}). "
            "Say where it is: --base FOLDER"
        ) from fault


def open_base(folder: Path) -> BaseFiles:
    """Open a base folder.

    Raise ModelError for one that cannot be merged into, and ArtifactError where a shard is missing or damaged.
    """
    config = _read_json(folder / "config.json", f"{folder} holds no config.json, so it is not a model folder.")
    check_sizes(config, folder / "config.json")
    _refuse_quantised(folder, config)
    headers = {name: read_header(folder / name) for name in _shard_names(folder)}
    tensors = {name: stored for header in headers.values() for name, stored in header.tensors.items()}
    sizes: Counter[str] = Counter()
    for stored in tensors.values():
        sizes[stored.dtype] += stored.stop - stored.start
    if packed := sorted(name for name in tensors if tensors[name].dtype.startswith("F8") or ".absmax" in name):
        raise ModelError(f"{folder} holds quantised weights ({packed[0]}). {_OTHER_BASE}")
    floats = [name for name, _ in sizes.most_common() if name in FLOAT_DTYPES]
    if not floats:
        raise ModelError(f"{folder} holds no floating-point weights. {_OTHER_BASE}")
    stored = next(tensor for tensor in tensors.values() if tensor.dtype == floats[0])
    return BaseFiles(folder, config, headers, tensors, stored.torch_dtype)


_OTHER_BASE = "Merge into its 16-bit original instead (often the same name with -BF16, or without -FP8): --base MODEL"


def _refuse_quantised(folder: Path, config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if quantization:
        kind = quantization.get("quant_method", "quantised") if isinstance(quantization, dict) else "quantised"
        raise ModelError(f"The weights of {folder} are quantised ({kind}), so a change cannot be added. {_OTHER_BASE}")


def _shard_names(folder: Path) -> list[str]:
    if (folder / WEIGHTS_FILE).is_file():
        return [WEIGHTS_FILE]
    if not (folder / WEIGHTS_INDEX).is_file():
        others = "only *.bin files" if any(folder.glob("*.bin")) else "no weights"
        raise ModelError(
            f"{folder} has neither {WEIGHTS_FILE} nor {WEIGHTS_INDEX}, and {others}. Save the model again with "
            "transformers: model.save_pretrained(FOLDER)"
        )
    index = _read_json(folder / WEIGHTS_INDEX, "")
    try:
        shards = list(dict.fromkeys(index["weight_map"].values()))
        for name in shards:
            if Path(name).name != name:
                raise ModelError(
                    f"{folder / WEIGHTS_INDEX} names {name}, which is no file of its folder. Do not use this model."
                )
            here = {tensor for tensor, shard in index["weight_map"].items() if shard == name}
            if missing := sorted(here - read_header(folder / name).tensors.keys()):
                raise ModelError(
                    f"{folder / name} lacks {missing[0]}, which {WEIGHTS_INDEX} promises. Download it again."
                )
    except (KeyError, AttributeError, TypeError):
        raise ModelError(f"{folder / WEIGHTS_INDEX} is damaged. Download or save the model again.") from None
    return shards


def _read_json(file: Path, otherwise: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{otherwise} Give the folder that has it.") from None
    except (OSError, ValueError, RecursionError) as fault:
        raise ModelError(f"{file} is damaged ({fault}). Download or save the model again.") from None
    if not isinstance(found, dict):
        raise ModelError(f"{file} is damaged: it is no JSON object. Download or save the model again.")
    return found


def write_companions(base: BaseFiles, trained: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write everything beside the weights. The tokenizer is the trained one: its chat template holds its options."""
    tokenizer = trained if (trained / "tokenizer_config.json").is_file() else base.folder
    for source, patterns in ((base.folder, COMPANION_FILES), (tokenizer, TOKENIZER_FILES)):
        for file in sorted(file for pattern in patterns for file in source.glob(pattern) if file.is_file()):
            shutil.copyfile(file, folder / file.name)
    for file in sorted(base.folder.glob("tokenizer.model*")):  # other tools' converters read it; saving leaves it out
        shutil.copyfile(file, folder / file.name)
    _write_config(
        folder / "config.json", base.config, compatible_config(base.config, dtype), base.folder / "config.json"
    )
    tokens = folder / "tokenizer_config.json"
    if tokens.is_file():
        config = _read_json(tokens, "")
        _write_config(tokens, config, compatible_tokenizer_config(config))


def compatible_tokenizer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokenizer_config.json with a class and extra special tokens that transformers 4 understands, too."""
    found = dict(config)
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    more = found.get("extra_special_tokens")
    if isinstance(more, list) and "additional_special_tokens" not in found:  # it takes a mapping under that name
        del found["extra_special_tokens"]
        found |= {"additional_special_tokens": more} if more else {}
    return found


def compatible_config(config: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Return the config with its dtype, and with the RoPE settings where other programs look for them.

    transformers 4 takes a theta of 10000 unless `rope_theta` is at the top level, and scales no positions for long
    texts without `rope_scaling`; vLLM leaves out Ministral 3's attention scale beyond the original context without
    `llama_4_scaling`.
    """
    inner = {"text_config": compatible_config(config["text_config"], dtype)} if config.get("text_config") else {}
    rope = config.get("rope_parameters") or {}
    turned: dict[str, Any] = {}
    if "rope_theta" in rope and "rope_theta" not in config:
        turned["rope_theta"] = rope["rope_theta"]
    if (
        rope.get("rope_type", "default") != "default"
        and not config.get("rope_scaling")
        and not _scales_attention(config)
    ):
        turned["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    turned |= ministral3_attention_scale(config)
    said = [name for name in ("dtype", "torch_dtype") if name in config]
    outer = ["dtype"] if not said and "model_type" in config and "architectures" in config else said
    kinds = {name: str(dtype).removeprefix("torch.") for name in outer} if dtype else {}
    return {**config, **inner, **turned, **kinds}


def _scales_attention(config: Mapping[str, Any]) -> bool:
    """Tell whether this is a Ministral 3, which transformers 4 does not know."""
    return "llama_4_scaling_beta" in (config.get("rope_parameters") or {})


def _write_config(file: Path, then: Mapping[str, Any], now: Mapping[str, Any], original: Path | None = None) -> None:
    """Write a config; where nothing changed, copy the original byte for byte."""
    if then != now:
        text = json.dumps(now, indent=2, ensure_ascii=False) + "\n"
        # Half a character has no bytes: it is escaped, as JSON does.
        file.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
    elif original is not None:
        shutil.copyfile(original, file)
