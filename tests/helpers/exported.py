"""Shared by the tests of export: a tokenizer with merges, model folders, and merged runs that use it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minigrpo.delivery.merge.merge import merge
from minigrpo.runs.rundir import RunDir
from tests.helpers.delivered import adapted, build, make_run
from tests.helpers.tiny import SPECIALS, TEMPLATE

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("'", "s"), ("Ġ", "Ġ"), ("1", "2"), ("Ċ", "Ċ")]
TAG = "<answer>"


def bpe_tokenizer(pattern: str = QWEN2, template: str = TEMPLATE, bos: bool = False, more: Sequence[str] = ()) -> Any:
    """Return a tokenizer with a few merges, so that the way a text is split matters, and a tag that is a token, but not
    special.

    `bos`: plain text begins with the beginning-of-text token. `more`: further special tokens.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, MERGES)]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=MERGES))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    core.add_tokens([AddedToken(TAG, special=False, normalized=False)])
    core.add_special_tokens(list(more))
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    found = PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, extra_special_tokens=["<|im_start|>"], **SPECIALS
    )
    found.chat_template = template
    return found


PICTURES = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")


def pictured_run(path: Path, **options: Any) -> RunDir:
    """Make a `merged_run` of a vision-language model, with all files that a server needs to read images."""
    base, tokenizer = path.with_name(f"{path.name}-base"), bpe_tokenizer(more=PICTURES)
    model = tempered(build("mistral3", vocab_size=len(tokenizer) + 1, **options))
    model.config.image_token_index = model.config.image_token_id = tokenizer.convert_tokens_to_ids(PICTURES[0])
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    names = dict(zip(("image_token", "image_break_token", "image_end_token"), PICTURES, strict=True))
    pictures = {"image_processor_type": "PixtralImageProcessor", "patch_size": 14, "size": {"longest_edge": 56}}
    own = {"processor_class": "PixtralProcessor", "patch_size": 14, "spatial_merge_size": 2, **names}
    (base / "preprocessor_config.json").write_text(json.dumps(pictures))
    (base / "processor_config.json").write_text(json.dumps(own))
    run = make_run(path, base, adapted(model, base, size=0.05))
    tokenizer.save_pretrained(run.adapter)
    merge(run, quiet=True)
    return run


def model_folder(folder: Path, arch: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Write a model folder; return the model in float32."""
    tokenizer = bpe_tokenizer()
    # One row more than there are tokens: vocabularies are often padded.
    model = tempered(build(arch, vocab_size=len(tokenizer) + 1, **options)).to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.float()


def tempered(model: Any) -> Any:
    """Make the output as peaked as the types' limits assume: logits of standard deviation 2.1, attention scores of
    about 1.

    The other tests' models (3, and 3) make every rounding several times as large, whoever computes it: in float16
    llama.cpp is up to 0.06 from a log-probability there, of which the rounding of weights alone makes 0.05.
    """
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.get_decoder().named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.div_(1.8)
        ids_BT = torch.randint(4, model.config.get_text_config().vocab_size, (8, 64), generator=draw)
        model.get_decoder().norm.weight.mul_(2.1 / model(input_ids=ids_BT).logits.std())
    return model


def merged_run(path: Path, arch: str, *, size: float = 0.05, **options: Any) -> RunDir:
    """Make a run that is trained and merged, its base beside it. `size`: of what was learned."""
    base = path.with_name(f"{path.name}-base")
    run = make_run(path, base, adapted(model_folder(base, arch, **options), base, size=size))
    bpe_tokenizer().save_pretrained(run.adapter)
    merge(run, quiet=True)
    return run
