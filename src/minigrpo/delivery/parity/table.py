"""The table that travels with a model: how far each of its stages is from the policy that was trained.

Merge, export and verify leave its rows in the run's parity.json; whoever shows them reads them from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from minigrpo.errors import ArtifactError
from minigrpo.runs.rundir import RunDir, read_json
from minigrpo.ui.tables import plain_table, titled

ORDER = ("base", "merged", "gguf", "served")
"""Along the road."""
TITLE = "distance from the trained policy, nats a token"


def read_parity(run: RunDir) -> list[dict[str, Any]]:
    """The rows of parity.json along the road; none where nothing was measured. Raises ArtifactError if damaged."""
    if not run.parity.is_file():
        return []
    content = read_json(run.parity)
    rows = content.get("stages") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "mean_kl" in row for row in rows):
        raise ArtifactError(f"{run.parity} is damaged. Remove it, then measure again: minigrpo verify {run.path}")
    return sorted(rows, key=lambda row: place(str(row["name"])))


def place(name: str) -> int:
    first = name.partition(" ")[0]
    return ORDER.index(first) if first in ORDER else len(ORDER)


def parity_table(stages: Sequence[Mapping[str, Any]], title: str = TITLE) -> RenderableType:
    """`stages`: rows of parity.json. "of training": the distance over that of the base, which is what training did."""
    table = plain_table("KL", "of training", "worst", "top-1", "same start", "")
    for row in stages:
        agrees = f"{row['greedy']:.1f}/{row['greedy_of']:.1f}"
        share = "1" if row["name"] == "base" else figure(row["relative_kl"])
        distances = figure(row["mean_kl"]), share, figure(row["max_kl"])
        table.add_row(row["name"], *distances, f"{row['top1']:.1%}", agrees, verdict(row))
    return titled(title, table)


def figure(value: float | None) -> str:
    """Two digits; a distance that JSON cannot hold is infinite or none."""
    return "-" if value is None else f"{value:.2g}"


def verdict(row: Mapping[str, Any]) -> Text:
    if row["name"] == "base":
        return Text("what training did", style="dim")
    if not row["ok"]:
        return Text("failed", style="bold red")
    # A stage without a limit is only told: a coarse type, say, for which no limit fits all models.
    judged = row.get("judged", row.get("limit") is not None)
    return Text("proved", style="green") if judged else Text("measured")
