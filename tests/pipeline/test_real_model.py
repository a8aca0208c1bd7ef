"""The stages on a real pretrained model: preflight, two steps, a kill and a resume, check, merge, Q8_0, the proof."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.long,
    pytest.mark.env("MINIGRPO_REAL_MODEL"),
    pytest.mark.extra("gguf"),
    pytest.mark.timeout(3600),
]

# A high learning rate, so that two steps change more than 16-bit weights round away.
KNOBS = {
    "model.dtype": "bfloat16",
    "task.data": "wordproblems:",
    "task.example": "true",
    "task.size": "64",
    "rollout.prompts": "2",
    "rollout.completions": "8",
    "groups.resample": "4",
    "rollout.max_tokens": "96",
    "train.steps": "2",
    "train.lr": "1e-3",
    "lora.dropout": "0",
    "save.every": "1",
}
TIMEOUT_S = 1200  # of one command; the stages together take six to fifteen minutes


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "minigrpo.cli.main", *arguments]


def recipe_command(stage: str, run: Path) -> list[str]:
    knobs = {"model.path": os.environ["MINIGRPO_REAL_MODEL"], **KNOBS}
    options = [part for name, value in knobs.items() for part in (f"--{name}", value)]
    return command(stage, "gsm8k-fast", *options, "--run", str(run))


def result_of(arguments: list[str], codes: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert ended.returncode in codes, f"{ended.stdout}\n{ended.stderr}"
    return ended


def kill_after_first_step(arguments: list[str], run: Path) -> None:
    """Start a training and kill it, as a power cut would, once it has logged and saved its first step."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    start = time.monotonic()
    while not (run / "checkpoints" / "000001").is_dir():
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() - start < TIMEOUT_S
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_every_stage_works_on_a_real_pretrained_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    seen = result_of([*recipe_command("preflight", tmp_path / "asked"), "--seconds", "1", "--json"], (0, 1))
    figures = json.loads(seen.stdout)["figures"]
    assert figures["completions"] == 16
    assert figures["formed"] > 0, "with a worked example, a real instruct model shows the form at least once in sixteen"
    first = seen.stderr.splitlines()
    assert any(line.startswith("preflight: ") and "completions sampled" in line for line in first)

    kill_after_first_step(recipe_command("train", run), run)
    assert not (run / "adapter").exists(), "it was killed too late"
    resumed = result_of([*recipe_command("train", run), "--resume"])
    assert "Resumed after step 1 of 2" in resumed.stderr
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [1, 2]
    gaps = [row["engine_gap"] for row in steps if "engine_gap" in row]  # a step whose groups all tie has no pass
    assert gaps, "no step had a group that differs: nothing was trained"
    assert max(gaps) < 0.05, "beyond what 16 bit rounds"

    result_of(command("check", str(run)))
    result_of(command("merge", str(run)))
    result_of(command("export", str(run), "--format", "Q8_0"))
    verified = json.loads(result_of(command("verify", str(run), "--json")).stdout)
    assert verified["ok"]
    assert {row["name"] for row in verified["rows"]} >= {"base", "merged"}
