"""A folder that is moved or removed in the middle of a command ends it with a sentence, and nothing takes its place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minigrpo.cli import main
from minigrpo.errors import ArtifactError
from minigrpo.runs.lock import run_lock
from minigrpo.runs.rundir import RunDir, complete_folder, make_folder, staying, write_json
from tests.helpers.delivered import adapted, make_run, save_adapter, save_base

BRIEF = (
    *("--train.steps", "9", "--lora.rank", "2", "--task.size", "8", "--rollout.prompts", "2", "--save.every", "1"),
    *("--rollout.completions", "2", "--rollout.max_tokens", "4", "--model.device", "cpu", "--warmup.steps", "0"),
)
SAID = r"was moved or removed while it was in use, so this cannot go on"

Leave = Callable[[Path], object]
WAYS: dict[str, Leave] = {
    "moved": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "removed": shutil.rmtree,
}
each_way = pytest.mark.parametrize("leave", WAYS.values(), ids=WAYS)


@each_way
def test_nothing_is_made_in_the_place_of_a_folder_that_is_in_use(tmp_path: Path, leave: Leave) -> None:
    run = RunDir(tmp_path / "deep" / "run")

    def write_twice() -> None:
        write_json(run.check, {})
        leave(run.path)
        write_json(run.check, {})

    with pytest.raises(ArtifactError, match=SAID), run_lock(run):
        write_twice()
    assert not run.path.exists()


def test_whatever_the_loss_led_to_the_folder_is_named(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()

    def read() -> None:
        model.rmdir()
        (model / "config.json").read_text()

    with pytest.raises(ArtifactError, match=f"{model} {SAID}"), staying(model, tmp_path / "never"):
        read()
    with pytest.raises(ValueError, match="another fault"), staying(tmp_path):
        raise ValueError("another fault")


def test_a_folder_is_made_again_when_nobody_uses_it(tmp_path: Path) -> None:
    with staying(tmp_path / "run"):
        make_folder(tmp_path / "run" / "evals")
    (tmp_path / "run" / "evals").rmdir()
    make_folder(tmp_path / "run" / "evals")


def test_a_half_made_folder_does_not_stay_where_the_run_left(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")

    def fill(draft: Path) -> None:
        shutil.rmtree(run.path)
        (draft / "adapter_model.safetensors").write_bytes(b"")

    with pytest.raises(ArtifactError, match=SAID), run_lock(run), complete_folder(run.adapter) as draft:
        fill(draft)
    assert list(tmp_path.iterdir()) == []


def leaving_task(file: Path, folder: Path, way: str, calls: int) -> str:
    """Write a task whose reward, at its n-th call, moves or removes a folder."""
    gone = f"os.rename({str(folder)!r}, {str(folder.with_name('elsewhere'))!r})"
    if way == "removed":
        gone = f"shutil.rmtree({str(folder)!r})"
    file.write_text(
        "import os, shutil\n"
        "rows = [{'prompt': f'say {n}', 'answer': str(n)} for n in range(16)]\n"
        "calls = []\n"
        "def reward(prompts, completions, **columns):\n"
        "    calls.append(1)\n"
        f"    if len(calls) == {calls}: {gone}\n"
        "    return [float(len(text) % 3) for text in completions]\n"
    )
    return f"{file}:reward"


@pytest.mark.parametrize("way", WAYS)
def test_a_training_whose_folder_leaves_says_so(
    way: str, tiny_folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "it"
    task = leaving_task(tmp_path / "mine.py", run, way, 7)
    with pytest.raises(SystemExit) as ended:
        main.main(
            ["train", "quickstart", *BRIEF, "--task.name", task, "--model.path", str(tiny_folder()), "--run", str(run)]
        )
    assert ended.value.code == 2
    assert f"error: {run} was moved or removed" in capsys.readouterr().err
    assert not run.exists()
    left = tmp_path / "runs" / "elsewhere" / "recipe.yaml"
    assert left.is_file() == (way == "moved")


def test_an_evaluation_whose_run_leaves_says_so(
    tiny_folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder(), model)
    task = leaving_task(tmp_path / "mine.py", model, "moved", 1)
    out = tmp_path / "evals" / "it.json"
    knobs = ("--task.name", task, "--rollout.max_tokens", "4", "--limit", "4", "--model.device", "cpu")
    with pytest.raises(SystemExit) as ended:
        main.main(["evaluate", str(model), *knobs, "--out", str(out)])
    assert ended.value.code in (None, 0)  # the model had been read: what was measured is kept
    assert out.is_file()
    shutil.rmtree(out.parent)
    run = tmp_path / "run"
    shutil.copytree(model.with_name("elsewhere"), run / "model")
    (run / "recipe.yaml").write_text(f"model:\n  path: {model.with_name('elsewhere')}\ntrain:\n  full: true\n")
    task = leaving_task(tmp_path / "other.py", run, "removed", 1)
    with pytest.raises(SystemExit) as ended:
        main.main(["evaluate", str(run), *knobs[:1], task, *knobs[2:]])
    assert ended.value.code == 2
    assert f"{run} was moved or removed" in capsys.readouterr().err
    assert not run.exists()


@each_way
def test_a_merge_whose_run_leaves_says_so(tmp_path: Path, leave: Leave, monkeypatch: pytest.MonkeyPatch) -> None:
    from minigrpo.delivery.merge import merge as merging

    base = tmp_path / "base"
    run = make_run(tmp_path / "run", base, adapted(save_base(base, "qwen2"), base))
    written = merging.write_companions

    def leaves_first(*args: Any) -> None:
        leave(run.path)
        written(*args)

    monkeypatch.setattr(merging, "write_companions", leaves_first)
    with pytest.raises(ArtifactError, match=SAID), run_lock(run):
        merging.merge(run, quiet=True)
    assert not run.path.exists()


def test_a_merge_whose_base_leaves_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minigrpo.delivery.merge import merge as merging

    base = tmp_path / "base"
    adapter = save_adapter(tmp_path / "adapter", adapted(save_base(base, "qwen2"), base))
    monkeypatch.setattr(merging, "_check_room", lambda *_: shutil.rmtree(base))
    with pytest.raises(ArtifactError, match=f"{base} {SAID}"):
        merging.merge(adapter, quiet=True)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


@pytest.mark.extra("gguf")
@each_way
def test_an_export_whose_run_leaves_says_so(tmp_path: Path, leave: Leave, monkeypatch: pytest.MonkeyPatch) -> None:
    from minigrpo.delivery.gguf import export as exporting
    from tests.helpers.exported import merged_run

    run = merged_run(tmp_path / "run", "qwen2")
    judged = exporting.gguf_reference

    def leaves_first(*args: Any) -> Any:
        found = judged(*args)
        leave(run.path)
        return found

    monkeypatch.setattr(exporting, "gguf_reference", leaves_first)
    with pytest.raises(ArtifactError, match=SAID), run_lock(run):
        exporting.export(run, writer="own", quiet=True)
    assert not run.path.exists()
