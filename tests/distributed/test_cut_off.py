"""Two machines, and the cable between them pulled: namespaces of this machine's network, joined by a pair of devices.

Each test makes its own namespaces and removes them. Nothing outside them is touched, and no address outside is used.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from minigrpo.runs.rundir import RunDir, digest
from tests.distributed.test_lost_ranks import TASK, steps_logged

pytestmark = [pytest.mark.long, pytest.mark.needs("namespaces"), pytest.mark.timeout(2000)]

LIMIT_S = 400
"""Seconds after which a job that has not ended hangs. Undisturbed it takes about half a minute on two quiet cores; on a
host that is cut off for good, two minutes are the launcher's (`LAUNCHER_WAIT_S`)."""
STEPS = 40
ADDRESSES = ("10.213.77.1", "10.213.77.2")


@dataclass(frozen=True)
class Cable:
    """Two namespaces with a device each. `names`: theirs; the devices are called so, too."""

    names: tuple[str, str]

    def pull(self) -> None:
        ip("-n", self.names[0], "link", "set", self.names[0], "down")

    def plug_in(self) -> None:
        ip("-n", self.names[0], "link", "set", self.names[0], "up")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def cable() -> Iterator[Cable]:
    names = (f"mga{os.getpid()}", f"mgb{os.getpid()}")
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
        yield Cable(names)
    finally:
        for name in names:
            inside = subprocess.run(["ip", "netns", "pids", name], check=False, capture_output=True, text=True)
            for pid in inside.stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def begin(cable: Cable, folder: Path, model: Path, silence: float) -> list[subprocess.Popen[str]]:
    """Start one rank in each namespace, by torch's own launcher, on hosts of two names."""
    (folder / "letters.py").write_text(TASK)
    knobs = "--task.name letters.py:letters --rollout.prompts 4 --rollout.completions 4 --rollout.max_tokens 12"
    knobs += f" --train.steps {STEPS} --train.lr 1e-3 --save.every 5 --lora.rank 4 --model.path {model} --run run"
    jobs = []
    for place, name in enumerate(cable.names):
        meeting = (
            f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint {ADDRESSES[0]}:29400 --rdzv-id job"
        )
        meeting += f" --rdzv-conf is_host={int(place == 0)}"
        start = f"-m torch.distributed.run {meeting} --local-addr {ADDRESSES[place]} -m -- minigrpo train quickstart"
        inside = ["ip", "netns", "exec", name, "unshare", "--uts"]
        inside += ["sh", "-c", 'hostname "$0"; exec "$@"', f"host{place}"]
        variables = {"MINIGRPO_SILENCE": str(silence), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": name}
        jobs.append(
            subprocess.Popen(
                [*inside, sys.executable, *start.split(), *knobs.split()],
                cwd=folder,
                env=os.environ | variables,
                text=True,
                stdout=subprocess.DEVNULL,
                stderr=(folder / f"errors{place}").open("w"),
                start_new_session=True,
            )
        )
    return jobs


def wait_for_step(folder: Path, step: int, jobs: list[subprocess.Popen[str]]) -> None:
    wait_until(lambda: step in steps_logged(folder) or any(job.poll() is not None for job in jobs))
    assert step in steps_logged(folder), [(folder / f"errors{place}").read_text() for place in (0, 1)]


def wait_until(happened: Callable[[], Any]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def ended(jobs: list[subprocess.Popen[str]], folder: Path) -> tuple[list[int], list[str]]:
    """Return exit codes and what was said. Fail where a job hangs; none is left behind."""
    try:
        wait_until(lambda: all(job.poll() is not None for job in jobs))
    finally:
        for job in jobs:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()
    return [job.returncode for job in jobs], [(folder / f"errors{place}").read_text() for place in (0, 1)]


def test_a_host_that_is_cut_off_for_20_seconds_costs_no_step_or_a_sentence(
    cable: Cable, tmp_path: Path, tiny_folder: Any
) -> None:
    weights: dict[str, str] = {}
    for name, seconds in (("undisturbed", 0.0), ("cut", 20.0)):
        folder = tmp_path / name
        folder.mkdir()
        jobs = begin(cable, folder, tiny_folder(), silence=40)
        wait_for_step(folder, 3, jobs)
        if seconds:
            cable.pull()
            time.sleep(seconds)
            cable.plug_in()
        codes, said = ended(jobs, folder)
        assert codes == [0, 0], said
        assert "2 ranks: 1 on host0, 1 on host1" in said[0]
        assert steps_logged(folder) == list(range(1, STEPS + 1))
        weights[name] = digest(RunDir(folder / "run").adapter / "adapter_model.safetensors")
    assert weights["cut"] == weights["undisturbed"]


def test_a_host_that_is_cut_off_for_good_ends_the_job_on_both_sides_with_a_sentence(
    cable: Cable, tmp_path: Path, tiny_folder: Any
) -> None:
    jobs = begin(cable, tmp_path, tiny_folder(), silence=8)
    wait_for_step(tmp_path, 3, jobs)
    cable.pull()
    codes, (here, there) = ended(jobs, tmp_path)
    assert 0 not in codes, (here, there)
    assert "on host1) has not been heard of for " in here
    assert "it was " in here
    assert "What started the ranks does not answer any more" in there
    assert "has waited 120 s for the host that started the job and was ended" in there
    assert "rank 1 on host1 was " in there
    assert "--resume goes on from the newest checkpoint" in here
