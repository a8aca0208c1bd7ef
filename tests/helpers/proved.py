"""Shared by the tests of replay and audit: a whole run beside its base and its reward file, made once; and a forger."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minigrpo.config.schema import Recipe
from minigrpo.pipeline import stages
from minigrpo.runs.chain import link_text
from minigrpo.runs.manifest import hash_files, read_sealed, write_sealed
from minigrpo.runs.rundir import RunDir, digest, read_json, write_json
from tests.helpers.published import add_gguf

REWARD = """
from minigrpo import Grade, Prompt, Task

def prompts(split):
    start = 0 if split == "train" else 100
    return [Prompt(f"{split}-{i}", ({"role": "user", "content": f"say {i}"},), str(i)) for i in range(start, start + 8)]

def grade(prompt, text):
    share = sum(ord(letter) % 2 == 0 for letter in text) / max(1, len(text))
    return Grade(share, {"even": share}, formed=len(text) > 1, solved=share > 0.5)

task = Task("even", prompts, grade)
"""
STEPS, EVERY, KEPT = 6, 2, (4, 6)
"""Steps of the run, between two saves, and of the checkpoints that are left."""


def make_home(home: Path, base: Path) -> Path:
    """Make a folder with base, mine.py and run, which all name one another by relative paths; it can be copied."""
    shutil.copytree(base, home / "base")
    (home / "mine.py").write_text(REWARD)
    return home


def recipe_of(**sections: Any) -> Recipe:
    knobs: dict[str, Any] = {
        "model": {"path": "base", "device": "cpu"},
        "lora": {"rank": 2, "alpha": 4},
        "task": {"name": "mine.py:task"},
        "rollout": {"prompts": 2, "completions": 4, "max_tokens": 6},
        "train": {"steps": STEPS, "lr": 0.01, "tokens_per_pass": 512, "threads": 1},
        "save": {"every": EVERY, "keep": 2},
        "eval": {"limit": 6},
        "export": {"formats": ""},
    }
    return Recipe(**{**knobs, **{name: {**knobs.get(name, {}), **section} for name, section in sections.items()}})


@pytest.fixture(scope="session", name="proved")
def proved_home(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only. llama.cpp is not used: the content of the GGUF file does not matter here."""
    home = tmp_path_factory.getbasetemp() / "proved"
    if home.exists():  # made for another file of tests
        return home
    make_home(home, tiny_folder("qwen2"))
    with contextlib.chdir(home):
        stages.run_all(recipe_of(), RunDir(Path("run")))
        add_gguf(RunDir(Path("run")), "Q8_0", 1000)
    return home


@pytest.fixture(name="run")
def own_copy(proved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A copy of that run, in the current folder."""
    shutil.copytree(proved, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return RunDir(Path("run"))


def replace_once(file: Path, old: str, new: str, *, after: str = "") -> None:
    """Change one place of a text file, the first behind `after`."""
    text = file.read_text()
    place = text.index(old, text.index(after))
    file.write_text(text[:place] + new + text[place + len(old) :])


def flip(file: Path, place: int = -9) -> None:
    """Flip one bit."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def reseal(file: Path, **changes: Any) -> None:
    """Change a sealed file and seal it again, as somebody could who has this code."""
    content = read_json(file)
    write_sealed(file, {**{name: value for name, value in content.items() if name != "seal"}, **changes})


def forge(run: RunDir, change: Callable[[str, dict[str, Any]], object] = lambda kind, facts: None) -> None:
    """Write every hash of a training anew after a change: checkpoints, chain, result. The logs keep their lengths.

    `change`: is given each line's kind and facts, and may change these, too.
    """
    previous: str | None = None
    lines: list[str] = []
    for line in run.chain.read_text().splitlines():
        facts = json.loads(line)
        kind, _ = facts.pop("kind"), facts.pop("previous")
        if kind == "checkpoint":
            facts |= forged_checkpoint(run, facts, previous)
        if kind == "result":
            facts |= {"digest": digest(run.adapter), "files": hash_files(run.adapter)}
        change(kind, facts)
        lines.append(link_text(kind, previous, facts))
        previous = hashlib.sha256(lines[-1].encode()).hexdigest()
    run.chain.write_text("".join(f"{line}\n" for line in lines))


def forged_checkpoint(run: RunDir, facts: dict[str, Any], previous: str | None) -> dict[str, Any]:
    for name, then in facts["logs"].items():
        then["sha256"] = hashlib.sha256((run.path / name).read_bytes()[: then["bytes"]]).hexdigest()
    folder = run.checkpoint(facts["step"])
    if folder.is_dir():
        write_json(folder / "state.json", {**read_json(folder / "state.json"), "positions": facts["logs"]})
        facts["files"] = hash_files(folder)
        sizes = {name: (folder / name).stat().st_size for name in facts["files"]}
        made = read_sealed(folder / "made.json")
        write_sealed(folder / "made.json", {**made, "sha256": facts["files"], "bytes": sizes, "previous": previous})
    return facts
