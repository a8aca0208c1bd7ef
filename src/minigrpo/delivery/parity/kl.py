"""How far one model's next-token distributions are from another's, on the same tokens, relative to what training did.

An absolute distance says little: a young adapter moves the base by less than a 4-bit file moves anything. So each stage
is measured as KL(stage || trained policy) / KL(base || trained policy): 0 is the trained policy, 1 as far away as the
base that it began from. Whoever gives log-probabilities can be compared: a model, a file of another format, a server.

Shapes: N scored positions of a text, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from minigrpo.errors import ArtifactError
from minigrpo.runs.rundir import read_json, write_json

LIMIT = 0.1
"""Of what training did: a stage that is further from the trained policy has failed."""

NOTHING = 1e-10
"""Nats a token. Two float32 passes over the same weights differ by less than a hundredth of it."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """One stage against the trained policy, in nats a token. `relative_kl`: None where training did nothing.

    `top1`: share of positions with the same likeliest token. `greedy`: tokens from the beginning of a text up to the
    first whose likeliest token is another, on average; `greedy_of`: the average length of the texts. `limit`: of
    relative_kl; None where a stage is only told.
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

    @property
    def ok(self) -> bool:
        """Where training did nothing, there is nothing that could be lost, except by changing something."""
        if self.limit is None:
            return True
        return self.mean_kl <= NOTHING if self.relative_kl is None else self.relative_kl <= self.limit

    def to_dict(self) -> dict[str, Any]:
        return {name: known(value) for name, value in asdict(self).items()} | {"ok": self.ok}


def known(value: Any) -> Any:
    """As JSON can hold it: a number that is none (NaN, infinity) is null there."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def kl_of(found_NV: Tensor, truth_NV: Tensor) -> Tensor:
    """KL(found || truth) at each of N positions, from log-probabilities; infinite where `truth` rules a token out.

    Written as a sum of q - p - p log(q/p), whose every term is positive and small of second order: rounded
    log-probabilities disturb it far less than the plain difference.
    """
    found_NV, truth_NV = found_NV.double(), truth_NV.double()
    p_NV, q_NV = found_NV.exp(), truth_NV.exp()
    # Where `found` has no weight, q - p - p log(q/p) is all of q.
    gap_NV = torch.where(p_NV > 0, truth_NV - found_NV, 0.0)
    return (q_NV - p_NV - torch.where(p_NV > 0, p_NV * gap_NV, 0.0)).clamp_min(0).sum(-1)


def compare(
    name: str,
    found: Iterable[Tensor],
    truth: Sequence[Tensor],
    *,
    base_kl: float | None = None,
    limit: float | None = None,
) -> Divergence:
    """Two sets of next-token log-probabilities [N, V], text by text, on the same token ids.

    `base_kl`: mean_kl of the base against the same truth. Raises ArtifactError where the two are not of the same
    texts, or not numbers.
    """
    kls: list[Tensor] = []
    same: list[Tensor] = []
    for text, (found_NV, truth_NV) in enumerate(zip(found, truth, strict=True)):
        if found_NV.shape != truth_NV.shape:
            raise ArtifactError(
                f"{name}: text {text} has distributions of shape {tuple(found_NV.shape)}, and the trained policy's are "
                f"{tuple(truth_NV.shape)}. Tokenizer or vocabulary are not the same."
            )
        kl_N = kl_of(found_NV, truth_NV)
        if torch.isnan(kl_N).any():
            raise ArtifactError(f"{name} gives NaN instead of probabilities. Its weights or their type are at fault.")
        kls.append(kl_N.cpu())
        same.append((found_NV.argmax(-1) == truth_NV.argmax(-1)).cpu())
    whole_N, lengths = torch.cat(kls), [len(each) for each in kls]
    mean = float(whole_N.mean())
    relative = mean / base_kl if base_kl is not None and base_kl > NOTHING else None
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
    )


def record(
    file: Path, rows: Iterable[Mapping[str, Any]], about: dict[str, Any] | None = None, *, keep: bool = False
) -> None:
    """Put the rows of a stage into parity.json; rows of the same names give way, those of other stages stay.

    `keep`: they are not new, so what stands there already stays.
    """
    fresh = {row["name"]: dict(row) for row in rows}
    then = read_json(file) if file.exists() else {}
    if not isinstance(then, dict) or not isinstance(then.get("stages", []), list):
        raise ArtifactError(f"{file} is damaged. Remove it and run the stages that make it again.")
    kept = {row["name"]: row for row in then.get("stages", [])}
    fresh = {name: row for name, row in fresh.items() if not (keep and name in kept)}
    if fresh or not keep:
        write_json(file, {**then, **(about or {}), "stages": list((kept | fresh).values())})
