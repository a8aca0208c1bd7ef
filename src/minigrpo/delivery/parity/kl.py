"""Measure how far one model's next-token distributions are from another's on the same tokens, relative to what training
did.

An absolute distance says little: a young adapter may move the base by less than 4-bit quantization does. So each stage
is measured as KL(stage || trained policy) / KL(base || trained policy): 0 is the trained policy, 1 is as far away as
the base. Anything that gives log-probabilities can be compared: a model, a file of another format, a server.

Shapes: N scored positions of a text, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from minigrpo.errors import ArtifactError
from minigrpo.runs.manifest import write_sealed
from minigrpo.runs.rundir import read_json

MAX_RELATIVE_KL = 0.1
"""Relative KL beyond which a stage has failed."""

MAX_KL = 1e-2
"""Nats a token beyond which a stage has failed, whatever training did; on texts that training did not touch, the only
limit: where it moved nothing, rounding is all that is measured."""
OTHER_TEXTS = ", other texts"
"""Ends the name of a row that was measured on texts of other kinds than the task's."""

ZERO_KL = 1e-10
"""Nats a token that count as no difference. Two float32 passes over the same weights differ by less than a hundredth of
it."""

FLOAT32_ERROR = 1e-4
"""Largest difference of a log-probability between two codes that compute the same in float32. Either is off by up to
5.1e-5 from float64 where attention is three times as sharp as usual (docs/export.md)."""
FLOAT32_KL = FLOAT32_ERROR**2 / 2
"""Nats a token to which such differences add up at most: KL is half of their variance."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """One stage against the trained policy, in nats a token. `relative_kl`: None where training changed nothing.

    `top1`: share of positions with the same likeliest token. `greedy`: mean number of tokens before the likeliest token
    first differs; `greedy_of`: mean length of the texts. `limit`: of relative_kl; `ceiling`: of mean_kl; None where a
    stage is only reported. `precision`: the number type in which both models computed.
    """

    name: str
    texts: int
    tokens: int
    mean_kl: float
    max_kl: float
    relative_kl: float | None
    top1: float
    greedy: float
    greedy_of: float
    limit: float | None = None
    ceiling: float | None = None
    precision: str = "float32"

    @property
    def ok(self) -> bool:
        """Tell whether the stage is within its limits."""
        return self.excess is None

    @property
    def excess(self) -> str | None:
        """Say which limit is exceeded, and by what; None where none is. Where training changed nothing, the stage must
        not change anything either."""
        if self.precision != "float32" and (excess := replace(self, precision="float32").excess):
            return f"{excess}; both were computed in {self.precision}, whose rounding counts here, too"
        if self.ceiling is not None and not self.mean_kl <= self.ceiling:
            where = "on texts of other kinds " if self.name.endswith(OTHER_TEXTS) else ""
            return f"{where}it is {self.mean_kl:.2g} nats a token from the trained policy (limit {self.ceiling:g})"
        if self.limit is None:
            return None
        if self.relative_kl is None and self.mean_kl > ZERO_KL:
            return f"training changed nothing, and it is {self.mean_kl:.2g} nats a token away"
        if self.relative_kl is not None and not self.relative_kl <= self.limit:
            return (
                f"its distance from the trained policy is {self.relative_kl:.2f} of what training moved (limit "
                f"{self.limit:g})"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        return {name: json_safe(value) for name, value in asdict(self).items()} | {"ok": self.ok}


def json_safe(value: Any) -> Any:
    """Return the value, or None for NaN and infinity, which JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


BLOCK_ELEMENTS = 1 << 18
"""Log-probabilities that are compared at once: 2 MiB in float64, of which some eight are needed. A text of 96 positions
and 152k tokens would take a gigabyte."""


def kl_divergence(found_NV: Tensor, reference_NV: Tensor) -> Tensor:
    """Return KL(found || reference) at each of N positions, from log-probabilities; infinite where `reference` gives a
    token no probability."""
    rows = max(1, BLOCK_ELEMENTS // max(1, found_NV.shape[-1]))
    blocks = zip(found_NV.split(rows), reference_NV.split(rows), strict=True)
    return torch.cat([_block_kl(found, reference) for found, reference in blocks])


def _block_kl(found_NV: Tensor, reference_NV: Tensor) -> Tensor:
    """Return the KL of a few positions, in float64.

    Written as a sum of q - p - p log(q/p), whose every term is positive and small of second order: rounded
    log-probabilities disturb it far less than the plain difference.
    """
    found_NV, reference_NV = found_NV.double(), reference_NV.double()
    p_NV, q_NV = found_NV.exp(), reference_NV.exp()
    # Where `found` gives no probability, q - p - p log(q/p) is q.
    gap_NV = torch.where(p_NV > 0, reference_NV - found_NV, 0.0)
    return (q_NV - p_NV - torch.where(p_NV > 0, p_NV * gap_NV, 0.0)).clamp_min(0).sum(-1)


def compare_distributions(
    name: str,
    found: Iterable[Tensor],
    reference: Sequence[Tensor],
    *,
    base_kl: float | None = None,
    limit: float | None = None,
    ceiling: float | None = None,
    precision: str = "float32",
) -> Divergence:
    """Compare two sets of next-token log-probabilities [N, V], text by text, on the same token ids.

    `base_kl`: mean_kl of the base against the same reference. Raises ArtifactError where the shapes differ or values
    are NaN.
    """
    kls: list[Tensor] = []
    same: list[Tensor] = []
    for text, (found_NV, reference_NV) in enumerate(zip(found, reference, strict=True)):
        if found_NV.shape != reference_NV.shape:
            raise ArtifactError(
                f"{name}: text {text} has distributions of shape {tuple(found_NV.shape)}, and the trained policy's are "
                f"{tuple(reference_NV.shape)}. Tokenizer or vocabulary are not the same."
            )
        kl_N = kl_divergence(found_NV, reference_NV)
        if torch.isnan(kl_N).any():
            raise ArtifactError(f"{name} gives NaN instead of probabilities. Its weights or their type are at fault.")
        kls.append(kl_N.cpu())
        same.append((found_NV.argmax(-1) == reference_NV.argmax(-1)).cpu())
    whole_N, lengths = torch.cat(kls), [len(each) for each in kls]
    mean = float(whole_N.mean())
    relative = mean / base_kl if base_kl is not None and base_kl > ZERO_KL else None
    return Divergence(
        name=name,
        texts=len(kls),
        tokens=len(whole_N),
        mean_kl=mean,
        max_kl=float(whole_N.max()),
        relative_kl=relative,
        top1=float(torch.cat(same).double().mean()),
        greedy=fmean(int(each.long().cumprod(0).sum()) for each in same),
        greedy_of=fmean(lengths),
        limit=limit,
        ceiling=ceiling,
        precision=precision,
    )


def record_parity(
    file: Path, rows: Iterable[Mapping[str, Any]], about: dict[str, Any] | None = None, *, keep: bool = False
) -> None:
    """Write the rows of a stage to parity.json. They replace rows of the same names; rows of other stages stay.

    `keep`: the rows are not new, so existing rows of the same names stay as well. Raises ArtifactError where the file
    is damaged.
    """
    fresh = {row["name"]: dict(row) for row in rows}
    then = read_json(file) if file.exists() else {}
    if not isinstance(then, dict) or not isinstance(then.get("stages", []), list):
        raise ArtifactError(f"{file} is damaged. Remove it and run the stages that make it again.")
    kept = {row["name"]: row for row in then.get("stages", [])}
    fresh = {name: row for name, row in fresh.items() if not (keep and name in kept)}
    if fresh or not keep:
        write_sealed(file, {**then, **(about or {}), "stages": list((kept | fresh).values())})
