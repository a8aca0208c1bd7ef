"""Find llama.cpp's pre-tokenizer that splits text as a tokenizer.json does, and compare the ids of the two.

A GGUF file does not hold the pattern by which text is split before its bytes are merged, only the name of one that
llama.cpp knows. A wrong name changes ids here and there, and nobody notices; so patterns must be exactly equal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigrpo.errors import ModelError
from minigrpo.models.chat_template import PROBE_REPLY, render_ids, render_text
from minigrpo.types import Message

if TYPE_CHECKING:
    from minigrpo.delivery.gguf.llamacpp import LlamaCpp

_ENDINGS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_SLASHED = _ENDINGS.replace(r"[\r\n]*", r"[\r\n/]*", 1)

SPLIT_PATTERNS = {
    _ENGLISH + _WORD + r"|\p{N}" + _ENDINGS: "qwen2",
    _ENGLISH + _WORD + r"|\p{N}{1,3}" + _ENDINGS: "llama-bpe",
    "|".join(_CASED) + r"|\p{N}" + _SLASHED: "tekken",
    f"{_CASED[0]}{_ENGLISH}?|{_CASED[1]}{_ENGLISH}?" + r"|\p{N}{1,3}" + _SLASHED: "gpt-4o",
}
"""The pattern of a Split, as published tokenizers have it -> llama.cpp's name."""

PROBE_TEXTS = (
    "It's 3.14 or 2,718; we'LL see 1234567 things\n\n  in   the\tend.",
    "  leading, trailing  ",
    "def f(x):\n    return x ** 2  # twice?\r\n",
    "naïve Ünïcode — “quotes” … 数学 и математика 🙂 ½",
    "<think>1+1=2</think>\n<answer>2</answer>",
)
"""Texts on which similar pre-tokenizers differ: digits, contractions, spaces, lines, other scripts."""


def pretokenizer_name(folder: Path) -> str:
    """Return llama.cpp's name for how the tokenizer in `folder` splits text. Raises ModelError where it has none."""
    file = folder / "tokenizer.json"
    try:
        rules = json.loads(file.read_text(encoding="utf-8"))
        model, cutting = rules["model"], rules["pre_tokenizer"] or {}
        steps = cutting.get("pretokenizers", [cutting])
    except (OSError, ValueError, KeyError, AttributeError) as fault:
        raise ModelError(f"{file} is missing or damaged ({fault}), so a GGUF file would have no tokenizer.") from None
    if model.get("type") != "BPE" or model.get("byte_fallback") or not model.get("merges"):
        raise ModelError(f"{file} is no byte-level BPE with merges. {USE_LLAMA_CPP_HINT}")
    normalizer = (rules.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp does not apply NFC, but typed text is in NFC already
        raise ModelError(f"{file} changes text first ({normalizer}), which llama.cpp would not. {USE_LLAMA_CPP_HINT}")
    found = _name_of_steps(steps)
    if found is None:
        description = json.dumps(cutting, ensure_ascii=False)[:300]
        raise ModelError(
            f"llama.cpp has no pre-tokenizer that is known to cut as {file} does: {description}. {USE_LLAMA_CPP_HINT}"
        )
    return found


USE_LLAMA_CPP_HINT = "Give a newer llama.cpp that may know it (--llama-cpp DIR), or use a model with another tokenizer."


def _name_of_steps(steps: Sequence[Mapping[str, Any]]) -> str | None:
    first, last = steps[0], steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    own_pattern = last.get("use_regex", True)
    if len(steps) == 1:
        return "gpt-2" if own_pattern else None
    if len(steps) != 2:
        return None
    if first.get("type") == "Digits" and first.get("individual_digits") and own_pattern:
        return "smollm"
    plain = first.get("behavior") == "Isolated" and not first.get("invert") and not own_pattern
    pattern = first.get("pattern") or {}
    return SPLIT_PATTERNS.get(str(pattern.get("Regex"))) if first.get("type") == "Split" and plain else None


def token_faults(llama: LlamaCpp, tokenizer: Any, prompts: Sequence[Sequence[Message]]) -> Iterator[str]:
    """Yield one sentence for each kind of difference between llama.cpp's tokens and the tokenizer's.

    `prompts`: messages. They are rendered as llama.cpp does, which leaves the template's beginning-of-text token out
    where the file asks for one by itself.
    """
    facts = llama.facts
    if facts.template != tokenizer.chat_template:
        yield "The chat template in the file is not the tokenizer's."
    if facts.eos != tokenizer.eos_token_id:
        yield f"The end-of-text token is {facts.eos} in the file and {tokenizer.eos_token_id} in the tokenizer."
    if tokenizer.eos_token_id not in facts.ends:
        yield f"llama.cpp would not stop at the end-of-text token {tokenizer.eos_token!r} ({tokenizer.eos_token_id})."
    if facts.adds_eos:
        yield "The file asks for an end-of-text token after every prompt, so the model would see its answer ended."
    bos = tokenizer.bos_token if isinstance(tokenizer.bos_token, str) else None
    for messages in prompts:
        text, ids = render_text(tokenizer, messages, opened=True), render_ids(tokenizer, messages)
        stripped = text.removeprefix(bos) if bos and facts.adds_bos else text
        if fault := _describe_difference(ids, llama.tokenize(stripped, special=True), facts.bos, "a rendered prompt"):
            yield fault
            break
    for text in (*PROBE_TEXTS, PROBE_REPLY):
        if fault := _describe_difference(
            _tokenize_plain(tokenizer, text), llama.tokenize(text), facts.bos, f"the text {text!r}"
        ):
            yield fault
            break


def _tokenize_plain(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _describe_difference(ours: tuple[int, ...], theirs: tuple[int, ...], bos: int, what: str) -> str | None:
    if ours == theirs:
        return None
    if theirs == (bos, *ours):
        return f"Double or foreign BOS: llama.cpp begins {what} with token {bos}, which training did not."
    if ours == (bos, *theirs):
        return f"Missing BOS: training began {what} with token {bos}, and llama.cpp does not."
    place = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    place = min(len(ours), len(theirs)) if place is None else place
    around = slice(max(0, place - 2), place + 3)
    return f"Token {place} of {what} differs: {ours[around]} in the tokenizer, {theirs[around]} in llama.cpp."
