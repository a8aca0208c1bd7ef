"""What an allocator would be asked for: the bytes of a pretended GPU's tensors while they live.

A CUDA graph takes what its kernels hand on from a pool, which keeps it for the replays; graphs that are replayed one at
a time share it. Its size here is the most that one capture had in use at once. Not shown: what an allocator rounds up,
and what it cannot use between two blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.rehearsal.device import GpuTensor, PretendedGpu


@dataclass
class Allocations:
    """`now`: bytes outside of the pool; `pool`: its size; `peak`: the most that both came to since `reset`."""

    now: int = 0
    pool: int = 0
    peak: int = 0
    _captured: int = 0
    _users: Counter[int] = field(default_factory=Counter)
    _pooled: dict[int, bool] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.now + self.pool

    def reset(self) -> None:
        self.peak = self.total

    def take(self, tensor: GpuTensor) -> Lease:
        """Count a tensor's memory until the lease ends, once for all views of it."""
        storage = tensor.host.untyped_storage()
        lease = Lease(self, storage._cdata, storage.nbytes())
        self._users[lease.key] += 1
        if self._users[lease.key] == 1:
            capture = PretendedGpu.active().capture
            self._pooled[lease.key] = capture is not None and lease.key in capture.own
            self._change(lease, lease.size)
        return lease

    def give_back(self, lease: Lease) -> None:
        self._users[lease.key] -= 1
        if not self._users[lease.key]:
            del self._users[lease.key]
            self._change(lease, -lease.size)
            del self._pooled[lease.key]

    def _change(self, lease: Lease, size: int) -> None:
        if self._pooled[lease.key]:
            self._captured += size
            self.pool = max(self.pool, self._captured)
        else:
            self.now += size
        self.peak = max(self.peak, self.total)


@dataclass(frozen=True)
class Lease:
    """Lies in a tensor's own dictionary, and ends with it. A weak reference would not do: parameters are exchanged."""

    counter: Any
    key: int
    size: int

    def __del__(self) -> None:
        self.counter.give_back(self)


@contextmanager
def counted() -> Iterator[Allocations]:
    """Count the tensors that are made inside the block."""
    allocations, before = Allocations(), GpuTensor.lease
    GpuTensor.lease = allocations.take
    try:
        yield allocations
    finally:
        GpuTensor.lease = before
