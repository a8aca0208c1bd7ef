"""The embedded model, built in the normal way with so few steps that it learns next to nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minigrpo.errors import ModelError
from minigrpo.models.chat_template import check_tokenizer, render
from minigrpo.models.embedded import seedling
from minigrpo.models.embedded.seedling import Blueprint
from minigrpo.models.sft import SftSchedule
from minigrpo.runs.rundir import digest
from minigrpo.tasks.builtin import wordproblems
from minigrpo.types import Prompt

BRIEF = SftSchedule(steps=2, rows=2, lr=1e-3)
QUICK = Blueprint(school=BRIEF, imitation=BRIEF)

BuildFolder = Callable[[Blueprint], Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> BuildFolder:
    """Build the folder of a blueprint in a cache of these tests."""
    root = tmp_path_factory.mktemp("cache")

    def folder(blueprint: Blueprint) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MINIGRPO_CACHE", str(root))
            return seedling.build_cached(blueprint)

    return folder


def load_folder(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def problem_prompt() -> Prompt:
    return wordproblems.distinct_prompts("test", "fixed", 1)[0]


def test_a_seedling_is_known_by_its_name() -> None:
    assert seedling.is_seedling("seedling")
    assert seedling.is_seedling("seedling:llama")
    assert not seedling.is_seedling("./seedling")
    assert not seedling.is_seedling("seedlings")
    assert not seedling.is_seedling("owner/seedling")


@pytest.mark.parametrize("path", ["seedling:gpt9", "seedling:", "seedling:Qwen3"])
def test_an_unknown_architecture_is_refused_with_the_known_ones(path: str) -> None:
    with pytest.raises(ModelError, match=r"seedling:llama, seedling:qwen2, seedling:qwen3, seedling:ministral3"):
        seedling.resolve_seedling(path, seed=0)


@pytest.mark.parametrize("architecture", seedling.ARCHITECTURES)
def test_every_architecture_is_an_ordinary_model_folder(build: BuildFolder, architecture: str) -> None:
    folder = build(replace(QUICK, architecture=architecture))
    model, tokenizer = load_folder(folder)
    assert model.config.model_type == architecture
    assert 0.5e6 <= sum(weight.numel() for weight in model.parameters()) <= 3e6
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert check_tokenizer(tokenizer) == ()
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    ids = render(tokenizer, problem_prompt()).ids
    assert max(ids) < model.config.vocab_size
    answer = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=4)
    assert answer.shape[1] > len(ids)


@pytest.mark.parametrize("architecture", seedling.ARCHITECTURES)
def test_the_tokenizer_reads_the_same_after_loading(build: BuildFolder, architecture: str) -> None:
    blueprint = replace(QUICK, architecture=architecture)
    _, tokenizer = load_folder(build(blueprint))
    trained = seedling.train_tokenizer(blueprint)
    for text in ("<think>23+8=31 31-5=26</think><answer>26</answer>", "Mia has 1,200 apples.\n\n  Zoë: 'äöü' 🙂"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == trained(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_digits_and_tags_are_tokens_and_tags_survive_decoding(build: BuildFolder) -> None:
    _, tokenizer = load_folder(build(QUICK))
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("<think>23+8=31</think><answer>31</answer>")["input_ids"])
    assert tokens == ["<think>", "2", "3", "+", "8", "=", "3", "1", "</think>", "<answer>", "3", "1", "</answer>"]


def test_prompts_and_answers_are_short(build: BuildFolder) -> None:
    _, tokenizer = load_folder(build(QUICK))
    prompt = problem_prompt()
    assert len(render(tokenizer, prompt).ids) <= 60
    assert len(tokenizer(wordproblems.gold_answer(prompt))["input_ids"]) <= 30


def test_the_same_blueprint_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        torch.manual_seed(len(name))  # whatever happened before does not matter
        (tmp_path / name).mkdir()
        seedling.build_seedling(QUICK, tmp_path / name)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_building_leaves_random_numbers_and_threads_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    seedling.build_seedling(QUICK, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_seed_architecture_and_size_have_their_own_place_in_the_cache() -> None:
    variants = [QUICK, replace(QUICK, seed=1), replace(QUICK, architecture="llama"), replace(QUICK, layers=2)]
    assert len({seedling.fingerprint(blueprint) for blueprint in variants}) == len(variants)


def test_a_seedling_is_built_once_and_progress_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIGRPO_CACHE", str(tmp_path))
    said: list[tuple[int, int, str]] = []
    folder = seedling.build_cached(QUICK, lambda *news: said.append(news))
    assert folder.parent == tmp_path
    assert [done for done, _, _ in said] == [0, 1, 2, 3, 4]
    assert {total for _, total, _ in said} == {4}
    said.clear()
    assert seedling.build_cached(QUICK, lambda *news: said.append(news)) == folder
    assert said == []


def test_a_build_that_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIGRPO_CACHE", str(tmp_path))

    def interrupt(done: int, total: int, note: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seedling.build_cached(QUICK, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_the_saved_settings_name_the_stop_token(build: BuildFolder) -> None:
    folder = build(QUICK)
    settings = json.loads((folder / "generation_config.json").read_text())
    tokenizer = load_folder(folder)[1]
    assert settings["eos_token_id"] == tokenizer.eos_token_id
    assert settings["pad_token_id"] == tokenizer.pad_token_id
