"""Ranks that are killed or stopped while they train: the run ends as the undisturbed one, or with a sentence."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from minigrpo.runs.rundir import RunDir, digest

pytestmark = [pytest.mark.long, pytest.mark.needs("linux")]

LIMIT_S = 300
"""Seconds that no job here may take. Alone, one with three restarts takes about a minute on two cores."""

TASK = """
from minigrpo import Grade, Prompt, Task

def prompts(split):
    return [Prompt(f"{split}-{i}", ({"role": "user", "content": f"say {i}"},)) for i in range(20)]

def grade(prompt, text):
    return Grade(sum(letter.islower() for letter in text) / 8)

letters = Task("letters", prompts, grade)
"""


def begin(
    folder: Path, model: Path, *more: str, steps: int = 60, launcher: Sequence[str] | None = None
) -> subprocess.Popen[str]:
    """Start the job with `minigrpo train --nproc 2`, or with torch's launcher and these options of it."""
    (folder / "letters.py").write_text(TASK)
    knobs = "--task.name letters.py:letters --rollout.prompts 4 --rollout.completions 4 --rollout.max_tokens 12"
    knobs += f" --train.steps {steps} --train.lr 1e-3 --save.every 5 --lora.rank 4"
    start = (
        ["-m", "minigrpo"] if launcher is None else ["-m", "torch.distributed.run", *launcher, "-m", "--", "minigrpo"]
    )
    ranks = ["--nproc", "2"] if launcher is None else []
    command = [sys.executable, *start, "train", "quickstart", *knobs.split(), "--model.path", str(model), *ranks]
    environment = {**os.environ, "MINIGRPO_SILENCE": "8", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--run", "run", *more],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=(folder / "errors").open("w"),
    )


def ranks_of(job: subprocess.Popen[str]) -> dict[int, int]:
    """Return the processes that the launcher has started, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0") if parent == job.pid else []
        except OSError:
            continue  # it has ended
        found |= {int(text[5:]): int(folder.name) for text in variables if text.startswith(b"RANK=")}
    return found


def steps_logged(folder: Path) -> list[int]:
    metrics = RunDir(folder / "run").metrics
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def wait_until(happened: Callable[[], Any], job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not happened():
        assert job.poll() is None, "the job has ended"
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def ended(job: subprocess.Popen[str], folder: Path) -> tuple[int, str]:
    try:
        code = job.wait(LIMIT_S)
    finally:
        for pid in (*ranks_of(job).values(), job.pid) if job.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
    return code, (folder / "errors").read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Any) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    code, errors = ended(begin(folder, tiny_folder()), folder)
    assert code == 0, errors
    assert steps_logged(folder) == list(range(1, 61))
    return folder


def assert_as_undisturbed(folder: Path, undisturbed: Path) -> None:
    assert steps_logged(folder) == list(range(1, 61))
    left, right = RunDir(folder / "run"), RunDir(undisturbed / "run")
    assert left.groups.read_bytes() == right.groups.read_bytes()
    name = "adapter_model.safetensors"
    assert digest(left.adapter / name) == digest(right.adapter / name)


@pytest.mark.parametrize("seed", range(7))
def test_ranks_killed_at_any_moment_cost_seconds_and_the_run_ends_as_the_undisturbed_one(
    tmp_path: Path, tiny_folder: Any, undisturbed: Path, seed: int
) -> None:
    draw = random.Random(seed)
    job = begin(tmp_path, tiny_folder(), "--max-restarts", "3")
    for victim in (0, 1, draw.randrange(2)):
        before = set(ranks_of(job).values())
        start = len(steps_logged(tmp_path)) // 5 * 5
        wait_until(lambda start=start: start + 6 <= len(steps_logged(tmp_path)) and len(ranks_of(job)) == 2, job)
        time.sleep(draw.random() / 5)
        killed = time.monotonic()
        os.kill(ranks_of(job)[victim], signal.SIGKILL)
        wait_until(lambda before=before: not before & set(ranks_of(job).values()) and len(ranks_of(job)) == 2, job)
        assert time.monotonic() - killed < 30
    code, errors = ended(job, tmp_path)
    assert code == 0, errors
    assert errors.count("All ranks begin again at the newest checkpoint") == 3
    assert_as_undisturbed(tmp_path, undisturbed)


@pytest.mark.parametrize("seed", range(10))
def test_a_rank_that_stands_still_is_named_and_replaced(
    tmp_path: Path, tiny_folder: Any, undisturbed: Path, seed: int
) -> None:
    draw = random.Random(seed)
    victim, step = draw.randrange(2), draw.randrange(3, 40)
    job = begin(tmp_path, tiny_folder(), "--max-restarts", "1")
    wait_until(lambda: len(steps_logged(tmp_path)) > step, job)
    time.sleep(draw.random() / 5)
    os.kill(ranks_of(job)[victim], signal.SIGSTOP)
    code, errors = ended(job, tmp_path)
    assert code == 0, errors
    assert f"Rank {victim} (process" in errors
    assert "has not been heard of for" in errors
    assert " of step " in errors or "after step" in errors
    assert_as_undisturbed(tmp_path, undisturbed)


def test_without_a_restart_left_the_job_ends_with_the_rank_and_what_it_did(tmp_path: Path, tiny_folder: Any) -> None:
    job = begin(tmp_path, tiny_folder(), "--max-restarts", "0")
    wait_until(lambda: len(steps_logged(tmp_path)) > 2, job)
    os.kill(ranks_of(job)[0], signal.SIGKILL)
    code, errors = ended(job, tmp_path)
    assert code == 75
    assert "Rank 0 was ended by SIGKILL. No attempt is left" in errors
    assert "Rank 0 (process" in errors
    assert "Traceback" not in errors


def test_a_user_s_mistake_is_told_once_and_not_tried_again(tmp_path: Path, tiny_folder: Any) -> None:
    job = begin(tmp_path, tiny_folder() / "nowhere")
    code, errors = ended(job, tmp_path)
    assert code == 2
    assert errors.count("error: ") == 1, errors
    assert "begin again" not in errors


def test_torch_s_own_launcher_starts_ranks_and_its_restarts_go_on(
    tmp_path: Path, tiny_folder: Any, undisturbed: Path
) -> None:
    job = begin(tmp_path, tiny_folder(), launcher=("--standalone", "--nproc-per-node", "2", "--max-restarts", "1"))
    wait_until(lambda: len(steps_logged(tmp_path)) > 7, job)
    os.kill(ranks_of(job)[0], signal.SIGKILL)
    code, errors = ended(job, tmp_path)
    assert code == 0, errors
    assert "Resumed after step" in errors
    assert_as_undisturbed(tmp_path, undisturbed)


def test_ctrl_c_finishes_the_step_on_all_ranks(tmp_path: Path, tiny_folder: Any, undisturbed: Path) -> None:
    job = begin(tmp_path, tiny_folder())
    wait_until(lambda: len(steps_logged(tmp_path)) > 3, job)
    job.send_signal(signal.SIGINT)
    code, errors = ended(job, tmp_path)
    assert code == 130, errors
    done = steps_logged(tmp_path)
    assert RunDir(tmp_path / "run").checkpoint(done[-1]).is_dir()
    again = begin(tmp_path, tiny_folder(), "--resume")
    code, errors = ended(again, tmp_path)
    assert code == 0, errors
    assert_as_undisturbed(tmp_path, undisturbed)


def test_ranks_whose_launcher_is_killed_end_by_themselves(tmp_path: Path, tiny_folder: Any) -> None:
    job = begin(tmp_path, tiny_folder(), steps=100_000)
    wait_until(lambda: len(steps_logged(tmp_path)) > 2, job)
    pids = ranks_of(job).values()
    job.kill()
    job.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text() for pid in pids):
        assert time.monotonic() < deadline, "ranks outlived their launcher"
        time.sleep(0.1)
    assert "What started the ranks does not answer" in (tmp_path / "errors").read_text()
