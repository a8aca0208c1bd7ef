"""Time the limit: the step's own matrix products as bare kernels, one by one, on this machine, now.

Each product of `shapes` is timed at its own shape and number type with nothing around it, by the fastest of the ways
torch has for it, weights in blocks included (models/onednn.py). Weights are as cold as in a real pass: calls cycle over
distinct copies that fill as much memory as the model's weights (up to COLD bytes, beyond any cache). A product counts
no less than its weight's bytes over the measured memory bandwidth. Attention has too many shapes to time each: it
counts at the rate of the fastest batched product, or its keys and values over the bandwidth, whichever takes longer.

    fraction of the limit = the limit's time / the measured time

`machine` is the stricter second figure: operations over the highest rate that any large product reaches, or bytes over
the bandwidth, product by product.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.shapes import Product, Work
from minigrpo.models.onednn import blocked, blocked_linear, gains_by_blocks

COLD = 256 << 20
ROUNDS = 3
SECONDS = 0.03
"""Rounds of a measurement, and how long each lasts where there are enough operands."""


@dataclass(frozen=True, slots=True)
class Limit:
    """The limit of one phase: `operations`, `bytes` of weights and cache, and the seconds of the two limits."""

    operations: int
    bytes: int
    seconds: float
    machine: float


@dataclass(frozen=True, slots=True)
class Rates:
    """The machine's rates.

    Operations a second of the best large product and of batched ones, and bytes read a second.
    """

    matrix: float
    batched: float
    bandwidth: float

    def least(self, products: Mapping[Product, int], work: Work, itemsize: float) -> float:
        """Return seconds of a phase's chosen products, its attention and its moves, each at the highest rate or by its
        bytes over the bandwidth, whichever takes longer.
        """
        each = sum(
            max(product.operations / self.matrix, product.weight_entries * itemsize / self.bandwidth) * times
            for product, times in products.items()
        )
        attention = max(work.attention.operations / self.matrix, work.attention.entries * itemsize / self.bandwidth)
        return each + attention + work.moved / self.bandwidth


class Kernels:
    """Bare kernels, timed once per shape. `model_bytes`: bytes read between two uses of a weight."""

    def __init__(self, dtype: torch.dtype, device: str, model_bytes: int) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.cold = min(model_bytes, COLD)
        self.itemsize = dtype.itemsize
        self.pool = self._filled(self.cold // self.itemsize)
        self._known: dict[Product, float] = {}
        self.rates = Rates(self._matrix_rate(), self._batched_rate(), self._bandwidth())

    @torch.no_grad()
    def seconds(self, product: Product) -> float:
        """Return the bare kernel's time, or its weight's bytes over the bandwidth if that is longer."""
        if product not in self._known:
            measured = self._made(product) if product.way == "made" else self._weighted(product)
            self._known[product] = max(measured, self._read(product.weight_entries))
        return self._known[product]

    def price(self, work: Work) -> Limit:
        """Compute the limit of a phase, with the faster way of each choice."""
        chosen = [work.products, *(min(pair, key=self._sum) for pair in work.choices)]
        every: Counter[Product] = sum(chosen, Counter())
        attention = work.attention
        operations = attention.operations + sum(product.operations * times for product, times in every.items())
        weights = sum(product.weight_entries * times for product, times in every.items())
        reading = self._read(attention.entries)
        moving = work.moved / self.rates.bandwidth
        return Limit(
            operations,
            (weights + attention.entries) * self.itemsize + work.moved,
            self._sum(every) + max(attention.operations / self.rates.batched, reading) + moving,
            self.rates.least(every, work, self.itemsize),
        )

    def _sum(self, products: Mapping[Product, int]) -> float:
        return sum(self.seconds(product) * times for product, times in products.items())

    def _read(self, entries: int) -> float:
        return entries * self.itemsize / self.rates.bandwidth

    def _weighted(self, product: Product) -> float:
        """Time a product with a weight that is not in the cache, unless the whole model fits."""
        entries = product.weight_entries
        copies = max(1, min(self.cold // (entries * self.itemsize), 4096))
        shape = (product.outer, product.inner) if product.way == "linear" else (product.inner, product.outer)
        if len(self.pool) < entries * copies:
            self.pool = self._filled(entries * copies)
        weights = [weight.view(shape) for weight in self.pool[: entries * copies].split(entries)]
        x = self._filled(product.rows, product.inner)
        taken = [self._round(way(x), weights) for way in KERNELS_BY_WAY[product.way]]
        if gains_by_blocks(self.dtype, self.device.type):
            weights = weights if product.way == "linear" else [weight.T for weight in weights]
            taken.append(self._round(lambda weight: blocked_linear(x, weight), [blocked(each) for each in weights]))
        return min(taken)

    def _made(self, product: Product) -> float:
        """Time a product of activations, laid out as in the backward pass: the left one is transposed."""
        left, right = self._filled(product.inner, product.rows), self._filled(product.inner, product.outer)
        return self._round(lambda other: left.T @ other, [right])

    def _round(self, call: Callable[[Tensor], Any], operands: list[Tensor]) -> float:
        """Return seconds a call: the fastest of several rounds, which cycle through the operands."""
        going = itertools.cycle(operands)
        calls = max(1, min(len(operands), round(SECONDS / max(self._calls(call, going, 2), 1e-6))))
        return min(self._calls(call, going, calls) for _ in range(ROUNDS))

    def _calls(self, call: Callable[[Tensor], Any], operands: Iterator[Tensor], count: int) -> float:
        """Return the mean seconds of `count` calls."""
        began = self._now()
        for operand in itertools.islice(operands, count):
            call(operand)
        return (self._now() - began) / count

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _filled(self, *shape: int) -> Tensor:
        """Return a tensor of small numbers: a kernel may be slow at denormals, and must not overflow."""
        return torch.empty(shape, dtype=self.dtype, device=self.device).uniform_(-0.1, 0.1)

    def _matrix_rate(self) -> float:
        sizes = (4096, 8192) if self.device.type == "cuda" else (1024, 2048)
        squares = [self._filled(size, size) for size in sizes]
        return max(2 * len(x) ** 3 / self._round(lambda other, x=x: x @ other, [x]) for x in squares)  # type: ignore[misc]

    def _batched_rate(self) -> float:
        """Measure batched products in the shape of attention at its best: 64 to 256 query rows, heads of 64."""
        rates = []
        for rows in (64, 128, 256):
            query, key = self._filled(32, rows, 64), self._filled(32, 64, 256)
            rates.append(2 * 32 * rows * 64 * 256 / self._round(lambda other, q=query: q @ other, [key]))  # type: ignore[misc]
        return max(rates)

    def _bandwidth(self) -> float:
        """Return bytes a second of reading, or of copying (read and write), whichever is more."""
        source = torch.ones(COLD // 4 * (4 if self.device.type == "cuda" else 1), device=self.device)
        goal = torch.empty_like(source)
        size = source.numel() * source.itemsize
        return max(
            size / self._round(torch.sum, [source]),
            2 * size / self._round(lambda other: goal.copy_(other), [source]),
        )


Call = Callable[[Tensor], Any]


def _as_linear(x: Tensor) -> Call:
    return lambda weight: linear(x, weight)


def _transposed(x: Tensor) -> Call:
    """Compute the transposed product: some libraries are faster where the long side comes first."""
    x_T = x.T
    return lambda weight: weight @ x_T


def _as_matmul(x: Tensor) -> Call:
    return lambda weight: x @ weight


KERNELS_BY_WAY: Mapping[str, tuple[Callable[[Tensor], Call], ...]] = {
    "linear": (_as_linear, _transposed),
    "input": (_as_matmul,),
}
