"""Merge a run wrongly on purpose, by ever smaller errors, and plot what the proofs say.

    python -m benchmarks.merge_errors runs/quickstart docs/merge_errors.svg

Left: the share of the changed values that the comparison with PEFT's merge refuses, for each number type; one suffices.
Right: the distance on texts, over that of the base, with the limits of what rounding may cost and of what float32 may
differ by. A merge whose change is multiplied by 1 + error is plainly wrong; its distance grows with the square of the
error.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigrpo.delivery.artifacts.merged_weights import weight_changes, write_merged
from minigrpo.delivery.artifacts.source import TrainedSource, source_of
from minigrpo.delivery.parity.compare import ParityReference, prove_merged, trained_reference
from minigrpo.delivery.parity.kl import FLOAT32_KL, MAX_RELATIVE_KL
from minigrpo.delivery.parity.weights import prove_weights
from minigrpo.models.adapter import Adapter
from minigrpo.models.model_files import BaseFiles, open_base, write_companions

ERRORS = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 0.5)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COLOURS = ("#1f6f8b", "#e8a87c", "#c0504d")


@dataclass(frozen=True, slots=True)
class WrongMerge:
    """A merge whose change is multiplied by 1 + error. `refused`: share of the changed values that are refused."""

    dtype: str
    error: float
    refused: float
    relative_kl: float


class ScaledPair:
    """A pair whose product is multiplied by a factor."""

    def __init__(self, pair: Any, factor: float) -> None:
        self._pair, self._factor = pair, factor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pair, name)

    def factors(self) -> tuple[Tensor, Tensor]:
        left, right = self._pair.factors()
        return self._factor * left, right


def merge_wrongly(
    source: TrainedSource,
    parts: tuple[BaseFiles, Adapter],
    reference: ParityReference,
    dtype: torch.dtype,
    error: float,
) -> WrongMerge:
    """Merge with an error into a temporary folder, and measure it."""
    base, adapter = parts
    changes = {
        name: replace(each, pair=ScaledPair(each.pair, 1 + error)) if each.pair else each  # type: ignore[arg-type]
        for name, each in weight_changes(base, adapter).items()
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_merged(base, changes, dtype, folder, lambda *_: None)
        write_companions(base, source.folder, folder, dtype)
        found = prove_weights(open_base(folder), base, adapter, dtype)
        rows, _ = prove_merged(folder, source, base, reference)
    values = sum(base.tensors[name].rows * base.tensors[name].width for name in changes)
    share = next(row.relative_kl for row in rows if row.name == "merged")
    refused = sum(each.outside for each in found.wrong) / values
    return WrongMerge(str(dtype).removeprefix("torch."), error, refused, share or 0.0)


def draw(found: list[WrongMerge], base_kl: float, file: Path) -> None:
    """Plot both figures over the error. `base_kl`: the base's distance, nats a token."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # letters as text: as outlines they are most of the file
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8))
    for (dtype, colour), place in [
        (pair, axes) for pair in zip(DTYPES, COLOURS, strict=True) for axes in (left, right)
    ]:
        rows = [row for row in found if row.dtype == str(dtype).removeprefix("torch.") and row.error]
        values = [100 * row.refused if place is left else row.relative_kl for row in rows]
        place.plot([row.error for row in rows], values, "o-", color=colour, label=rows[0].dtype, markersize=4)
    limits = (MAX_RELATIVE_KL, "what rounding may cost"), (FLOAT32_KL / base_kl, "what float32 explains")
    for limit, told in limits:
        right.axhline(limit, color="#444444", linestyle="--", linewidth=1)
        right.text(ERRORS[1], limit * 0.6, f"{limit:.1g}: {told}", fontsize=8, verticalalignment="top")
    left.set_title("values refused, of those that the adapter changes, %: one is enough", fontsize=9)
    right.set_title("distance on texts, of what training did", fontsize=9)
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xlabel("error of the change: it is multiplied by 1 + error")
        axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, with an adapter")
    parser.add_argument("picture", type=Path, help="where the plot goes; its figures beside it, as JSON")
    asked = parser.parse_args()
    source = source_of(asked.run)
    parts = source.open()
    reference = trained_reference(source, parts[0])
    found = []
    for dtype in DTYPES:
        for error in ERRORS:
            found.append(merge_wrongly(source, parts, reference, dtype, error))
            print(f"{found[-1].dtype} {error:g}: {found[-1].refused:.2%} refused, distance {found[-1].relative_kl:.2g}")
    figures = [{name: getattr(row, name) for name in ("dtype", "error", "refused", "relative_kl")} for row in found]
    asked.picture.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    draw(found, reference.base.mean_kl, asked.picture)
    print(asked.picture)


if __name__ == "__main__":
    main()
