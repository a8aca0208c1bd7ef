"""An adapter that another tool trained becomes a run, and goes the road that our own go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minigrpo.cli import main
from minigrpo.config.load import load_recipe
from minigrpo.delivery.hub.model_card import card_facts, render_card
from minigrpo.delivery.merge.check import check
from minigrpo.delivery.merge.merge import merge
from minigrpo.delivery.verify import verify
from minigrpo.errors import ArtifactError, MinigrpoError, RecipeError
from minigrpo.models.loading import open_tokenizer
from minigrpo.pipeline.adopt import adopt
from minigrpo.runs.rundir import RunDir
from tests.helpers.delivered import adapted, edit_json, save_adapter, save_base


@pytest.fixture(name="adapter")
def their_adapter(tmp_path: Path) -> Path:
    """Return a PEFT adapter beside its base, as `save_pretrained` leaves it."""
    under = adapted(save_base(tmp_path / "base", "qwen2"), tmp_path / "base", use_rslora=True)
    return save_adapter(tmp_path / "theirs", under)


def test_an_adapter_of_another_tool_is_checked_merged_and_verified_like_our_own(adapter: Path, tmp_path: Path) -> None:
    run = adopt(adapter, RunDir(tmp_path / "run"), knobs=[("task.name", "wordproblems")])
    recipe = load_recipe(str(run.path))
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (recipe.lora.rank, recipe.lora.rslora, recipe.model.path) == (config["r"], True, str(tmp_path / "base"))
    assert recipe.lora.targets == ",".join(sorted(config["target_modules"]))
    assert check(run, quiet=True).ok
    assert merge(run, quiet=True).verdict == "merged"
    found = verify(run, quiet=True)
    assert found.ok
    assert found.texts != "completions of the last training step"


def test_the_command_names_the_next_one_and_leaves_the_given_folder_alone(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(file.name for file in adapter.iterdir())
    with pytest.raises(SystemExit) as ended:
        main.main(["adopt", "theirs", "--task.name", "wordproblems"])
    assert ended.value.code in (0, None)
    assert "minigrpo check runs/theirs" in capsys.readouterr().out
    assert sorted(file.name for file in adapter.iterdir()) == before
    assert RunDir(tmp_path / "runs" / "theirs").exists()


def test_an_adapter_without_a_tokenizer_gets_the_bases(adapter: Path, tmp_path: Path) -> None:
    for file in [*adapter.glob("tokenizer*"), *adapter.glob("chat_template*")]:
        file.unlink()
    run = adopt(adapter, RunDir(tmp_path / "run"), knobs=[("task.name", "wordproblems")])
    ours, theirs = open_tokenizer(run.adapter), open_tokenizer(tmp_path / "base")
    assert (ours.chat_template, ours("say 3")["input_ids"]) == (theirs.chat_template, theirs("say 3")["input_ids"])


def test_the_page_of_an_adapter_of_another_tool_does_not_say_that_we_trained_it(adapter: Path, tmp_path: Path) -> None:
    run = adopt(adapter, RunDir(tmp_path / "run"), knobs=[("task.name", "wordproblems")])
    page = render_card(card_facts(run, {"adapter": "me/theirs-lora"}, online=False), "adapter")
    assert "trained by another tool, merged and proved by minigrpo" in page
    assert "LoRA of rank 4" in page
    for word in ("GRPO", "- grpo", "steps of", "learning rate", "The whole recipe"):
        assert word not in page


@pytest.mark.parametrize(
    ("harm", "kind", "told"),
    [
        ("no task", RecipeError, "No task was named"),
        ("no base", ArtifactError, "names no base model"),
        ("another base", MinigrpoError, "base"),
        ("no weights", ArtifactError, "adapter_model.safetensors is missing"),
        ("part of a run", ArtifactError, "belongs to the run"),
        ("a run there", ArtifactError, "--resume"),
    ],
)
def test_what_cannot_be_adopted_is_refused_and_leaves_no_run(
    adapter: Path, tmp_path: Path, harm: str, kind: type[Exception], told: str
) -> None:
    run, folder, knobs = RunDir(tmp_path / "run"), adapter, [("task.name", "wordproblems")]
    if harm == "no task":
        knobs = []
    if harm == "no base":
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    if harm == "another base":
        save_base(tmp_path / "base", "qwen2", hidden_size=48)
    if harm == "no weights":
        (adapter / "adapter_model.safetensors").unlink()
    if harm in ("part of a run", "a run there"):
        adopt(adapter, run, knobs=knobs)
    if harm == "part of a run":
        folder, run = run.adapter, RunDir(tmp_path / "second")
    with pytest.raises(kind, match=told):
        adopt(folder, run, knobs=knobs)
    assert run.exists() == (harm == "a run there")
