"""A training holds no more memory after hundreds of steps than after a few, and stays within its plan."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MARGIN = 1.1
"""A tenth more is let through: lengths of completions differ from step to step, and the plan leaves a tenth free."""

TRAIN = """
import sys
from minigrpo import RunDir, load_recipe, train
from minigrpo.training.memory.estimate import forecast
recipe = load_recipe("quickstart", {"train.steps": 300, "save.every": 100})
planned = forecast(recipe).peak / 1e9
train(recipe, RunDir(sys.argv[1]))
print(planned)
"""


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.needs("linux")  # elsewhere a process cannot reset its peak
def test_step_300_holds_no_more_than_step_30(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = subprocess.run([sys.executable, "-c", TRAIN, str(run)], check=True, capture_output=True, text=True)
    planned = float(ended.stdout.split()[-1])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 300
    peaks = [max(row["memory_gb/rollout"], row["memory_gb/update"]) for row in rows]
    early, late = max(peaks[:30]), max(peaks[270:])
    assert late <= MARGIN * early, f"{early:.2f} GB in the first 30 steps, {late:.2f} GB in the last"
    assert max(peaks) <= MARGIN * planned, f"{max(peaks):.2f} GB, {planned:.2f} GB planned"
