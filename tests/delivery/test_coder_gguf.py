"""The embedded coder as a GGUF file: llama.cpp cuts every text into the tokens that it was trained on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minigrpo.delivery.gguf.export import export
from minigrpo.delivery.gguf.llamacpp import LlamaCpp
from minigrpo.delivery.gguf.pretokenizer import PROBE_TEXTS, pretokenizer_name, token_faults
from minigrpo.delivery.gguf.writer import write_gguf
from minigrpo.models.embedded import seedling
from minigrpo.models.embedded.program_phrases import may_collide
from minigrpo.models.embedded.sudoku_demos import sudoku_demonstrations
from minigrpo.models.embedded.sudoku_programs import VARIABLE_NAMES, make_strategies

pytestmark = pytest.mark.extra("gguf")

NAMES = [name for names in VARIABLE_NAMES.values() for name in names]
ODD = (" ", "  ", "\t", "\n", "\r\n", " \n ", "10", "½", "é", "数学", "🙂", "'s", "_", "<|im_end", "<answer>", "\u00a0")


@pytest.fixture(scope="module")
def coder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return (folder, tokenizer) of a coder that has learned nothing."""
    folder = tmp_path_factory.mktemp("gguf") / "coder"
    blueprint = seedling.parse_blueprint(seedling.CODER_PATH, seed=0)
    tokenizer = seedling.train_tokenizer(blueprint)
    torch.manual_seed(0)
    seedling.init_model(blueprint, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tokenizer


def odd_texts(phrases: list[str], size: int) -> Iterator[str]:
    """Yield phrases, their beginnings and ends, names and odd characters, run together at random."""
    rng = random.Random(0)
    for _ in range(size):
        parts = []
        for _ in range(rng.randint(1, 12)):
            phrase = rng.choice(phrases)
            cut = rng.randrange(len(phrase) + 1)
            parts.append(rng.choice((phrase, phrase[:cut], phrase[cut:], rng.choice(NAMES), rng.choice(ODD))))
        yield "".join(parts)


def test_the_coders_tokenizer_is_one_that_llama_cpp_knows(coder: tuple[Path, Any], tmp_path: Path) -> None:
    folder, tokenizer = coder
    assert pretokenizer_name(folder) == "smollm"
    write_gguf(folder, tmp_path / "coder.gguf", "F32", "coder")
    demonstrations = sudoku_demonstrations(5, 200)
    added = list(tokenizer.get_added_vocab())
    texts = (*PROBE_TEXTS, *(program for _, program in demonstrations), *odd_texts(added[3:], 2000))
    with LlamaCpp(tmp_path / "coder.gguf", context=64) as llama:
        assert list(token_faults(llama, tokenizer, [messages for messages, _ in demonstrations])) == []
        for text in texts:
            assert llama.tokenize(text) == tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), text


def test_added_tokens_that_collide_are_found_by_both_sides_only_where_the_first_is_longer() -> None:
    assert may_collide("for ", " in ")
    assert may_collide("] for ", "for  (")
    assert may_collide(" in range", "for ")
    assert not may_collide("for ", "= ")
    assert not may_collide("] for ", "for ")
    assert not may_collide("<|im_end|>", "> 0:")


def test_the_coder_is_exported_and_proved(coder: tuple[Path, Any]) -> None:
    (found,) = export(coder[0], ["Q8_0"], writer="own", quiet=True).files
    assert found.verdict == "proved"


def test_programs_come_back_from_the_tokens_that_llama_cpp_reads(coder: tuple[Path, Any], tmp_path: Path) -> None:
    folder, tokenizer = coder
    write_gguf(folder, tmp_path / "coder.gguf", "F32", "coder")
    with LlamaCpp(tmp_path / "coder.gguf", context=64) as llama:
        for one in make_strategies(9, 100):
            assert tokenizer.decode(llama.tokenize(one.text), skip_special_tokens=True) == one.text
