"""CUDA graphs on a pretended GPU: what is launched during a capture is kept, and a replay launches it again.

As on a real GPU a capture computes nothing (what it wrote is put back, and memory that it reserved holds rubbish until
the first replay), and a graph knows addresses alone: where the memory of a tensor that it reads has been given back, a
replay would read whatever lies there now. Here it raises CaptureError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from tests.rehearsal.device import CaptureError, PretendedGpu, function_of_ours, line_of_ours

RUBBISH = 0xFF
"""The byte that unwritten memory is filled with: NaN in floating point, -1 in whole numbers."""


class Stream:
    """A stream. What it is given is done when the call returns, so waiting for another is nothing."""

    made: ClassVar[list[Stream]] = []
    current: ClassVar[Stream]

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = torch.cuda.current_device()
        Stream.made.append(self)

    def wait_stream(self, other: Stream) -> None:
        pass

    def synchronize(self) -> None:
        PretendedGpu.active().synchronize("Stream.synchronize")

    @classmethod
    @contextmanager
    def use(cls, stream: Stream) -> Iterator[None]:
        before, cls.current = cls.current, stream
        try:
            yield
        finally:
            cls.current = before


Stream.current = object.__new__(Stream)


@dataclass(frozen=True)
class Address:
    """A tensor that a graph reads or writes and that was there before it: its place, which keeps it from nobody."""

    storage: StorageWeakRef
    dtype: torch.dtype
    layout: tuple[int, Sequence[int], Sequence[int]]
    where: str

    @classmethod
    def of(cls, tensor: Tensor, where: str) -> Address:
        layout = tensor.storage_offset(), tuple(tensor.size()), tuple(tensor.stride())
        return cls(StorageWeakRef(tensor.untyped_storage()), tensor.dtype, layout, where)

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)  # type: ignore[attr-defined]
        if storage is None:
            raise CaptureError(f"a graph uses memory at {self.where} that has been given back since it was captured")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.layout)


@dataclass(frozen=True)
class Launch:
    func: Any
    leaves: list[Any]
    spec: TreeSpec
    results: list[Tensor]
    """What it wrote into memory of the graph's own."""
    function: str
    """Who launched it."""

    def repeat(self) -> None:
        leaves = [leaf.tensor() if isinstance(leaf, Address) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        found = self.func(*args, **kwargs)
        for old, new in zip(self.results, tree_leaves(found), strict=False):
            if old.data_ptr() != new.data_ptr():
                old.copy_(new)


@dataclass
class Graph:
    """torch.cuda.CUDAGraph."""

    launches: list[Launch] = field(default_factory=list)
    pool: Any = None
    mode: str = "global"
    device: int = 0
    replays: int = 0
    made: ClassVar[list[Graph]] = []

    def replay(self) -> None:
        assert PretendedGpu.active().capture is None, "a graph is replayed while another is captured"
        self.replays += 1
        with torch.no_grad():
            for launch in self.launches:
                launch.repeat()


@dataclass
class Capture:
    """What is launched while a graph is captured."""

    graph: Graph
    own: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    """Memory that was reserved during the capture."""
    before_writes: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = field(default_factory=dict)

    def before(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], target: torch.device) -> None:
        """Keep what this operation is going to overwrite."""
        if target.index != self.graph.device:
            raise CaptureError(
                f"{func} at {line_of_ours()} is on {target}, and the graph is captured on cuda:{self.graph.device}"
            )
        arguments = func._schema.arguments if hasattr(func, "_schema") else ()
        for argument, value in [*zip(arguments, args, strict=False), *((a, kwargs.get(a.name)) for a in arguments)]:
            written = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(value) if written else ():
                storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
                if storage is not None and storage._cdata not in self.own:
                    self.before_writes.setdefault(storage._cdata, (storage, storage.clone()))

    def keep(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any, *, on_gpu: set[int]) -> None:
        """Keep this launch. `on_gpu`: which tensors are the GPU's; a number from the CPU is part of the launch."""
        leaves, spec = tree_flatten((tuple(args), kwargs))
        where = line_of_ours()
        kept = [
            Address.of(leaf, where)
            if isinstance(leaf, Tensor) and id(leaf) in on_gpu and leaf.untyped_storage()._cdata not in self.own
            else leaf
            for leaf in leaves
        ]
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        fresh = [x for x in results if x.untyped_storage()._cdata in self.own]
        whole = fresh if len(fresh) == len(results) else []
        self.graph.launches.append(Launch(func, kept, spec, whole, function_of_ours()))

    def reserve(self, result: Any, inputs: set[int]) -> None:
        """Note memory that an operation reserved."""
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in inputs:
                self.own[storage._cdata] = storage

    def end(self) -> None:
        """Put back what was overwritten, and fill the graph's own memory with rubbish."""
        for storage, old in self.before_writes.values():
            storage.copy_(old)
        self.before_writes.clear()
        for storage in self.own.values():
            torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),)).fill_(RUBBISH)


@contextmanager
def capturing(graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
    """torch.cuda.graph, which also waits for the GPU before it begins."""
    gpu = PretendedGpu.active()
    assert gpu.capture is None, "two graphs are captured at once"
    torch.cuda.synchronize()
    graph.pool = object() if pool is None else pool  # without one, a graph has a pool of its own
    graph.device, graph.mode = torch.cuda.current_device(), capture_error_mode
    Graph.made.append(graph)
    gpu.capture = Capture(graph)
    try:
        with Stream.use(stream or Stream()):
            yield
        gpu.capture.end()
    finally:
        gpu.capture = None
