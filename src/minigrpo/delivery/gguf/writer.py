"""Write a model folder as GGUF without llama.cpp: for a few architectures, so that an export needs no network.

Names of tensors and keys come from the `gguf` package; a test compares the file with llama.cpp's own converter's,
tensor by tensor and key by key. Every other architecture is refused: a guess would give files that load and produce
nonsense.

Shapes: O rows of a weight, I columns.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigrpo.delivery.artifacts.merged_weights import duplicate_heads
from minigrpo.delivery.gguf.pretokenizer import pretokenizer_name
from minigrpo.errors import ModelError
from minigrpo.models.model_files import BaseFiles, open_base
from minigrpo.models.safetensors_io import StoredTensor

GGUF_ARCHITECTURES = {"qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama", "ministral3": "mistral3"}
"""transformers' model_type of the text part -> llama.cpp's name."""
PERMUTED_ARCHITECTURES = ("llama", "mistral3")
"""For these, RoPE rotates neighbouring pairs in llama.cpp and the two halves in transformers: rows of q and k are
permuted."""
ROPE_TYPES = {
    "qwen2": ("default", "yarn"),
    "qwen3": ("default", "yarn"),
    "llama": ("default", "llama3"),
    "mistral3": ("yarn",),
}


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the text part, with the whole model's values where it has none."""
    return {**config, **(config.get("text_config") or {})}


def rope_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the RoPE settings, from either of the two places where configs hold them."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "rope_theta" not in rope and config.get("rope_theta") is not None:
        rope["rope_theta"] = config["rope_theta"]
    rope.setdefault("rope_type", rope.get("type", "default"))
    return rope


def unsupported_reason(config: Mapping[str, Any]) -> str | None:
    """Return why this writer does not write such a model; None where it does."""
    config = text_config(config)
    kind = config.get("model_type")
    arch = GGUF_ARCHITECTURES.get(str(kind))
    if arch is None:
        return f"the architecture {kind!r} is none of {', '.join(GGUF_ARCHITECTURES)}"
    if (rope := rope_config(config)["rope_type"]) not in ROPE_TYPES[arch]:
        return f"{kind} with a rotation of type {rope!r}"
    if config.get("use_sliding_window") or (arch == "mistral3" and config.get("sliding_window")):
        return f"{kind} with a sliding window"
    if config.get("hidden_act", "silu") != "silu":
        return f"{kind} with {config['hidden_act']} for silu"
    return None


def write_gguf(folder: Path, file: Path, kind: str, name: str) -> None:
    """Write the file. `kind`: F32, F16 or BF16. Raises ModelError for a model that this writer does not know
    exactly."""
    import gguf

    base = open_base(folder)
    config = text_config(base.config)
    if reason := unsupported_reason(base.config):
        raise ModelError(f"{folder}: {reason}, which cannot be written without llama.cpp's converter.")
    arch = GGUF_ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(file, arch)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        _add_shape(writer, arch, config)
        _add_rope(writer, arch, rope_config(config))
        files = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}
        writer.add_file_type(gguf.LlamaFileType[files[kind]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_vocabulary(writer, folder, config)
        with report_full_disk():
            _write_tensors(writer, base, kind)
    finally:
        writer.close()


@contextmanager
def report_full_disk() -> Iterator[None]:
    """Turn numpy's error on a full disk, which only tells how many bytes it could not write, into ENOSPC."""
    try:
        yield
    except OSError as fault:
        if fault.errno is not None or "requested and" not in str(fault):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from fault


def _add_shape(writer: Any, arch: str, config: Mapping[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if arch in PERMUTED_ARCHITECTURES:
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(_head_dim(config))


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _add_rope(writer: Any, arch: str, rope: Mapping[str, Any]) -> None:
    import gguf

    if "rope_theta" in rope:
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] != "yarn":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope.get("attention_factor") is not None:
        writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
    if rope.get("beta_fast") is not None:
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    if rope.get("beta_slow") is not None:
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if arch == "mistral3":
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        # Scales up queries at far positions; without it the file is right for short texts only.
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])


def _add_vocabulary(writer: Any, folder: Path, config: Mapping[str, Any]) -> None:
    import gguf
    from tokenizers import Tokenizer

    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    added = core.get_added_tokens_decoder()
    words = {token_id: word for word, token_id in core.get_vocab(with_added_tokens=True).items()}
    size = config["vocab_size"]
    if words and max(words) >= size:
        raise ModelError(f"{folder}: its tokenizer has a token {max(words)}, but the model knows {size} tokens.")
    tokens, kinds = [], []
    for token_id in range(size):
        word = words.get(token_id)
        tokens.append(f"[PAD{token_id}]" if word is None else word)
        if word is None:
            kinds.append(gguf.TokenType.UNUSED)
        elif token_id not in added:
            kinds.append(gguf.TokenType.NORMAL)
        elif added[token_id].special or (word.startswith("<|") and word.endswith("|>")):
            kinds.append(gguf.TokenType.CONTROL)
        else:
            kinds.append(gguf.TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pretokenizer_name(folder))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    gguf.SpecialVocab(folder, load_merges=True).add_to_gguf(writer, quiet=True)


@dataclass(frozen=True, slots=True)
class GgufSource:
    """Where a tensor of the file comes from: the model's files, or values that were computed. `heads`: the rows are
    those of so many heads, and stand in llama.cpp's order in the file; None: as they are."""

    values: StoredTensor | Tensor
    heads: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def read(self) -> Tensor:
        """Return all values in the model's own order."""
        return self.values.read() if isinstance(self.values, StoredTensor) else self.values


def gguf_sources(base: BaseFiles) -> dict[str, GgufSource]:
    """Return where each tensor of the model's file comes from, in the file's order. Raises ModelError for a tensor that
    has no place there."""
    config = text_config(base.config)
    arch = GGUF_ARCHITECTURES[config["model_type"]]
    heads = {"attn_q": config["num_attention_heads"]}
    heads["attn_k"] = config.get("num_key_value_heads") or heads["attn_q"]
    found: dict[str, GgufSource] = {}
    if (factors := _rope_factors(rope_config(config), _head_dim(config))) is not None:
        found["rope_freqs.weight"] = GgufSource(factors)
    for name, new in _gguf_names(base, arch, config["num_hidden_layers"]).items():
        part = new.split(".")[2] if new.startswith("blk.") else ""
        permuted = heads.get(part) if arch in PERMUTED_ARCHITECTURES else None
        found[new] = GgufSource(base.tensors[name], permuted)
    return found


def _write_tensors(writer: Any, base: BaseFiles, kind: str) -> None:
    """Write the headers of all tensors, then their values, one tensor at a time."""
    import gguf
    import numpy as np

    sources = gguf_sources(base)
    for new, source in sources.items():
        shape = source.shape
        quant = gguf.GGMLQuantizationType[_stored_type(new, shape, kind)]
        stored = np.dtype(np.float16 if quant.name == "F16" else np.float32)
        size = math.prod(shape) * (2 if quant.name != "F32" else 4)
        as_bytes = quant.name == "BF16"
        stored_shape = (*shape[:-1], 2 * shape[-1]) if as_bytes else shape
        writer.add_tensor_info(new, stored_shape, np.dtype(np.uint8) if as_bytes else stored, size, quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for new, source in sources.items():
        values = _permuted(source.read(), source.heads)
        writer.write_tensor_data(_to_numpy(values, _stored_type(new, source.shape, kind)))


def _gguf_names(base: BaseFiles, arch: str, layers: int) -> dict[str, str]:
    """Map the text part's tensor names to the file's. Raises ModelError for an unknown name."""
    import gguf

    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table = gguf.get_tensor_name_map(number, layers)
    dropped = duplicate_heads(base)
    found = {}
    for name in base.tensors:
        if name in dropped or not base.is_text(name) or name.endswith(".rotary_emb.inv_freq"):
            continue
        new = table.get_name(name.replace("language_model.", ""), try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ModelError(f"{base.folder} holds {name}, for which a GGUF file of a {arch} has no place.")
        found[name] = new
    return found


def _stored_type(name: str, shape: tuple[int, ...], kind: str) -> str:
    """Return the type a tensor is stored in: vectors and norms are small, and keep float32."""
    return "F32" if len(shape) <= 1 or name.endswith("_norm.weight") or not name.endswith(".weight") else kind


def _permuted(values: Tensor, heads: int | None) -> Tensor:
    """Return the rows of q and k in llama.cpp's order; other tensors unchanged."""
    if heads is None:
        return values
    halves = values.view(heads, 2, values.shape[0] // heads // 2, -1)
    return halves.transpose(1, 2).reshape(values.shape)


def _to_numpy(values: Tensor, kind: str) -> Any:
    if kind == "BF16":
        return values.bfloat16().contiguous().view(torch.uint8).numpy()
    if kind == "F16":
        half = values.half()
        if not torch.isfinite(half).all():
            raise ModelError("A weight is beyond 65504, which F16 cannot hold. Export as BF16 or F32.")
        return half.contiguous().numpy()
    return values.float().contiguous().numpy()


def _rope_factors(rope: Mapping[str, Any], width: int) -> Tensor | None:
    """Return the frequency factors of Llama 3's RoPE: long wavelengths are slowed down fully, short ones not at all."""
    if rope["rope_type"] != "llama3":
        return None
    old, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = old / rope["low_freq_factor"], old / rope["high_freq_factor"]
    factors = []
    for step in range(0, width, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (step / width)
        share = (old / wave - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        factors.append(1.0 if wave < high else factor if wave > low else 1 / ((1 - share) / factor + share))
    return torch.tensor(factors, dtype=torch.float32)


def read_keys(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield every key of a GGUF file with its value, in plain Python."""
    import gguf

    for name, field in gguf.GGUFReader(file).fields.items():
        yield name, json.loads(json.dumps(field.contents(), default=str))
