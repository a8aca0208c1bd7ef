"""The ranks of a run: processes that each do a part of every step, and together change the weights as one would.

Each rank has the whole policy, or a slice of it (shards.py), and an engine of its own. What travels between them:

    groups      after every rollout, to all ranks. From then on each knows the whole batch, and computes advantages,
                weights, figures and the next prompts from it as a process that is alone does: nothing can drift
    gradients   of what is trained, once an update
    figures     of the loss, once an update, and a word at the end of a step

Gradients are added up in the order of the ranks, in float32 at least: the same run on as many ranks gives the same
bytes. On another number of ranks sums are rounded otherwise, and that is all. A process that is alone (`ALONE`)
exchanges nothing and copies nothing.

Shapes: R ranks, L numbers of a slice.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from minigrpo.errors import RankLostError

Item = TypeVar("Item")

BUCKET = 1 << 25
"""Numbers of a gradient that travel at once: what a rank needs beside its gradients is twice as much."""


class Wire(Protocol):
    """Moves tensors between the ranks. All ranks make the same calls in the same order."""

    def gather(self, part: Tensor) -> list[Tensor]:
        """Return this tensor of every rank, in their order. It has the same shape on all of them."""
        ...

    def swap(self, slices_RL: Tensor) -> Tensor:
        """Send row r to rank r, and return the rows that came [R, L], in the order of the ranks that sent them."""
        ...

    def guarded(self, exchange: Callable[[], Item]) -> Item:
        """Return what a library's own exchange returns; where it breaks, tell which rank was lost."""
        ...

    def close(self) -> None: ...


class Ranks:
    """This process among the ranks of a run: which part is its own, and what all of them come to together.

    `sent`: the bytes that this rank has sent, by kind. `at`: is told what the rank does now, for the others to name.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, wire: Wire | None = None, at: Callable[[str], None] | None = None
    ) -> None:
        self.rank, self.size, self.wire = rank, size, wire
        self.sent: Counter[str] = Counter()
        self._at = at

    @property
    def leads(self) -> bool:
        """Whether this is the one rank that writes into the run's folder and speaks to the user."""
        return self.rank == 0

    def at(self, phase: str) -> None:
        if self._at:
            self._at(phase)

    def own(self, items: Sequence[Item], cost: Callable[[Item], int]) -> list[Item]:
        """Return the items that this rank takes, in their order; together the ranks take each of them once."""
        if self.size == 1:
            return list(items)
        return [items[place] for place in deal([cost(item) for item in items], self.size)[self.rank]]

    def gather(self, kind: str, data: Any) -> list[Any]:
        """Return the data of every rank, in their order. It travels as JSON, which gives every number back exactly."""
        if self.wire is None:
            return [data]
        text = json.dumps(data, default=float, separators=(",", ":")).encode()
        lengths = [int(length) for length in self.wire.gather(torch.tensor([len(text)]))]
        row = torch.zeros(max(lengths), dtype=torch.uint8)
        row[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        rows = self.wire.gather(row)
        self.sent[kind] += (self.size - 1) * (row.nbytes + 8)
        return [json.loads(row[:length].numpy().tobytes()) for row, length in zip(rows, lengths, strict=True)]

    def any(self, flag: bool) -> bool:
        return any(self.gather("figures", flag))

    def most(self, count: int) -> int:
        """Return the largest of these counts of all ranks."""
        return max(self.gather("figures", count))

    def join_numbers(self, numbers_N: Tensor) -> Tensor:
        """Return the numbers of all ranks, one rank's after the other's."""
        if self.wire is None:
            return numbers_N
        everybody = [number for own in self.gather("figures", numbers_N.tolist()) for number in own]
        return torch.tensor(everybody, dtype=numbers_N.dtype, device=numbers_N.device)

    def add_up(self, parameters: Sequence[nn.Parameter], figures: Mapping[str, float]) -> dict[str, float]:
        """Replace the gradients by their sum over all ranks, and return the sums of the figures.

        A parameter that has a gradient on no rank still has none: AdamW leaves it alone.
        """
        if self.wire is None:
            return dict(figures)
        has = "".join("01"[parameter.grad is not None] for parameter in parameters)
        told = self.gather("figures", {"figures": figures, "has": has})
        moved = [p for p, *marks in zip(parameters, *(each["has"] for each in told), strict=True) if "1" in marks]
        for bucket in _buckets(moved):
            self._add_gradients(self.wire, bucket)
        sums: dict[str, float] = {}
        for each in told:
            for name, value in each["figures"].items():
                sums[name] = sums.get(name, 0.0) + value
        return sums

    def clip_gradient(self, parameters: Sequence[nn.Parameter], most: float) -> float:
        """Scale the gradient down to this norm, and return the norm that it had.

        Of a parameter that is sharded each rank has a slice, so their squares are added up.
        """
        slices = [cast(Any, p.grad).to_local() for p in parameters if hasattr(p, "to_local") and p.grad is not None]
        if not slices:
            return float(nn.utils.clip_grad_norm_(parameters, most))
        squares = self.gather("figures", float(nn.utils.get_total_norm(slices)) ** 2)
        norm = math.sqrt(sum(squares))
        for gradient in slices if norm > most else ():
            gradient.mul_(most / (norm + 1e-6))
        return norm

    def check_equal(self, parameters: Sequence[nn.Parameter], when: str) -> None:
        """Raise RankLostError where the ranks have come to different weights."""
        if self.wire is None:
            return
        sums = self.gather("figures", _hash(parameters))
        if odd := [rank for rank, its in enumerate(sums) if its != sums[0]]:
            raise RankLostError(
                f"Rank {odd[0]} has other weights than rank 0 {when}, though both added the same gradients up: their "
                "machines round differently. Train on machines that are alike; the newest checkpoint is good."
            )

    def take_sent(self) -> dict[str, float]:
        """Return the bytes that this rank has sent since the last call, for the log; nothing for one that is alone."""
        sent = {f"sent_bytes/{kind}": float(count) for kind, count in self.sent.items()}
        self.sent.clear()
        return sent

    def _add_gradients(self, wire: Wire, bucket: Sequence[nn.Parameter]) -> None:
        """Each rank adds up one slice, and all get the sums: as many bytes as a ring, in an order that is fixed."""
        dtype = torch.promote_types(torch.float32, bucket[0].dtype)
        flat = torch.cat([_gradient(parameter).flatten().to(dtype) for parameter in bucket])
        slices_RL = nn.functional.pad(flat, (0, -len(flat) % self.size)).view(self.size, -1)
        first_L, *others = wire.swap(slices_RL)
        total_L = first_L.clone()
        for slice_L in others:
            total_L += slice_L
        self.sent["gradients"] += 2 * (self.size - 1) * total_L.nbytes
        sums = torch.cat(wire.gather(total_L))[: len(flat)]
        for parameter, piece in zip(bucket, sums.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = _gradient(parameter).copy_(piece.view_as(parameter))


ALONE = Ranks()
"""The one rank of an ordinary run."""


def deal(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal places to ranks so that they end together: the costliest first, each to the rank that has least to do.

    At most a third longer than the best division there is: Graham, "Bounds on Multiprocessing Timing Anomalies" (1969).
    """
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        rank = loads.index(min(loads))
        hands[rank].append(place)
        loads[rank] += costs[place]
    return [sorted(hand) for hand in hands]


def _hash(parameters: Sequence[nn.Parameter]) -> str:
    total = hashlib.sha256()
    for parameter in parameters:
        total.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield parameters of one type and device together, up to BUCKET numbers, or a single larger one."""
    waiting: list[nn.Parameter] = []
    for parameter in parameters:
        alike = not waiting or (waiting[0].dtype, waiting[0].device) == (parameter.dtype, parameter.device)
        if waiting and (not alike or sum(p.numel() for p in waiting) + parameter.numel() > BUCKET):
            yield waiting
            waiting = []
        waiting.append(parameter)
    if waiting:
        yield waiting
