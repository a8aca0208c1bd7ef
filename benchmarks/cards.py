"""GPUs that people have: what torch says of each, and what its maker says that it can do.

Nothing here was measured by us. `memory` is what torch (or CUDA) reports of such a card, in bytes, as published by
their owners; it differs by some MB between drivers. `bandwidth` (bytes a second) and `matrix` (dense 16-bit operations
a second, summed in float32) are the makers' peaks, which no program reaches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Card:
    """A card. `integrated`: it shares main memory with the CPU. `source`: of bandwidth and matrix rate."""

    name: str
    capability: tuple[int, int]
    memory: int
    multiprocessors: int
    bandwidth: float
    matrix: float
    source: str
    integrated: bool = False

    @property
    def has_bfloat16(self) -> bool:
        return self.capability >= (8, 0)


CARDS: Mapping[str, Card] = {
    "T4": Card("Tesla T4", (7, 5), 15_828_320_256, 40, 320e9, 65e12, "NVIDIA, T4 data sheet"),
    "L4": Card(
        "NVIDIA L4", (8, 9), 23_669_440_512, 58, 300e9, 121e12, "NVIDIA, L4 data sheet: half of its sparse rate"
    ),
    "RTX 3060": Card(
        *("NVIDIA GeForce RTX 3060", (8, 6), 12_011 * MIB, 28, 360e9, 25.5e12),
        "NVIDIA, GA102 white paper: twice the float32 rate, as for its larger sisters",
    ),
    "RTX 4090": Card(
        *("NVIDIA GeForce RTX 4090", (8, 9), 24_217 * MIB, 128, 1008e9, 165e12), "NVIDIA, Ada white paper, appendix A"
    ),
    "H100": Card(
        *("NVIDIA H100 80GB HBM3", (9, 0), 85_028_896_768, 132, 3350e9, 989e12),
        "NVIDIA, H100 SXM data sheet: half of its sparse rate",
    ),
    "DGX Spark": Card(
        *("NVIDIA GB10", (12, 1), 128_501_256_192, 48, 273e9, 62e12),
        "NVIDIA, DGX Spark data sheet: 1000 sparse in 4 bit, a sixteenth of it in 16 bit, as GeForce cards of its kind",
        integrated=True,
    ),
}
