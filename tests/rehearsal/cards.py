"""`torch.cuda` as it would answer on a machine with one of the cards of benchmarks/cards.py, and torch on a Mac."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_map

from benchmarks.cards import Card
from tests.rehearsal.attention import attention_of
from tests.rehearsal.device import PretendedGpu
from tests.rehearsal.graphs import Graph, Stream, capturing

TAKEN_BY_CUDA = 600 << 20
"""What CUDA and its libraries take of a card before the first tensor."""


@contextmanager
def pretended(card: Card, guard: Path, count: int = 1) -> Iterator[PretendedGpu]:
    """Pretend that this machine has so many of the card. `guard`: the library of guard.cpp, loaded before torch."""
    library = ctypes.CDLL(str(guard))
    gpu = PretendedGpu(library.current_device)

    def index_of(device: Any = None) -> int:
        if device is None or (isinstance(device, str | torch.device) and torch.device(device).index is None):
            return int(library.current_device())
        index = device if isinstance(device, int) else torch.device(device).index
        if not 0 <= index < count:
            raise RuntimeError("CUDA error: invalid device ordinal")  # torch's own words
        return int(index)

    def exchange(index: int) -> int:
        before = int(library.current_device())
        if index >= 0:
            library.set_current_device(index_of(index))
        return before

    def answers_bfloat16(including_emulation: bool = True) -> bool:
        return card.has_bfloat16 or including_emulation

    def memory(device: Any = None) -> tuple[int, int]:
        index_of(device)
        return card.memory - TAKEN_BY_CUDA, card.memory

    facts = SimpleNamespace(
        name=card.name,
        major=card.capability[0],
        minor=card.capability[1],
        total_memory=card.memory,
        multi_processor_count=card.multiprocessors,
        is_integrated=card.integrated,
    )
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: count,
        "current_device": lambda: int(library.current_device()),
        "set_device": lambda device: exchange(index_of(device)) and None,
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "mem_get_info": memory,
        "get_device_name": lambda device=None: card.name,
        "get_device_properties": lambda device=None: facts,
        "get_device_capability": lambda device=None: card.capability,
        "is_bf16_supported": answers_bfloat16,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: gpu.synchronize("torch.cuda.synchronize"),
        "manual_seed_all": lambda seed: None,
        "is_current_stream_capturing": lambda: gpu.capture is not None,
        "Stream": Stream,
        "current_stream": lambda device=None: Stream.current,
        "stream": Stream.use,
        "CUDAGraph": Graph,
        "graph": capturing,
        "graph_pool_handle": object,
    }
    library.set_current_device(0)
    with patch.multiple(torch.cuda, **answers), files_read_to_gpu(), attention_of("cuda"), gpu:
        yield gpu


class MacEvent:
    """torch.Event: what came before it is done."""

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = device

    def record(self, stream: Any = None) -> None:
        pass

    synchronize = record


@contextmanager
def pretended_mac(guard: Path) -> Iterator[PretendedGpu]:
    """Pretend that this machine has Apple's GPU, which knows no float64; attention is the plain products there."""
    ctypes.CDLL(str(guard))
    gpu = PretendedGpu(lambda: 0, "mps")
    answers: dict[str, Any] = {
        "empty_cache": lambda: None,
        "synchronize": lambda: gpu.synchronize("torch.mps.synchronize"),
    }
    with (
        patch.multiple(torch.mps, **answers),
        patch("torch.backends.mps.is_available", lambda: True),
        patch.object(torch, "Event", MacEvent),
        files_read_to_gpu(),
        attention_of("mps"),
        gpu,
    ):
        yield gpu


@contextmanager
def files_read_to_gpu() -> Iterator[None]:
    """Let what is loaded from files, and what is converted, come to a pretended GPU."""
    with (
        patch.object(torch, "load", load_to_gpu),
        patch("peft.utils.save_and_load.safe_load_file", read_to_gpu),
        parameters_exchanged(),
    ):
        yield


_load = torch.load


def load_to_gpu(file: Any, map_location: Any = None, **options: Any) -> Any:
    """torch.load, which knows no place for storages of a pretended GPU: tensors are moved there afterwards."""
    return moved(_load(file, map_location="cpu", **options), map_location or "cpu")


def read_to_gpu(file: Any, device: Any = "cpu") -> Any:
    """safetensors' load_file, the same way."""
    return moved(load_file(file), device)


def moved(loaded: Any, device: Any) -> Any:
    return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, loaded)


@contextmanager
def parameters_exchanged() -> Iterator[None]:
    """Let `to`, `double` and the like exchange parameters: a CPU's storage cannot be put under a GPU's tensor,
    nor another number type.
    """
    plain = torch.nn.Module._apply

    def apply(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return plain(self, *args, **kwargs)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)

    with patch.object(torch.nn.Module, "_apply", apply):
        yield
