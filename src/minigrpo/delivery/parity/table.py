"""The table that travels with a model: how far each of its stages is from the policy that was trained.

Merge, export and verify write its rows to the run's parity.json; all who show them read them from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from minigrpo.delivery.parity.kl import OTHER_TEXTS
from minigrpo.errors import ArtifactError, command_line
from minigrpo.runs.rundir import RunDir, read_json
from minigrpo.ui.tables import plain_table, titled

_STAGE_ORDER = ("base", "merged", "gguf", "compressed", "served")
"""From the base to the server."""
MIN_TOP1 = 0.9
"""Share of positions with the same likeliest token below which a rounded file is of no use: where one in ten differs,
an answer of a hundred tokens leaves the merged model's path ten times."""
PARITY_TITLE = "distance from the trained policy, nats a token"


def read_parity(run: RunDir) -> list[dict[str, Any]]:
    """Read the rows of parity.json in the order of the stages; an empty list where nothing was measured. Raises
    ArtifactError if the file is damaged."""
    if not run.parity.is_file():
        return []
    content = read_json(run.parity)
    rows = content.get("stages") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "mean_kl" in row for row in rows):
        again = command_line("minigrpo", "verify", run.path)
        raise ArtifactError(f"{run.parity} is damaged. Remove it, then measure again: {again}")
    return sorted(rows, key=lambda row: _stage_order(str(row["name"])))


def _stage_order(name: str) -> int:
    first = name.removesuffix(OTHER_TEXTS).partition(" ")[0]
    return _STAGE_ORDER.index(first) if first in _STAGE_ORDER else len(_STAGE_ORDER)


def parity_table(stages: Sequence[Mapping[str, Any]], title: str = PARITY_TITLE) -> RenderableType:
    """Show rows of parity.json. "of training": the distance divided by that of the base, which is what training did.

    A stage's row on other texts follows its own, and need not name it again: 80 columns are few.
    """
    table = plain_table("KL", "of training", "worst", "top-1", "same start", "")
    for row in stages:
        agrees = f"{row['greedy']:.1f}/{row['greedy_of']:.1f}"
        share = "1" if _is_base(row) else format_kl(row["relative_kl"])
        distances = format_kl(row["mean_kl"]), share, format_kl(row["max_kl"])
        name = str(row["name"])
        shown = f"  {OTHER_TEXTS.strip(', ')}" if name.endswith(OTHER_TEXTS) else name
        table.add_row(shown, *distances, f"{row['top1']:.1%}", agrees, _verdict_text(row))
    return titled(title, table)


def proof_title(stages: Sequence[Mapping[str, Any]], source: str) -> str:
    """Say what the rows stand on. `source`: where the task's texts come from."""
    here, *elsewhere = stages[0], *(row for row in stages if str(row["name"]).endswith(OTHER_TEXTS))
    told = f"{PARITY_TITLE}: {here['tokens']:,} tokens of {here['texts']} {source}"
    if (precision := here.get("precision", "float32")) != "float32":
        told = f"{told}; computed in {precision}, for want of memory"
    return f"{told}; {elsewhere[0]['tokens']:,} of {elsewhere[0]['texts']} other texts" if elsewhere else told


def unusable_reason(row: Mapping[str, Any]) -> str | None:
    """Say why a GGUF file is of no use although nothing refuses it, and what to take instead; None where it is usable.

    Coarse types have no limit: their rounding may undo more than training did, which only these figures tell.
    """
    stage, _, kind = str(row["name"]).removesuffix(OTHER_TEXTS).partition(" ")
    share, top1 = row.get("relative_kl"), row.get("top1", 1.0)
    if stage != "gguf" or kind in ("F32", "F16", "BF16"):  # made without choice: they are what others are made from
        return None
    if share is not None and share > 1:
        reason = f"rounding to {kind} moves it {share:.2g} times as far as training did"
    elif top1 < MIN_TOP1:
        reason = f"in {kind} the likeliest token is another one at {1 - top1:.0%} of the positions"
    else:
        return None
    if kind == "Q8_0":
        return f"unusable: {reason}. Take F16 or BF16."
    return f"unusable: {reason}. Take Q8_0, or pack it with an importance matrix (llama-quantize --imatrix)."


def format_kl(value: float | None) -> str:
    """Format with two digits; "-" for None, which stands for a distance that is infinite or was not measured."""
    return "-" if value is None else f"{value:.2g}"


def _is_base(row: Mapping[str, Any]) -> bool:
    return str(row["name"]).removesuffix(OTHER_TEXTS) == "base"


def _verdict_text(row: Mapping[str, Any]) -> Text:
    if _is_base(row):
        return Text("what training did", style="dim")
    if not row["ok"]:
        return Text("failed", style="bold red")
    if unusable_reason(row):
        return Text("unusable", style="bold red")
    # A stage without a limit is only reported, such as a coarse type, for which no limit fits all models.
    judged = row.get("judged", row.get("limit") is not None or row.get("ceiling") is not None)
    return Text("proved", style="green") if judged else Text("measured")
