"""The chain of a run: one line for each thing that training made, each with the hash of the line before it.

    {"kind": "begin", "previous": null, "after": 0, "recipe": HASH, "code": HASH, "base": HASH, "data": HASH, ...}
    {"kind": "checkpoint", "previous": HASH, "step": 25, "files": {NAME: HASH}, "logs": {NAME: {bytes, sha256}}}
    {"kind": "result", "previous": HASH, "name": "adapter", "digest": HASH, "files": {NAME: HASH}}

A checkpoint's made.json holds the same `previous`, so its line can be written again from the folder alone; the lines of
checkpoints that were removed stay. A line is written before what it tells of gets its name: after a kill the chain may
be one line ahead, never behind, and a resumed run cuts it back with its logs. A session that goes on with other code,
data or another machine begins with a line of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minigrpo.errors import ArtifactError
from minigrpo.runs.logger import lines_backwards
from minigrpo.runs.rundir import RunDir, digest, sync, writing

KEYS = {
    "begin": {"after", "recipe", "code", "base", "warmup", "data", "task", "machine"},
    "checkpoint": {"step", "files", "logs"},
    "result": {"step", "name", "digest", "files"},
}
"""What a line of each kind holds at least."""
LOGS = {"metrics.jsonl", "groups.jsonl"}
"""Of what a checkpoint's line holds length and hash: a log without them could say anything."""


@dataclass(frozen=True, slots=True)
class Link:
    """One line of the chain. `sha256`: of the line, which the next one repeats; `end`: its last byte in the file."""

    kind: str
    facts: Mapping[str, Any]
    previous: str | None
    sha256: str
    end: int

    @property
    def step(self) -> int:
        """Return after how many steps it was written."""
        return int(self.facts["after" if self.kind == "begin" else "step"])


def read_chain(run: RunDir, *, strict: bool = True) -> Iterator[Link]:
    """Yield the lines in order; nothing where there is no chain.

    Raise ArtifactError, naming the line, where one is damaged or does not follow from the one before it; without
    `strict`, end before it instead.
    """
    previous, end = None, 0
    for number, line in enumerate(_lines(run), 1):
        if not line.endswith(b"\n"):
            return  # a kill cut it short: what it tells of was not made
        end += len(line)
        link = _link(line, end)
        if link is None or link.previous != previous:
            if not strict:
                return
            what = "is damaged" if link is None else "does not follow from the line before it"
            raise ArtifactError(f"{run.chain}: line {number} {what}.")
        previous = link.sha256
        yield link


def append_link(run: RunDir, kind: str, facts: Mapping[str, Any]) -> str | None:
    """Add a line, on the disk when this returns. Return the hash of the line before it."""
    previous = chain_head(run)
    with writing(run.chain), run.chain.open("a", encoding="ascii", newline="\n") as stream:
        stream.write(link_text(kind, previous, facts) + "\n")
    sync(run.chain)
    return previous


def chain_head(run: RunDir) -> str | None:
    """Return the hash of the chain's last line, without reading the others; None where there is none."""
    last = next(filter(None, lines_backwards(run.chain)), None)
    return hashlib.sha256(last).hexdigest() if last else None


def rewind_chain(run: RunDir, step: int | None) -> None:
    """Cut the chain behind the checkpoint of that step, or empty it where it has none; half a line goes, too."""
    kept = 0
    for link in read_chain(run, strict=False):
        if link.kind == "checkpoint" and link.step == step:
            kept = link.end
    if run.chain.exists() and run.chain.stat().st_size != kept:
        with writing(run.chain):
            os.truncate(run.chain, kept)


def audited_state(run: RunDir) -> dict[str, Any]:
    """Return by what an audit is recognised as one of the run as it is now: the chain's last line, and the results."""
    made = {path.name: digest(path) for path in (run.adapter, run.model, run.merged, run.gguf) if path.is_dir()}
    return {"chain": chain_head(run), **made}


def link_text(kind: str, previous: str | None, facts: Mapping[str, Any]) -> str:
    """Write the line of these facts, without its end."""
    return json.dumps({"kind": kind, "previous": previous, **facts}, separators=(",", ":"))


def _link(line: bytes, end: int) -> Link | None:
    try:
        facts = json.loads(line)
        kind, previous = facts.pop("kind"), facts.pop("previous")
        link = Link(kind, facts, previous, hashlib.sha256(line.rstrip(b"\n")).hexdigest(), end)
        whole = line == f"{link_text(kind, previous, facts)}\n".encode("ascii") and KEYS[kind] <= facts.keys()
        whole = whole and (kind != "checkpoint" or facts["logs"].keys() >= LOGS)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return link if whole else None


def _lines(run: RunDir) -> Iterator[bytes]:
    if run.chain.is_file():
        with run.chain.open("rb") as stream:
            yield from stream
