"""Runs that exist as logs alone: what the page that explains runs reads, without a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

KNOBS = "train: {steps: 40}\nrollout: {prompts: 2, completions: 4}\ntask: {name: wordproblems}\n"

HOSTILE = (
    "<script>document.title = 'harmed'</script><img src=x onerror=\"document.title='harmed'\">",
    "safe \u202egnissap\u202c \x1b[2J\x00\x07 tab\tend",
    "half a pair: \ud800 and javascript:alert(1) ${document.title='harmed'}",
    "w" * 1_000_000,
)
"""Completions that would do harm if they were taken for anything but text."""


def completion(text: str, reward: float | None, **facts: Any) -> dict[str, Any]:
    right = bool(reward and reward >= 1)
    return {
        "text": text,
        "tokens": len(text.split()),
        "finish": "stop",
        "reward": reward,
        "parts": {"correct": float(right), "format": 1.0},
        "formed": True,
        "solved": right,
        "advantage": 0.5 if right else -0.5,
        **facts,
    }


def group(step: int, prompt: str, completions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is {prompt}?"}]
    target = {"answer": 4, "kind": "sum" if prompt < "m" else "product"}
    return {"step": step, "prompt": prompt, "messages": messages, "target": target, "completions": completions}


def figures(step: int, reward: float) -> dict[str, Any]:
    return {
        "step": step,
        "reward": reward,
        "reward_std": 0.2,
        "accuracy": reward / 1.2,
        "format": 1.0,
        "informative_groups": 1.0,
        "rewards/correct/mean": reward / 1.2,
        "completions/mean_length": 3.0,
        "completions/min_length": 2,
        "completions/max_length": 4,
        "num_tokens": 24,
        "seconds": 2.0,
        "entropy": 0.5,
    }


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("a", encoding="ascii") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def log_step(folder: Path, step: int, steps: int = 20) -> None:
    """Append one step of a run that learns: each prompt is right in more and more of its four answers."""
    rights = round(4 * step / steps)
    rows = [
        group(
            step,
            f"{name}{step % 3}",
            [completion(f"say {i}" if i < rights else f"say {i} or no", 1.2 if i < rights else 0.2) for i in range(4)],
        )
        for name in ("a", "z")
    ]
    append(folder / "groups.jsonl", rows)
    append(folder / "metrics.jsonl", [figures(step, 0.2 + rights / 4)])


def logged_run(folder: Path, steps: int = 20, knobs: str = KNOBS) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(knobs)
    for step in range(1, steps + 1):
        log_step(folder, step, steps)
    return folder


def hostile_run(folder: Path) -> Path:
    """Log one step whose prompt and answers are HOSTILE, with lines in between that are damaged."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(KNOBS)
    append(folder / "metrics.jsonl", [figures(1, 0.5)])
    append(folder / "groups.jsonl", [group(1, HOSTILE[0], [completion(text, 0.5) for text in HOSTILE])])
    with (folder / "groups.jsonl").open("ab") as stream:
        stream.write(b'{"step": 1, "prompt": "\xff\xfe bytes", "completions": [\n' + b"[" * 5000 + b"\n\n")
    return folder
