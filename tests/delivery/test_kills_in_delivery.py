"""Kills at random moments of everything that follows a training, and every artefact is as if there had been none."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from minigrpo.runs.rundir import RunDir, digest
from tests.helpers.exported import model_folder
from tests.helpers.hub_server import standing
from tests.helpers.hub_storage import TOKEN, StandIn

pytestmark = [pytest.mark.long, pytest.mark.extra("gguf"), pytest.mark.timeout(1800)]

TASK = """
from minigrpo import Grade, Prompt, Task

def prompts(split):
    start = 0 if split == "train" else 100
    return [Prompt(f"{split}-{i}", ({"role": "user", "content": f"say {i}"},), str(i)) for i in range(start, start + 8)]

def grade(prompt, text):
    share = sum(letter.islower() for letter in text) / 8
    return Grade(round(2 * share) / 2, solved=share > 0.4)

letters = Task("letters", prompts, grade)
"""
RECIPE = """
model: {{path: {model}, device: cpu}}
lora: {{rank: 4, alpha: 8}}
task: {{name: '{task}:letters'}}
rollout: {{prompts: 3, completions: 4, max_tokens: 8}}
train: {{steps: 3, lr: 1e-2, threads: 2, tokens_per_pass: 256}}
save: {{every: 1}}
eval: {{limit: 6}}
export: {{formats: 'F16,Q8_0'}}
publish: {{repo: me/tiny}}
"""
ALL_KILLS = 24
KILLS = int(os.environ.get("MINIGRPO_KILLS", ALL_KILLS))
"""How many; fewer where time is short: MINIGRPO_KILLS=4."""
CLOCK = re.compile(
    r"((pass|rollout|step|training)_)?seconds(/\w+)?|tokens_per_second|(peak|planned)_memory_gb|memory_gb/\w+"
)
"""Names of measured times and of measured memory, on which the plan builds."""
OWN = (".lock", "events.jsonl", "seconds.json", "serve.log")
"""Files that tell of the process itself: which it is, when it began and was killed, how long it took, what llama.cpp
printed, with its port."""


def launch(hub: StandIn, *words: str) -> subprocess.Popen[bytes]:
    own = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "minigrpo", *words]
    return subprocess.Popen(command, env=os.environ | own, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen[bytes]) -> float:
    began = time.monotonic()
    told = process.communicate(timeout=300)[1].decode()
    assert process.returncode == 0, told
    return time.monotonic() - began


def road(recipe: Path, run: RunDir) -> tuple[str, ...]:
    return ("run", str(recipe), "--run", str(run.path), "--resume")


def without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_clock(each) for name, each in value.items() if not CLOCK.fullmatch(name)}
    return [without_clock(each) for each in value] if isinstance(value, list) else value


def contents(run: RunDir) -> dict[str, Any]:
    """Return every file of a run by name: text without what depends on the clock, all else as its hash."""
    files = {file.relative_to(run.path).as_posix(): file for file in run.path.rglob("*") if file.is_file()}
    return {name: content(name, file, run) for name, file in sorted(files.items()) if name not in OWN}


def content(name: str, file: Path, run: RunDir) -> Any:
    if file.suffix not in (".json", ".jsonl", ".txt"):
        return digest(file)
    text = file.read_text().replace(str(run.path), "RUN")
    if file.suffix == ".txt":
        return re.sub(r"how long it took.*?\n\n", "", text, flags=re.DOTALL)
    if name == "chain.jsonl":
        return links(text)
    if file.suffix == ".jsonl":
        return [without_clock(json.loads(line)) for line in text.splitlines()]
    found = without_clock(json.loads(text))
    found.pop("seal", None)  # the hash of all the rest, seconds included
    if name == "evals/comparison.json":  # whose words on the export tell what the last of the commands had left to do
        exported = found["delivered"]["exported"]
        found["delivered"]["exported"] = exported | {"texts": "", "files": without_verdict(exported["files"])}
    if name.startswith("checkpoints/") and file.name == "state.json":
        del found["positions"]["metrics.jsonl"]  # whose lines hold seconds: their number of bytes, and their hash
    if name.startswith("checkpoints/") and file.name == "made.json":
        del found["sha256"]["state.json"], found["bytes"]["state.json"], found["previous"]
    return found


def links(chain: str) -> set[str]:
    """Return what the chain says of checkpoints and results, without hashes of what holds seconds. A kill may leave a
    line twice, or one of a checkpoint that was made again."""
    found = set()
    for line in map(json.loads, chain.splitlines()):
        line.pop("previous", None)
        line.pop("logs", None)
        line.get("files", {}).pop("state.json", None)
        if line["kind"] in ("checkpoint", "result"):
            found.add(json.dumps(line, sort_keys=True))
    return found


def without_verdict(files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    assert all(file["verdict"] in ("proved", "there already") for file in files)
    return [{**file, "verdict": ""} for file in files]


def published(hub: StandIn) -> dict[str, dict[str, Any]]:
    """Return what each repository holds: JSON without what depends on the clock."""
    return {
        name: {
            file: without_clock(json.loads(data)) if file.endswith(".json") else data
            for file, (data, _) in repo.files.items()
        }
        for name, repo in hub.repos.items()
    }


def test_a_delivery_killed_two_dozen_times_leaves_what_one_leaves_that_was_let_alone(tmp_path: Path) -> None:
    model_folder(tmp_path / "base", "qwen2")
    (tmp_path / "mine.py").write_text(TASK)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(RECIPE.format(model=tmp_path / "base", task=tmp_path / "mine.py"))
    # Names of one length: the summary's tables are as wide.
    whole, cut = RunDir(tmp_path / "whole" / "tiny"), RunDir(tmp_path / "slain" / "tiny")
    with standing() as first, standing() as second:
        lasted = ended(launch(first, *road(recipe, whole)))
        verified = ended(launch(first, "verify", str(whole.path)))
        draw, kills, told = random.Random(3), 0, set[str]()
        while kills < KILLS:
            kills += killed(launch(second, *road(recipe, cut)), draw.uniform(0.2, 1.0) * lasted)
            told |= {path.name for path in cut.path.iterdir()} if cut.path.is_dir() else set()
            if cut.summary.is_file():  # all was done: begin the delivery again, from what was trained
                kills += killed(launch(second, "verify", str(cut.path)), draw.uniform(0.2, 1.0) * verified)
                undo(cut, draw)
        ended(launch(second, *road(recipe, cut)))
        ended(launch(second, "verify", str(cut.path)))
        assert KILLS < ALL_KILLS or {"merged", "gguf", "check.json", "evals"} <= told
        ours, theirs = contents(cut), contents(whole)
        assert ours.keys() == theirs.keys()
        other = [name for name in ours if ours[name] != theirs[name]]
        assert not other, "\n".join(other)
        assert published(second) == published(first)
        assert len(published(first)) == 3


def killed(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Kill a process after so many seconds, if it still runs. Return whether it did."""
    time.sleep(seconds)
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def undo(run: RunDir, draw: random.Random) -> None:
    """Remove one of the results, and so what is made from it."""
    for path in (run.summary, *draw.choice([(run.merged, run.gguf), (run.gguf,), (run.check,)])):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
