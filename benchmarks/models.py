"""The benchmark's models: the embedded one, and random weights in the shape of others with one token a byte."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 0
REAL = "MINIGRPO_REAL_MODEL"
"""The variable that names the folder of a pretrained model."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a decoder. `dtype`: of the weights in its folder."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    dtype: str = "float32"
    architecture: str = "qwen2"
    width: int = 64


HALF = Sizes(vocab=151936, hidden=896, layers=24, heads=14, kv_heads=2, inner=4864, dtype="bfloat16")
SHAPES: Mapping[str, Sizes] = {
    "half": HALF,
    "fast": HALF,
    "3b": Sizes(131072, 3072, 26, 32, 8, 9216, "bfloat16", "ministral3", 128),
    "mini": Sizes(300, 32, 2, 4, 2, 64, width=8),
    "slim": Sizes(512, 128, 3, 8, 4, 384, width=16),
    # A ladder of models for the sweep over size: about four times the weights from rung to rung.
    "size1": Sizes(4096, 128, 4, 2, 1, 384),
    "size2": Sizes(4096, 256, 6, 4, 2, 768),
    "size3": Sizes(4096, 512, 8, 8, 2, 1536),
    "size4": Sizes(4096, 896, 12, 14, 2, 2688),
}


def make_tiny(folder: Path) -> None:
    """Write the embedded model before its warm start, which would change no figure where stop lengths are forced."""
    import torch

    from minigrpo.models.embedded import seedling

    blueprint = seedling.Blueprint()
    tokenizer = seedling.train_tokenizer(blueprint)
    torch.manual_seed(SEED)
    seedling.init_model(blueprint, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_grown(folder: Path) -> None:
    """Write the embedded model after its warm start, from the cache or built: about a minute."""
    from minigrpo.models.embedded import seedling

    shutil.copytree(seedling.build_cached(seedling.Blueprint()), folder, dirs_exist_ok=True)


def link_real(folder: Path) -> None:
    """Make a folder of links to the pretrained model's files."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in Path(os.environ[REAL]).resolve().iterdir():
        (folder / file.name).symlink_to(file)


def make_shape(name: str, folder: Path) -> None:
    """Write a model of random weights in a shape."""
    import torch
    from transformers import AutoModelForCausalLM

    sizes = SHAPES[name]
    tokenizer = byte_tokenizer(sizes.vocab)
    config = config_of(sizes, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, sizes.dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def config_of(sizes: Sizes, **more: Any) -> Any:
    """Return the config of a model of these sizes."""
    from transformers import AutoConfig

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1_000_000.0}
    if sizes.architecture == "ministral3":
        rope |= {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16384}
    return AutoConfig.for_model(
        sizes.architecture,
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.width,
        intermediate_size=sizes.inner,
        tie_word_embeddings=True,
        rope_parameters=rope,
        **more,
    )


def byte_tokenizer(size: int) -> Any:
    """Build a fast tokenizer that writes one token a byte and decodes `size` tokens.

    Random weights sample any of them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # The names that transformers gives to any tokenizer beside a Qwen2 model, if it has them or not.
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [f"word{i}" for i in range(len(tokens), size)]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(specials)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer
