"""What the stages before and after training left in a run's folder, as the page "Stages" shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigrpo.view.library import OpenRun

HIDDEN = ("answers",)
"""What is left out of an evaluation's figures: it is asked for apart, some at a time."""
ROWS = 20
"""Answers sent at a time."""
MOST_FILES = 400


def read_stages(run: OpenRun) -> dict[str, Any]:
    """Return the verdicts and tables of all stages; {} stands for a stage that has not run."""
    folder = run.run
    return {
        "preflight": run.read(folder.preflight),
        "check": run.read(folder.check),
        "parity": run.read(folder.parity),
        "comparison": run.read(folder.evals / "comparison.json"),
        "evaluations": [_evaluation(run, path) for path in _evaluations(run)],
        "seconds": run.read(folder.path / "seconds.json"),
        "machine": run.read(folder.machine),
        "files": list(_files(folder.path)),
    }


def _evaluations(run: OpenRun) -> list[Path]:
    paths = sorted(run.run.evals.glob("*.json")) if run.run.evals.is_dir() else []
    return [path for path in paths if path.name != "comparison.json" and not path.name.startswith(".")]


def _evaluation(run: OpenRun, path: Path) -> dict[str, Any]:
    content = run.read(path)
    scores = content.get("scores")
    figures = {name: value for name, value in scores.items() if name not in HIDDEN} if isinstance(scores, dict) else {}
    told = {name: content.get(name) for name in ("name", "task", "split", "sampling", "damaged")}
    return {"file": path.name, **told, "scores": figures}


def _files(folder: Path) -> Sequence[Mapping[str, Any]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [{"name": str(path.relative_to(folder)), "bytes": path.stat().st_size} for path in paths[:MOST_FILES]]


def read_answers(run: OpenRun, file: str, beside: str, only: str, start: int) -> dict[str, Any]:
    """Return one page of an evaluation's answers, each with that of another evaluation (`beside`) to the same prompt.

    `only`: gained or lost against the other, right, wrong, or "" for all. Counts tell how many of each there are.
    """
    names = {path.name: path for path in _evaluations(run)}
    own, other = (_answers(run, names[name]) if name in names else [] for name in (file, beside))
    pairs = _paired(own, other)
    kinds = [_kinds(answer, before) for answer, before in pairs]
    counts = {kind: sum(kind in each for each in kinds) for kind in ("gained", "lost", "right", "wrong")}
    chosen = [pair for pair, kind in zip(pairs, kinds, strict=True) if not only or only in kind]
    rows = [{"answer": answer, "before": before} for answer, before in chosen[start : start + ROWS]]
    following = start + ROWS if start + ROWS < len(chosen) else None
    return {"rows": rows, "next": following, "found": len(chosen), "of": len(pairs), "counts": counts}


def _answers(run: OpenRun, path: Path) -> list[dict[str, Any]]:
    scores = run.read(path).get("scores")
    listed = scores.get("answers") if isinstance(scores, dict) else None
    return [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []


Pair = tuple[dict[str, Any], dict[str, Any] | None]


def _paired(own: list[dict[str, Any]], other: list[dict[str, Any]]) -> list[Pair]:
    """Join answers to the same prompt, its first sample with the other's first, and so on."""
    waiting: dict[Any, list[dict[str, Any]]] = {}
    for answer in reversed(other):
        waiting.setdefault(str(answer.get("prompt")), []).append(answer)
    pairs: list[Pair] = []
    for answer in own:
        queue = waiting.get(str(answer.get("prompt")))
        pairs.append((answer, queue.pop() if queue else None))
    return pairs


def _kinds(answer: dict[str, Any], before: dict[str, Any] | None) -> set[str]:
    right = bool(answer.get("solved"))
    kinds = {"right" if right else "wrong"}
    if before is not None and bool(before.get("solved")) != right:
        kinds.add("gained" if right else "lost")
    return kinds
