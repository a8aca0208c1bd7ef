"""Recipe files: what they say is what is run, and every mistake is told at once, with its place."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigrpo.config.fields import ALIASES, fields_by_name, nearest
from minigrpo.config.load import dump_recipe, field_table, load_recipe, recipe_names
from minigrpo.config.schema import Recipe
from minigrpo.errors import RecipeError


def refusal(path: Path | str | None, overrides: dict[str, str] | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path) if path is not None else None, overrides or {})
    return str(caught.value)


def written(folder: Path, text: str, name: str = "my.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_loads_and_says_what_it_is_for(name: str) -> None:
    assert load_recipe(name).about


def test_there_is_a_quickstart() -> None:
    assert "quickstart" in recipe_names()


def test_no_recipe_means_all_defaults() -> None:
    assert load_recipe(None) == Recipe()


def test_reading_recipes_loads_no_torch() -> None:
    code = "import sys, minigrpo.config.load as r; r.load_recipe('quickstart'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_numbers_switches_and_names_mean_what_they_look_like(tmp_path: Path) -> None:
    text = "seed: 010\nobjective: {importance: off, clip_high: ~}\ntrain: {lr: 5e-5, full: yes}\n"
    text += "model: {revision: 1234567}"
    recipe = load_recipe(str(written(tmp_path, text)))
    assert recipe.seed == 10
    assert recipe.objective.importance == "off"
    assert recipe.objective.clip_high is None
    assert recipe.train.lr == 5e-5
    assert recipe.train.full is True
    assert recipe.model.revision == "1234567"


def test_yaml_and_toml_say_the_same(tmp_path: Path) -> None:
    yaml = written(tmp_path, "lora:\n  rank: 16\ntrain:\n  lr: 2e-5\n  full: false\ntask:\n  weights: {correct: 2}\n")
    toml = written(
        tmp_path, "[lora]\nrank = 16\n[train]\nlr = 2e-5\nfull = false\n[task.weights]\ncorrect = 2\n", "my.toml"
    )
    assert load_recipe(str(yaml)) == load_recipe(str(toml))


def test_a_section_whose_knobs_are_all_commented_out_is_no_mistake(tmp_path: Path) -> None:
    assert load_recipe(str(written(tmp_path, "seed: 1\nlora:\n  # rank: 3\n"))).seed == 1


def test_a_run_folder_stands_for_its_recipe(tmp_path: Path) -> None:
    written(tmp_path, "seed: 5\n", "recipe.yaml")
    assert load_recipe(str(tmp_path)).seed == 5


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "lora:\n  rank: 0\ntask:\n  weights: {a: 1, b: 2}\n")
    recipe = load_recipe(str(path), {"lora.rank": "16", "task.weights.b": "3", "objective.clip_low": "null"})
    assert recipe.lora.rank == 16
    assert recipe.task.weights == {"a": 1.0, "b": 3.0}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("my.yaml", "model:\n  template:\n    enable_thinking: false\n    effort: low\n    budget: 8\n"),
        ("my.yaml", "model.template: {enable_thinking: False, effort: 'low', budget: 8.0}\n"),
        ("my.toml", "[model.template]\nenable_thinking = false\neffort = 'low'\nbudget = 8\n"),
        ("my.toml", "model = {template = {enable_thinking = false, effort = 'low', budget = 8}}\n"),
    ],
)
def test_options_of_the_chat_template_have_the_types_they_look_like(tmp_path: Path, name: str, text: str) -> None:
    recipe = load_recipe(str(written(tmp_path, text, name)))
    assert recipe.model.template == {"enable_thinking": False, "effort": "low", "budget": 8}
    assert recipe.model.template["enable_thinking"] is False
    assert load_recipe(str(written(tmp_path, dump_recipe(recipe), "again.yaml"))) == recipe
    louder = load_recipe(str(tmp_path / name), {"model.template.enable_thinking": "true"})
    assert louder.model.template == {"enable_thinking": True, "effort": "low", "budget": 8}


def test_options_of_the_chat_template_can_be_flags() -> None:
    assert load_recipe(None, {"model.template.enable_thinking": "false"}).model.template == {"enable_thinking": False}
    assert load_recipe(None, {"model.template": "{a: 1.5, b: x}"}).model.template == {"a": 1.5, "b": "x"}
    assert load_recipe(None, {"model.template": {"a": True}}).model.template == {"a": True}


def test_a_row_of_a_table_is_refused_once_at_its_own_line(tmp_path: Path) -> None:
    told = refusal(written(tmp_path, "model:\n  template:\n    a: 1\n    b: [1]\n"))
    assert "my.yaml:4: model.template.b is a list, but must be true, false, a finite number or text." in told
    assert "mistakes" not in told
    assert "my.yaml:3: task.weights.b is x" in refusal(written(tmp_path, "task.weights:\n  a: 1\n  b: x\n"))


def test_a_table_that_is_none_is_not_hidden_by_a_row_set_later(tmp_path: Path) -> None:
    told = refusal(written(tmp_path, "task: {weights: 5}\n"), {"task.weights.a": "1"})
    assert "my.yaml:1: task.weights is 5, but must be names with numbers" in told


def test_paths_of_this_machine_are_absolute_and_other_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "seedling").mkdir()
    for name in ("rows.jsonl", "rates.json", "mine.py", "answers.jsonl"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    given = {"model.path": "models/base", "task.name": "mine.py:score", "task.data": "./rows.jsonl"}
    recipe = load_recipe(None, {**given, "task.rates": "~/rates.json", "warmup.data": "answers.jsonl"})
    assert recipe.model.path == str(tmp_path / "models/base")
    assert recipe.task.name == f"{tmp_path}/mine.py:score"
    assert recipe.task.data == str(tmp_path / "rows.jsonl")
    assert recipe.task.rates == str(tmp_path / "rates.json")
    assert recipe.warmup.data == str(tmp_path / "answers.jsonl")
    assert load_recipe(str(written(tmp_path, dump_recipe(recipe)))) == recipe
    for name, value in (("model.path", "seedling"), ("model.path", "Qwen/Qwen2.5-0.5B"), ("task.name", "gsm8k")):
        kept = load_recipe(None, {name: value})
        assert getattr(getattr(kept, name.split(".")[0]), name.split(".")[1]) == value


def test_overrides_from_python_may_be_typed() -> None:
    recipe = load_recipe(None, {"lora.rank": 16, "train.lr": 1e-4, "train.full": True, "task.weights": {"a": 2}})
    assert (recipe.lora.rank, recipe.train.lr, recipe.train.full) == (16, 1e-4, True)
    assert recipe.task.weights == {"a": 2.0}


@settings(deadline=None)
@given(st.text(min_size=0, max_size=30), st.floats(1e-9, 1), st.integers(1, 4096), st.none() | st.floats(0.01, 0.9))
def test_what_is_written_is_read_back(about: str, lr: float, rank: int, clip: float | None) -> None:
    knobs = {"about": about, "train": {"lr": lr}, "lora": {"rank": rank}, "objective": {"clip_low": clip}}
    recipe = Recipe.model_validate(knobs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "my.yaml"
        path.write_bytes(dump_recipe(recipe).encode("utf-8", "surrogatepass"))
        assert load_recipe(str(path)) == recipe


def test_all_mistakes_are_told_at_once_each_with_its_line_in_order(tmp_path: Path) -> None:
    path = written(tmp_path, "lora:\n  rnak: 16\n  rank: 0\nrollout:\n  engine: nativ\nlearning_rate: 1e-5\n")
    lines = [line for line in refusal(path).splitlines() if line.startswith(str(path))]
    assert [line.removeprefix(f"{path}:")[0] for line in lines] == ["2", "3", "5", "6"]
    assert "Did you mean lora.rank?" in lines[0]
    assert "lora.rank is 0, but must be a whole number, 1 to 4096" in lines[1]
    assert "Did you mean native?" in lines[2]
    assert "Did you mean train.lr?" in lines[3]


def test_a_refusal_says_what_the_knob_does_its_unit_range_and_default() -> None:
    told = refusal(None, {"rollout.max_token": "5"})
    assert "--rollout.max_token" in told
    assert "rollout.max_tokens: longest completion (unit: tokens; a whole number, 1 to 16777216; default 256)" in told


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lora.rnak", "lora.rank"),
        ("loar.rank", "lora.rank"),
        ("lora_r", "lora.rank"),
        ("lora.r", "lora.rank"),
        ("rank", "lora.rank"),
        ("lora.lr", "train.lr"),
        ("learning-rate", "train.lr"),
        ("num_generations", "rollout.completions"),
        ("beta", "objective.kl"),
        ("objective.beta", "objective.kl"),
        ("save.evry", "save.every"),
        ("sed", "seed"),
        ("zebra", None),
    ],
)
def test_the_knob_that_was_meant_is_found(wrong: str, right: str | None) -> None:
    assert nearest(wrong) == right


def test_aliases_name_knobs_that_exist_and_hide_none() -> None:
    assert set(ALIASES.values()) <= fields_by_name().keys()
    assert not ALIASES.keys() & fields_by_name().keys()


def test_a_group_of_one_is_explained() -> None:
    assert "A group of one compares nothing" in refusal(None, {"rollout.completions": "1"})


def test_knobs_that_contradict_one_another_are_both_located(tmp_path: Path) -> None:
    told = refusal(written(tmp_path, "train: {full: true}\nlora: {dropout: 0.1}\n"))
    assert "my.yaml:1" in told
    assert "my.yaml:2" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [1\nb: 2", "my.yaml:2: this is not YAML"),
        ("a: 1\n---\nb: 2\n", "my.yaml:2: this is not YAML"),
        ("a: \x07", "this is not YAML"),
        ("- seed", "holds no knobs"),
        ("seed", "holds no knobs"),
        ("", "sets no knob"),
        ("# seed: 1\n", "sets no knob"),
        ("lora: 5", "lora is a section"),
        ("seed: 1\nseed: 2", "my.yaml:2: seed is set a second time; the first is at"),
        ("lora.rank: 3\nlora: {rank: 4}", "lora.rank is set a second time"),
        ("seed: [1, 2]", "seed is a list"),
        ("seed: null", "seed is nothing"),
        ("seed: true", "seed is true"),
        ("lora: {alpha: .inf}", "lora.alpha is .inf"),
        ("lora: {alpha: inf}", "lora.alpha is inf"),
        ("train: {lr: nan}", "train.lr is nan"),
        ("task: {weights: {a: b}}", "task.weights.a is b, but must be a number"),
        ("a: &x [*x]", "there is no knob a"),
        ("a: !!python/object/apply:os.abort []", "there is no knob a"),
        ("? [a, b]\n: 3", "there is no knob (sequence)"),
        ("lora: {<<: {rank: 3}}", "there is no knob lora.<<.rank"),
        ("a: " + "[" * 3000, "my.yaml"),
        ("a: {b: {c: {d: {e: 1}}}}", "there is no knob a.b.c"),
    ],
)
def test_a_broken_file_is_refused_in_a_sentence(tmp_path: Path, text: str, told: str) -> None:
    assert told in refusal(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed = 1\nseed = 2", "this is not TOML"),
        ("seed = \nlora = 1", "my.toml:1: this is not TOML"),
        ("[lora]\n# why\nrank = true", "my.toml:3: lora.rank is true"),
        ("lora.rnak = 3", "my.toml:1: there is no knob lora.rnak"),
        ("seed = 2026-01-01", "my.toml:1: seed is 2026-01-01"),
        ("lora = 3", "lora is a section"),
        ("", "sets no knob"),
    ],
)
def test_a_broken_toml_file_is_refused_in_a_sentence(tmp_path: Path, text: str, told: str) -> None:
    assert told in refusal(written(tmp_path, text, "my.toml"))


def test_what_is_no_recipe_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    binary = tmp_path / "weights.yaml"
    binary.write_bytes(b"\x80\x00\x01")
    assert "is not a text file" in refusal(binary)
    huge = tmp_path / "huge.yaml"
    huge.write_bytes(b"# " * (1 << 20))
    assert "is not a text file" in refusal(huge)
    assert "is a folder" in refusal(tmp_path)
    assert "is missing" in refusal(tmp_path / "nowhere.yaml")
    assert "Did you mean quickstart?" in refusal("quikstart")
    assert "There is no recipe" in refusal("x" * 5000)


@settings(deadline=None)
@given(st.text(max_size=200))
def test_no_text_brings_a_traceback(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for suffix in ("yaml", "toml"):
            path = Path(folder) / f"my.{suffix}"
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
            with contextlib.suppress(RecipeError):
                load_recipe(str(path))


@settings(deadline=None)
@given(st.sampled_from([*fields_by_name(), "lora", "nope", "task.weights.x"]), st.text(max_size=40))
def test_no_override_brings_a_traceback(name: str, value: str) -> None:
    with contextlib.suppress(RecipeError):
        load_recipe(None, {name: value})


def test_the_table_has_every_knob_with_help() -> None:
    table = {knob.name: knob for knob in field_table()}
    assert all(knob.about for knob in table.values())
    assert table["rollout.engine"].choices == ("auto", "native", "slots", "transformers", "vllm")
    assert table["lora.dropout"].range == ">= 0 and < 1"
    assert table["objective.clip_low"].optional
