"""The embedded coder, built in the normal way with so few steps that it learns next to nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minigrpo.config.schema import Recipe
from minigrpo.models.chat_template import check_tokenizer, render
from minigrpo.models.embedded import seedling, sudoku_demos
from minigrpo.models.embedded.sudoku_programs import VARIABLE_NAMES, make_strategies
from minigrpo.models.sft import SftSchedule
from minigrpo.runs.rundir import digest
from minigrpo.tasks.registry import open_task

QUICK = replace(seedling.parse_blueprint("seedling:coder", seed=0), imitation=SftSchedule(steps=2, rows=2, lr=1e-3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIGRPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        return seedling.build_cached(QUICK)


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_the_coder_is_an_embedded_model_by_its_name() -> None:
    assert seedling.is_seedling("seedling:coder")
    config, tokenizer = seedling.make_config_and_tokenizer("seedling:coder", seed=0)
    assert config.vocab_size == len(tokenizer) <= QUICK.vocabulary


def test_the_coder_is_an_ordinary_model_folder_and_is_built_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), tokenizer_of(folder)
    assert model.config.model_type == "qwen3"
    assert check_tokenizer(tokenizer) == ()
    monkeypatch.setenv("MINIGRPO_CACHE", str(folder.parent))
    before = digest(folder)
    assert seedling.build_cached(QUICK) == folder
    assert digest(folder) == before


def test_the_coder_and_the_seedling_have_their_own_places_in_the_cache() -> None:
    assert seedling.fingerprint(QUICK) != seedling.fingerprint(replace(QUICK, learns="word problems"))


def test_programs_come_back_from_their_tokens_with_fences_and_indents(folder: Path) -> None:
    tokenizer = tokenizer_of(folder)
    for text in (*(one.text for one in make_strategies(7, 300)), "```python\n\tx = 'äöü 🙂'\n```\n\n"):
        assert tokenizer.decode(ids_of(tokenizer, text), skip_special_tokens=True) == text


def test_programs_are_short_and_a_name_is_the_same_token_wherever_it_stands(folder: Path) -> None:
    tokenizer = tokenizer_of(folder)
    names = [name for names in VARIABLE_NAMES.values() for name in names]
    known = re.compile(rf"\b(?:{'|'.join(names)})\b")
    for one in (one for one in make_strategies(7, 500) if one.habit != "broken"):
        tokens = [tokenizer.decode([token]) for token in ids_of(tokenizer, one.text)]
        assert len(tokens) <= 170
        assert [token for token in tokens if token in names] == known.findall(one.text)


def test_the_coder_learns_from_questions_as_the_task_asks_them(folder: Path) -> None:
    tokenizer = tokenizer_of(folder)
    task = open_task(Recipe.model_validate({"task": {"name": "sudoku", "games": 2, "fewest": 26, "most": 32}}))
    asked = task.prompts("train")[0].messages
    (learned, _), *_ = sudoku_demos.sudoku_demonstrations(0, 1)
    words = [[word for word in one[0]["content"].split() if not word[0].isdigit()] for one in (asked, learned)]
    assert len(asked) == len(learned) == 1
    assert words[0] == words[1]
    assert len(render(tokenizer, task.prompts("train")[0]).ids) <= 40
