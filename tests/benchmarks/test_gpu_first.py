"""The script for a first GPU: it is rehearsed here from end to end, and no stage that fails costs another."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_first
from benchmarks.gpu_first import Stage, failed, run
from benchmarks.proof import NOISE, move_from_zero


def python(code: str, seconds: float = 30.0, result: Path | None = None) -> Stage:
    return Stage("doctor", (sys.executable, "-c", code), seconds, result)


def test_a_stage_that_fails_hangs_or_comes_too_late_says_so_and_keeps_what_it_wrote(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    assert run(python("print('hello'); print('{\"a\": 1}')"), 30).figures == {"a": 1}
    broken = run(python("print('{\"ok\": false}'); import sys; sys.exit('no GPU')"), 30)
    assert (broken.fault, broken.figures) == ("exit code 1: no GPU", {"ok": False})
    slow = f"open({str(file)!r}, 'w').write('{{\"results\": []}}'); import time; time.sleep(60)"
    stopped = run(python(slow, 1.0, file), 30)
    assert (stopped.fault, stopped.figures) == ("stopped after 1 seconds", {"results": []})
    assert run(python("print(1)"), 0.0).fault == "not run: no time was left"


def test_tokens_that_differ_are_a_failure() -> None:
    stage = {"name": "engines", "fault": "", "figures": {"tokens": [{"same": True}, {"same": False}]}}
    assert failed({"stages": [stage]})
    stage["figures"] = {"tokens": [{"same": True}]}
    assert not failed({"stages": [stage]})
    assert failed({"stages": [{**stage, "fault": "exit code 1: out of memory"}]})


def test_the_limits_of_all_stages_leave_the_benchmark_half_of_the_time() -> None:
    *first, bench = gpu_first.stages(Path("out"), "cuda", tiny=False)
    assert bench.name == "bench"
    assert gpu_first.SECONDS <= 540
    assert sum(stage.seconds for stage in first) + 120 <= gpu_first.SECONDS


def test_the_proof_moves_weights_on_any_device_by_the_same_numbers() -> None:
    here, there = torch.zeros(3, 4), torch.zeros(3, 4, device="meta")
    move_from_zero([here, there])
    assert torch.equal(here, NOISE * torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))


@pytest.mark.long
@pytest.mark.extra("bench")
def test_the_whole_script_runs_in_tiny_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_first.main(["--tiny", "--out", str(tmp_path), "--seconds", "280"]) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / gpu_first.FILE).read_text())
    figures = {stage["name"]: stage["figures"] for stage in report["stages"]}
    assert list(figures) == ["doctor", "tests", "engines", "memory", "bench"]
    assert [row["engine"] for row in figures["engines"]["tokens"]] == ["native", "slots", "transformers"]
    assert all(row["same"] and row["tokens"] > 30 for row in figures["engines"]["tokens"])
    assert all(row["tokens_per_second"] > 0 for row in figures["engines"]["speed"])
    assert 0.5 < figures["engines"]["sixteen_bit"]["share"] <= 1
    assert all(row["planned_gb"] > 0 and row["measured_gb"] > 0 for row in figures["memory"]["phases"])
    assert figures["bench"]["results"][0]["ratio"]["TRL"] > 0
    page = (tmp_path / gpu_first.PAGE).read_text()
    for words in ("a rehearsal", "## What doctor found", "| native | all of", "## Memory", "| mini |"):
        assert words in page
    assert "DIFFERENT" not in page
