"""A checkpoint is whole, or it is named and the one before it is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minigrpo.cli import main
from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe
from minigrpo.errors import ArtifactError, RecipeError
from minigrpo.runs.manifest import FORMAT, check_folder, create_run, hash_files, read_sealed, seconds_of, write_sealed
from minigrpo.runs.rundir import RunDir
from minigrpo.training import checkpoint
from tests.helpers.saving import Small, begun, newest, restored, save, saved

FILES = ("weights.safetensors", "about/config.json", "optimizer.pt", "trainer.json", "state.json", "made.json")


def names(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def test_a_checkpoint_brings_everything_back(tmp_path: Path) -> None:
    run, small = begun(tmp_path), Small()
    state = {"tries": 3, "queue": [1, 2.5, "a"], "entropy": 0.1 + 0.2}
    save(run, small, 3, state)
    found = newest(run)
    assert found.state == state
    assert restored(found) == 3


@pytest.mark.parametrize("file", FILES)
def test_a_file_cut_anywhere_is_named_and_the_checkpoint_before_it_is_used(file: str, tmp_path: Path) -> None:
    check_damages(file, tmp_path, lambda content, tenth: content[: len(content) * tenth // 10])


@pytest.mark.parametrize("file", FILES)
def test_a_bit_flipped_anywhere_is_noticed_and_the_checkpoint_before_it_is_used(file: str, tmp_path: Path) -> None:
    def flip(content: bytes, tenth: int) -> bytes:
        place = (len(content) - 1) * tenth // 9
        return content[:place] + bytes([content[place] ^ (1 << (tenth * 3 % 8))]) + content[place + 1 :]

    check_damages(file, tmp_path, flip)


def check_damages(file: str, folder: Path, harm: Callable[[bytes, int], bytes]) -> None:
    run = saved(folder, 1, 2)
    victim = run.checkpoint(2) / file
    whole = victim.read_bytes()
    for tenth in range(10):
        victim.write_bytes(harm(whole, tenth))
        found, complaints = checkpoint.find_latest(run)
        assert found is not None
        assert restored(found) == 1
        assert len(complaints) == 1
        assert str(run.checkpoint(2)) in complaints[0]
    victim.write_bytes(whole)
    assert restored(newest(run)) == 2


def test_every_single_bit_of_made_json_counts(tmp_path: Path) -> None:
    run = saved(tmp_path, 2)
    made = run.checkpoint(2) / "made.json"
    whole = made.read_bytes()
    for place in range(len(whole)):
        made.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 7)]) + whole[place + 1 :])
        with pytest.raises(ArtifactError, match=r"made\.json"):
            read_sealed(made)


def spoil(run: RunDir, how: str) -> None:
    folder = run.checkpoint(2)
    if how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "extra":
        (folder / "model.safetensors").write_bytes(b"?")
    elif how == "renamed":
        folder.rename(run.checkpoint(7))
    elif how == "of another format":
        made = {**json.loads((folder / "made.json").read_text()), "format": FORMAT + 1, "minigrpo": "9.8.7"}
        (folder / "made.json").write_text(json.dumps(made))
    else:
        (folder / how).unlink()


@pytest.mark.parametrize("how", [*FILES, "empty", "extra", "renamed", "of another format"])
def test_what_is_missing_added_or_foreign_is_named_and_the_checkpoint_before_it_is_used(
    how: str, tmp_path: Path
) -> None:
    run = saved(tmp_path, 1, 2)
    spoil(run, how)
    found, complaints = checkpoint.find_latest(run)
    assert found is not None
    assert found.step == 1
    assert len(complaints) == 1
    if how == "of another format":
        assert "9.8.7" in complaints[0]


def test_every_file_is_hashed_but_made_json_and_what_is_hidden_at_any_depth(tmp_path: Path) -> None:
    for name in ("b.txt", "made.json", ".DS_Store", "deep/a.txt", "deep/made.json", "deep/.nfs1", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    sums = hash_files(tmp_path)
    assert list(sums) == ["b.txt", "deep/a.txt", "deep/made.json"]
    assert set(sums.values()) == {"2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}
    assert not hash_files(tmp_path / "nowhere")


def test_a_hidden_file_of_the_desktop_does_no_harm(tmp_path: Path) -> None:
    run = saved(tmp_path, 1)
    (run.checkpoint(1) / ".DS_Store").write_bytes(b"?")
    assert restored(newest(run)) == 1


def test_where_no_checkpoint_is_whole_nothing_begins_again_in_silence(tmp_path: Path) -> None:
    run = saved(tmp_path, 1, 2)
    for step in (1, 2):
        (run.checkpoint(step) / "optimizer.pt").unlink()
    with pytest.raises(ArtifactError, match=r"None of the 2 checkpoints.*remove .*checkpoints.*--run"):
        checkpoint.find_latest(run)
    assert checkpoint.find_latest(RunDir(tmp_path / "new")) == (None, [])


@pytest.mark.parametrize("width", [4, 1])
def test_a_checkpoint_of_another_shape_is_refused(width: int, tmp_path: Path) -> None:
    run = saved(tmp_path, 1)
    other = Small(width)
    with pytest.raises(ArtifactError, match="does not fit this model"):
        checkpoint.load(newest(run), other, other.optimizer)


def test_an_optimizer_of_another_shape_is_refused(tmp_path: Path) -> None:
    run, small, wide = begun(tmp_path), Small(), Small(5)
    wide.step()
    checkpoint.save(run, 1, small, wide.optimizer, {})
    with pytest.raises(ArtifactError, match="shapes differ"):
        checkpoint.load(newest(run), small, small.optimizer)


def test_a_checkpoint_is_asked_for_by_its_step(tmp_path: Path) -> None:
    run = saved(tmp_path, 2, 4)
    assert restored(checkpoint.find_step(run, 2)) == 2
    with pytest.raises(ArtifactError, match=r"no checkpoint of step 3\. There are: 2, 4"):
        checkpoint.find_step(run, 3)
    (run.checkpoint(4) / "trainer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"trainer\.json is damaged"):
        checkpoint.find_step(run, 4)
    assert (checkpoint.newest_before(run, 9), checkpoint.newest_before(run, 4), checkpoint.newest_before(run, 2)) == (
        2,
        2,
        None,
    )


def test_pruning_keeps_the_newest_and_the_spared(tmp_path: Path) -> None:
    run = saved(tmp_path, 1, 2, 3, 4, 5)
    checkpoint.prune(run, 2, frozenset({2}))
    assert names(run) == ["000002", "000004", "000005"]
    checkpoint.prune(run, 1)
    assert names(run) == ["000005"]


def test_pruning_never_removes_the_last_whole_checkpoint(tmp_path: Path) -> None:
    run = saved(tmp_path, 1, 2, 3)
    for step in (2, 3):
        (run.checkpoint(step) / "optimizer.pt").write_bytes(b"cut")
    checkpoint.prune(run, 1)
    assert names(run) == ["000001"]
    (run.checkpoint(1) / "optimizer.pt").unlink()
    checkpoint.prune(run, 1)
    assert names(run) == ["000001"]


def test_checkpoints_of_an_explosion_are_set_aside_until_the_run_goes_on(tmp_path: Path) -> None:
    run = saved(tmp_path, 1, 2, 3)
    checkpoint.discard_after(run, 1)
    assert names(run) == ["000001", "000002.exploded", "000003.exploded"]
    assert restored(newest(run)) == 1
    save(run, Small(), 2)
    checkpoint.discard_after(run, 1)
    assert names(run) == ["000001", "000002.exploded", "000003.exploded"]
    checkpoint.prune(run, 3)
    assert names(run) == ["000001"]


@pytest.mark.parametrize("tenth", range(10))
@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_damaged_machine_file_is_refused_and_the_checkpoints_know_the_same(
    how: str, tenth: int, tmp_path: Path
) -> None:
    run = saved(tmp_path, 1)
    before = checkpoint.read_machine(run)
    content = bytearray(run.machine.read_bytes())
    place = len(content) * tenth // 10
    content[place] ^= 1
    run.machine.write_bytes(content if how == "flipped" else content[:place])
    with pytest.raises(ArtifactError, match=r"machine\.json.*remove that file"):
        checkpoint.read_machine(run)
    run.machine.unlink()
    assert checkpoint.read_machine(run) == before


@pytest.mark.parametrize("change", [{"threads": None}, {"weather": "fair"}])
def test_a_machine_file_with_other_fields_names_both_versions(change: dict[str, Any], tmp_path: Path) -> None:
    run = begun(tmp_path)
    fields = {**read_sealed(run.machine), **change, "minigrpo": "9.8.7"}
    write_sealed(run.machine, {name: value for name, value in fields.items() if value is not None})
    with pytest.raises(ArtifactError, match=rf"9\.8\.7.*this is.*{next(iter(change))}"):
        checkpoint.read_machine(run)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    create_run(Recipe(), run)
    return run


def test_a_run_that_is_whole_goes_on(run: RunDir) -> None:
    check_folder(Recipe(), run, resume=True)
    assert sorted(path.name for path in run.path.iterdir()) == ["made.json", "recipe.yaml"]


def test_a_recipe_whose_comments_alone_were_changed_is_the_same_recipe(run: RunDir) -> None:
    run.recipe.write_text(run.recipe.read_text() + "# mine\n")
    check_folder(Recipe(), run, resume=True)


def test_no_bit_of_the_recipe_changes_a_knob_in_silence(run: RunDir) -> None:
    whole = run.recipe.read_bytes()
    refused = 0
    for place in range(0, len(whole), 97):
        for content in (whole[:place], whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]):
            run.recipe.write_bytes(content)
            refused += not goes_on(run)
    assert refused > 10


def goes_on(run: RunDir) -> bool:
    """With the recipe that now stands there, as the command line does it; or that is refused with a sentence."""
    try:
        recipe = load_recipe(str(run.path))
        check_folder(recipe, run, resume=True)
    except (ArtifactError, RecipeError):
        return False
    assert recipe.model_copy(update={"about": ""}) == Recipe()
    return True


def test_a_recipe_of_another_version_names_both(run: RunDir) -> None:
    write_sealed(run.made, {**read_sealed(run.made), "minigrpo": "9.8.7"})
    run.recipe.write_text(run.recipe.read_text() + "\nfuture:\n  knob: 1\n")
    with pytest.raises(ArtifactError, match=r"begun by minigrpo 9\.8\.7; this is .*future"):
        check_folder(Recipe(), run, resume=True)


@pytest.mark.parametrize("command", [["train", "--resume"], ["evaluate"], ["preflight"]])
def test_a_command_on_a_run_of_another_version_names_both(
    command: list[str], run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sealed(run.made, {**read_sealed(run.made), "minigrpo": "9.8.7"})
    run.recipe.write_text(run.recipe.read_text() + "\nfuture:\n  knob: 1\n")
    with pytest.raises(SystemExit) as ended:
        main.main([command[0], str(run.path), *command[1:]])
    told = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2
    assert "was begun by minigrpo 9.8.7; this is " in told
    assert "there is no knob future.knob" in told


def test_a_slip_on_the_command_line_is_not_blamed_on_another_version(run: RunDir) -> None:
    write_sealed(run.made, {**read_sealed(run.made), "minigrpo": "9.8.7"})
    with pytest.raises(RecipeError, match=r"^--lora\.rnk: there is no knob"):
        load_recipe(str(run.path), {"lora.rnk": 3})


def test_knobs_that_an_older_version_did_not_know_are_filled_in(run: RunDir) -> None:
    begun = read_sealed(run.made)
    text = "".join(line for line in run.recipe.read_text().splitlines(True) if "rest_epochs" not in line)
    knobs = {name: value for name, value in begun["recipe"].items() if name != "groups.rest_epochs"}
    write_sealed(run.made, {**begun, "recipe": knobs, "minigrpo": "0.0.1"})
    run.recipe.write_text(text)
    check_folder(Recipe(), run, resume=True)


def test_a_folder_of_another_format_names_both_versions(run: RunDir) -> None:
    made = {**json.loads(run.made.read_text()), "format": FORMAT + 1, "minigrpo": "9.8.7"}
    run.made.write_text(json.dumps(made))
    with pytest.raises(ArtifactError, match=rf"minigrpo 9\.8\.7, format {FORMAT + 1}; this is .*format {FORMAT}"):
        check_folder(Recipe(), run, resume=True)


@pytest.mark.parametrize("name", ["checkpoints", "adapter", "model", "evals"])
def test_a_file_where_a_folder_should_be_is_refused_before_anything_is_loaded(
    name: str, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.path / name).write_text("")
    with pytest.raises(SystemExit) as ended:
        main.main(["train", str(run.path), "--resume"])
    assert ended.value.code == 2
    assert "is a file, where the run keeps a folder" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("content", ["[]", '{"train": "long"}', '{"train": 1'])
def test_damaged_times_are_refused_with_a_sentence(content: str, run: RunDir) -> None:
    (run.path / "seconds.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"seconds\.json is damaged.*Remove it"):
        seconds_of(run)


def test_weights_are_the_same_to_the_last_bit(tmp_path: Path) -> None:
    run, small, other = begun(tmp_path), Small(), Small()
    with torch.no_grad():
        small.layer.weight.copy_(torch.tensor([[1e-45, 0.1, -0.0], [3e38, 1 / 3, 1e-8]]))
    checkpoint.save(run, 0, small, small.optimizer, {})
    checkpoint.load(newest(run), other, other.optimizer)
    assert small.layer.weight.detach().numpy().tobytes() == other.layer.weight.detach().numpy().tobytes()
