"""An audit of a long run takes the memory of a short one, and the time that reading it takes."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from minigrpo import audit
from minigrpo.pipeline.audit import Audited
from minigrpo.runs.chain import link_text, read_chain
from minigrpo.runs.rundir import RunDir
from tests.helpers.proved import own_copy, proved_home

__all__ = ["own_copy", "proved_home"]

STEPS, EVERY = 30_000, 10


def lengthen(run: RunDir, steps: int) -> None:
    """Let the run have so many steps, with a line of the chain after each `EVERY`: copies of its last one.

    Nobody could do these again; of what was saved after them the chain has hashes alone, as of removed checkpoints.
    """
    *links, result = list(read_chain(run))
    last = links[-1]
    shutil.rmtree(run.checkpoint(last.step), ignore_errors=True)
    logs = [Log(path, last.step) for path in (run.metrics, run.groups)]
    lines, previous = run.chain.read_text().splitlines()[:-1], last.sha256
    for step in range(last.step + 1, steps + 1):
        for log in logs:
            log.add(step)
        if step % EVERY == 0:
            facts = {**last.facts, "step": step, "logs": {log.path.name: log.position() for log in logs}}
            lines.append(link_text("checkpoint", previous, facts))
            previous = hashlib.sha256(lines[-1].encode()).hexdigest()
    lines.append(link_text("result", previous, {**result.facts, "step": steps}))
    run.chain.write_text("".join(f"{line}\n" for line in lines))
    for log in logs:
        log.path.write_bytes(b"".join(log.pieces))


class Log:
    """A log in memory, and the hash of it so far."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.pieces = path, [path.read_bytes()]
        self.hash, self.length = hashlib.sha256(self.pieces[0]), len(self.pieces[0])
        rows = [json.loads(line) for line in self.pieces[0].splitlines()]
        self.rows = [row for row in rows if row["step"] == step]

    def add(self, step: int) -> None:
        text = "".join(json.dumps({**row, "step": step}) + "\n" for row in self.rows).encode()
        self.pieces.append(text)
        self.hash.update(text)
        self.length += len(text)

    def position(self) -> dict[str, Any]:
        return {"bytes": self.length, "sha256": self.hash.hexdigest()}


@dataclass(frozen=True)
class Cost:
    found: Audited
    seconds: float
    peak: int


def cost_of(run: RunDir, steps: int) -> Cost:
    """Audit, and measure CPU time, which other processes do not lengthen, and the peak of Python's memory."""
    tracemalloc.start()
    began = time.process_time()
    found = audit(run, steps=steps, answers=0, seed=1, quiet=True)
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return Cost(found, seconds, peak)


def read_twice(paths: list[Path]) -> float:
    """Read and hash files as an audit must: once for their lines' hashes, once for the start of a checkpoint."""
    began = time.process_time()
    for path in [*paths, *paths]:
        hashlib.sha256(path.read_bytes())
    return time.process_time() - began


@pytest.mark.long
def test_memory_and_time_do_not_grow_with_the_run_beyond_reading_it(run: RunDir) -> None:
    lengthen(run, 2 * EVERY)
    audit(run, steps=9, answers=0, quiet=True)  # libraries are loaded
    short = cost_of(run, steps=9)
    lengthen(run, STEPS)
    logs, chain = run.metrics.stat().st_size + run.groups.stat().st_size, run.chain.stat().st_size
    long = cost_of(run, steps=9)
    for each in (short, long):
        assert each.found.faults == ()
        assert [(part.start, part.until) for part in each.found.stretches] == [(0, 2), (4, 6)]
    assert logs > 50e6
    # The chain is held in memory, a few hashes for each save; of the logs a piece at a time.
    assert long.peak - short.peak < 4 * chain < logs / 2
    tracemalloc.start()  # which slows whatever allocates
    reading = read_twice([run.metrics, run.groups])
    tracemalloc.stop()
    lines = STEPS / EVERY
    assert long.seconds - short.seconds < 10 * reading + lines * 2e-3, (short, long, reading)
