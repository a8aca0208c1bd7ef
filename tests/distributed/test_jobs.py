"""Files for schedulers are valid in their own language, and start what was asked for."""

import os
import re
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from minigrpo.distributed.jobs import HF_FLAVORS, KINDS, Job, job_file
from minigrpo.errors import RecipeError
from tests.helpers.command_line import called

ODD = Job("my-run", ("my file.yaml", "--task.system=it's $HOME", "--run", "/shared/my run"), 2, 4, 3, ("a", "b"))


def shell_accepts(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_scripts_are_accepted_by_the_shell_and_keep_odd_names_whole() -> None:
    for kind, job in (("slurm", ODD), ("ssh", ODD), ("hf-jobs", ON_A_BUCKET)):
        shell_accepts(text := job_file(kind, job))
        assert "minigrpo train 'my file.yaml'" in text
        assert "--resume" in text
    task = yaml.safe_load(job_file("skypilot", ODD))
    shell_accepts(task["run"])
    assert task["num_nodes"] == 2
    assert task["resources"] == {"accelerators": "H100:4"}
    assert "#SBATCH --nodes=2\n" in job_file("slurm", ODD)


ON_A_BUCKET = Job("my-run", (*ODD.words[:-1], "/runs/my run"), 1, 4, 3)


@pytest.mark.needs("linux")
@pytest.mark.parametrize("gpus", HF_FLAVORS)
def test_a_job_of_hugging_face_is_one_that_its_own_command_accepts(tmp_path: Path, gpus: int) -> None:
    """`hf` itself resolves the job, without submitting it; what it would run is what was asked for."""
    tools = tmp_path / "tools"
    tools.mkdir()
    hf = Path(sys.executable).with_name("hf")
    real = f'[ "$1" = buckets ] && exec echo "$@"\nshift 2\nexec {hf} jobs run --dry-run --namespace me "$@"\n'
    (tools / "hf").write_text(f"#!/bin/bash\n{real}")
    (tools / "hf").chmod(0o755)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_TOKEN": "hf_none", "BUCKET": "me/runs", "HOME": str(tmp_path)}
    script = job_file("hf-jobs", replace(ON_A_BUCKET, gpus=gpus))
    done = subprocess.run(
        ["bash"], input=script, text=True, capture_output=True, check=False, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "buckets create me/runs --private --exist-ok" in done.stdout
    told = dict(re.findall(r"^  (\w+) +(.+)$", done.stdout, re.MULTILINE))
    assert (told["flavor"], told["attempts"], told["timeout"]) == (HF_FLAVORS[gpus], "4", "24h")
    assert told["volumes"] == "hf://buckets/me/runs:/runs"
    assert f" {tmp_path}:/recipes\n" in done.stdout


def test_a_job_of_hugging_face_that_would_lose_its_run_is_refused() -> None:
    job = Job("letters", ("letters.yaml",), 1, 8, 0)
    assert "minigrpo train letters.yaml --run /runs/letters --resume" in job_file("hf-jobs", job)
    for wrong, told in (
        ({"words": ODD.words}, "The run in /shared/my run is lost"),
        ({"nodes": 2}, "has one machine"),
        ({"gpus": 3}, "has 3 GPUs: there are 1, 2, 4, 8"),
    ):
        with pytest.raises(RecipeError, match=told):
            job_file("hf-jobs", replace(job, **wrong))


def test_what_torchrun_is_given_is_what_it_understands() -> None:
    from torch.distributed.run import parse_args

    for kind in KINDS:
        job = ON_A_BUCKET if kind == "hf-jobs" else ODD
        shown = subprocess.run(
            ["bash", "-c", f"torchrun() {{ printf '%s\\n' \"$@\"; }}; {line_of(job_file(kind, job))}"],
            text=True,
            capture_output=True,
            check=True,
            env={"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "first": "h", "node": "1", "SKYPILOT_NUM_NODES": "2"}
            | {"SKYPILOT_NODE_RANK": "1", "HOME": "/nowhere", "PATH": os.environ["PATH"]},
        ).stdout.splitlines()
        parsed = parse_args(shown)
        nodes = "1:1" if kind == "hf-jobs" else "2"
        assert (parsed.nproc_per_node, parsed.nnodes, parsed.training_script) == ("4", nodes, "minigrpo")
        assert parsed.training_script_args == ["train", *job.words, "--resume"]


def line_of(text: str) -> str:
    """Return torchrun's command, which stands on two lines."""
    lines = text.splitlines()
    start = next(place for place, line in enumerate(lines) if "torchrun" in line)
    return "\n".join(lines[start : start + 2]).strip().rpartition("&& ")[2].removeprefix("srun ")


def test_the_command_prints_the_file_and_tells_mistakes_before_a_queue_does() -> None:
    done = called("launch", "slurm", "quickstart", "--nodes", "3", "--gpus", "2", "--train.steps", "5")
    assert done.code == 0
    assert "#SBATCH --nodes=3\n" in done.out
    assert "minigrpo train quickstart --train.steps=5 --resume" in done.out
    assert "train.steps" in called("launch", "slurm", "quickstart", "--train.stepz", "5").refused
    assert "slurm, skypilot, hf-jobs, ssh" in called("launch", "pbs", "quickstart").refused
    with pytest.raises(RecipeError, match="--hosts"):
        job_file("ssh", Job("n", ("quickstart",), 1, 1, 0))


@pytest.mark.long
@pytest.mark.needs("linux")
def test_two_machines_that_are_started_over_ssh_train_one_run(tmp_path: Path) -> None:
    """The machines are this one, twice: what stands in for ssh starts the command here."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {
        "ssh": 'shift 2; exec bash -c "$1"',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755 | stat.S_IEXEC)
    words = ("quickstart", "--train.steps=3", "--rollout.prompts=4", "--run", str(tmp_path / "run"))
    script = job_file("ssh", Job("n", words, 2, 1, 0, ("127.0.0.1", "localhost")))
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        ["bash"], input=script, text=True, capture_output=True, check=False, env=environment, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "2 ranks: 2 on " in done.stderr
    assert (tmp_path / "run" / "adapter").is_dir()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_stage_that_one_process_does_is_refused_to_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, text)
    told = called("run", "quickstart", "--run", tmp_path / "run").refused
    assert "started 2 processes, and only `minigrpo train` shares its work" in told
    told = called("train", "quickstart", "--run", tmp_path / "run", "--model.device", "cuda:1").refused
    assert "model.device names one GPU for all ranks" in told
    assert not (tmp_path / "run").exists()
