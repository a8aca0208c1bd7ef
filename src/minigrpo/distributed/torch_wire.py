"""The wire of torch.distributed: gloo for tensors in main memory, NCCL for those on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from minigrpo.distributed.ranks import Item


class TorchWire:
    """Moves tensors through torch's process group. `on_failure` raises what is to be said of a broken connection."""

    def __init__(self, store: Any, rank: int, size: int, *, seconds: float, on_failure: Callable[[str], NoReturn]):
        self.size, self.on_failure = size, on_failure
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        self.guarded(
            lambda: dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=seconds)
            )
        )

    def gather(self, part: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(part) for _ in range(self.size)]
        self.guarded(lambda: dist.all_gather(parts, part.contiguous()))
        return parts

    def swap(self, slices_RL: Tensor) -> Tensor:
        came_RL = torch.empty_like(slices_RL)
        self.guarded(lambda: dist.all_to_all_single(came_RL, slices_RL.contiguous()))
        return came_RL

    def close(self) -> None:
        dist.destroy_process_group()

    def guarded(self, exchange: Callable[[], Item]) -> Item:
        try:
            return exchange()
        except RuntimeError as fault:  # a closed connection, or nobody at the other end for too long
            self.on_failure(str(fault).partition("\n")[0][:200])
