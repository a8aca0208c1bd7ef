"""A run that was published with all that an audit needs is audited by a stranger, who has the base and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from minigrpo import audit
from minigrpo.cli import main
from minigrpo.delivery.hub.client import repo_file
from minigrpo.delivery.hub.contents import MAX_SCANNED_BYTES
from minigrpo.delivery.hub.local_paths import paths_of_this_machine
from minigrpo.delivery.hub.publish import publish
from minigrpo.errors import ArtifactError, MinigrpoError
from minigrpo.pipeline.audit import Audited
from minigrpo.runs.rundir import RunDir
from tests.helpers.hub_storage import TOKEN, StandIn
from tests.helpers.proved import flip, own_copy, proved_home, reseal
from tests.helpers.published import hub_here

__all__ = ["hub_here", "own_copy", "proved_home"]

FOLDERS = {"me/x-run": "theirs", "me/x": "merged", "me/x-lora": "adapter", "me/x-GGUF": "gguf"}


@pytest.fixture(name="theirs")
def downloaded(
    request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any
) -> RunDir:
    """Stand where nothing is but what was published, downloaded, and the base under another name."""
    there = tmp_path_factory.getbasetemp() / "stranger"
    if not there.exists():
        run, hub = request.getfixturevalue("run"), request.getfixturevalue("hub")
        monkeypatch.chdir(tmp_path / "home")
        publish(run, "me/x", with_run=True, with_paths=True, quiet=True)
        for repo, folder in FOLDERS.items():
            for name, (content, _) in hub.repos[repo].files.items():
                (there / folder / name).parent.mkdir(parents=True, exist_ok=True)
                (there / folder / name).write_bytes(content)
        shutil.move(tmp_path / "home" / "base", there / "my-base")
        shutil.rmtree(tmp_path / "home")
    shutil.copytree(there, tmp_path / "stranger")
    monkeypatch.chdir(tmp_path / "stranger")
    return RunDir(Path("theirs"))


def audited(theirs: RunDir, *models: str, steps: int = 9) -> Audited:
    paths = [Path(model) for model in models]
    return audit(theirs, steps=steps, answers=2 if steps else 0, seed=1, base="my-base", models=paths, quiet=True)


def test_a_stranger_does_the_steps_again_and_holds_the_models_to_the_run(theirs: RunDir) -> None:
    found = audited(theirs, "merged", "adapter", "gguf/run-Q8_0.gguf")
    assert found.faults == ()
    assert [(each.start, each.until) for each in found.stretches] == [(0, 2), (4, 6)]
    shown = " ".join(found.shown)
    for words in (
        "Steps 5 to 6 were done again from checkpoint 4",
        "were asked again: the same answers",
        "merged is of this run: the same bytes as merged/chat_template.jinja",
        "gguf/run-Q8_0.gguf is of this run: the same bytes as gguf/run-Q8_0.gguf",
        "Every weight of merged is base plus adapter",
    ):
        assert words in shown
    assert any("adapter: the run's seals do not name README.md" in each for each in found.unshown)


def test_without_the_models_their_seals_are_told(theirs: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["audit", "theirs", "--base", "my-base", "--steps", "0", "--answers", "0", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (ended.value.code, told["faults"]) == (0, [])
    assert "minigrpo audit theirs --model FOLDER" in " ".join(told["unshown"])


def test_a_bit_changed_in_what_was_published_is_named(theirs: RunDir) -> None:
    changed = {
        "merged/model.safetensors": "merged/model.safetensors is no file of theirs",
        "gguf/run-Q8_0.gguf": "gguf/run-Q8_0.gguf is no file of theirs",
        "theirs/groups.jsonl": "groups.jsonl was changed in the lines of steps",
        "theirs/checkpoints/000004/optimizer.pt": "optimizer.pt is damaged",
    }
    for place in changed:
        flip(Path(place))
    faults = " ".join(audited(theirs, "merged", "gguf", steps=0).faults)
    assert [told for told in changed.values() if told not in faults] == []
    flip(theirs.seals / "gguf.json")
    assert "seals/gguf.json is damaged" in " ".join(audited(theirs, "merged", steps=0).faults)


def test_a_seal_of_another_model_is_a_fault(theirs: RunDir) -> None:
    for seal, origin in (("gguf", {"model": {}}), ("merged", {"adapter": "0" * 64})):
        content = json.loads((theirs.seals / f"{seal}.json").read_text())
        (content["made"] if seal == "merged" else content["files"]["run-Q8_0.gguf"])["from"] |= origin
        reseal(theirs.seals / f"{seal}.json", **content)
        faults = audited(theirs, "merged", steps=0).faults
        assert any(f"The seal of {seal}/" in fault and "of another" in fault for fault in faults)


def test_a_model_that_is_not_there_or_holds_nothing_of_the_run_is_said(theirs: RunDir) -> None:
    Path("empty").mkdir()
    assert "empty holds no file of theirs" in " ".join(audited(theirs, "empty", steps=0).faults)
    with pytest.raises(ArtifactError, match="nowhere is not there"):
        audited(theirs, "nowhere", steps=0)


def test_places_of_this_machine_are_named_and_nothing_is_sent_until_their_owner_agrees(
    run: RunDir, hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "home")
    reseal(run.base, base=str(Path("base").absolute()))
    with pytest.raises(MinigrpoError, match=r"base.json names .*/home/base, a place of this machine.*--with-paths"):
        publish(run, "me/x", with_run=True, quiet=True)
    assert not [path for method, path in hub.asked if method != "GET"]
    assert "me/x-run" in [each.repo for each in publish(run, "me/x", with_run=True, with_paths=True, quiet=True).sent]


def test_texts_and_places_elsewhere_are_no_places_of_this_machine(tmp_path: Path) -> None:
    text = f"a: /no/such/place\nb: https://x.org/usr\nc: {tmp_path}/mine.py:task\nd: </think> 1 / 2\n"
    (tmp_path / "mine.py").touch()
    assert paths_of_this_machine(repo_file("recipe.yaml", text.encode())) == [f"{tmp_path}/mine.py:task"]
    assert paths_of_this_machine(repo_file("groups.jsonl", text.encode())) == []


def test_a_token_in_a_long_log_stops_everything(
    run: RunDir, hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "home")
    with run.groups.open("ab") as stream:
        stream.write(b" " * (MAX_SCANNED_BYTES - run.groups.stat().st_size - 5) + TOKEN.encode() + b" " * 99)
    with pytest.raises(MinigrpoError, match=r"groups\.jsonl holds an access token"):
        publish(run, "me/x", with_run=True, with_paths=True, quiet=True)
    assert not [path for method, path in hub.asked if method != "GET"]


def test_sizes_are_told_before_anything_is_sent_and_what_strangers_will_read(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["publish", "run", "--repo", "me/x", "--with-run", "--with-paths", "--dry-run"])
    assert ended.value.code == 0
    printed = capsys.readouterr()
    assert "me/x-run: " in printed.err
    assert "checkpoints" in printed.err
    out = " ".join(printed.out.split())
    for words in (
        "me/x-run (run, private",
        "task/mine.py",
        "checkpoints/000004/optimizer.pt",
        "each answer of the model",
    ):
        assert words in out
    assert "groups.jsonl" not in out.partition("me/x-run (run")[0]


def test_a_run_without_a_chain_is_not_published_to_be_audited(run: RunDir) -> None:
    run.chain.unlink()
    with pytest.raises(ArtifactError, match="has no chain of hashes"):
        publish(run, "me/x", with_run=True, dry_run=True, quiet=True)
