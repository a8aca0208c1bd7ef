"""Tensors that say they are on a GPU and hold their numbers in main memory, and the mode that computes with them.

`PretendedGpu` is a dispatch mode: inside it a tensor asked for on "cuda" is a `GpuTensor`, and each operation on one is
done on the CPU's numbers; or one on "mps", Apple's. What a real GPU refuses is refused: tensors of two devices in one
operation, a synchronization or a copy from main memory while a CUDA graph is captured, float64 on "mps". Everything
else is counted, with the line of ours that caused it: launches (an operation that writes memory; a view is free),
synchronizations (the host waits for the GPU: it reads a number, or copies to or from memory that is not pinned) and
copies that it does not wait for.

It does not show which kernels a GPU has, what they round to, how long they take, how its allocator behaves, or a race
between streams: docs/gpu.md.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.rehearsal import attention

OURS = ("/src/minigrpo/", "/tests/rehearsal/trials")


class MixedDevicesError(RuntimeError):
    """One operation was given tensors of two devices."""


class CaptureError(RuntimeError):
    """What cannot be captured in a CUDA graph, or what a graph finds gone when it is replayed."""


class GpuTensor(Tensor):
    """A tensor on a pretended GPU. `host`: its numbers."""

    host: Tensor
    lease: ClassVar[Callable[[GpuTensor], Any]] = lambda tensor: None
    """What counts its memory (allocations.py), where something does."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor, device: torch.device) -> GpuTensor:
        made: GpuTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=device,
        )
        made.host = host
        made.leased = GpuTensor.lease(made)  # type: ignore[attr-defined]
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Outside of the mode, or in a thread that it does not reach, such as autograd's.
        return PretendedGpu.active().run(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, GpuTensor), "the storage of a GPU's tensor is exchanged for another GPU's"
        assert (value.shape, value.dtype) == (self.shape, self.dtype), "a wrapper keeps its shape and number type"
        self.host, self.leased = value.host, value.leased  # type: ignore[attr-defined]

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.host.untyped_storage()

    def tolist(self) -> Any:
        PretendedGpu.active().synchronize("tolist")
        return self.host.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    __array__ = numpy

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"GpuTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copy = self.detach().clone()
            copied = torch.nn.Parameter(copy, self.requires_grad) if hasattr(self, "_is_param") else copy
            memo[id(self)] = copied
        found: Tensor = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        PretendedGpu.active().synchronize("saved to a file")
        return self.host.detach().clone().__reduce_ex__(protocol)


SYNCHRONIZING = frozenset(
    f"aten.{name}"
    for name in (
        "_local_scalar_dense.default",
        "nonzero.default",
        "masked_select.default",
        "is_nonzero.default",
        "_unique2.default",
        "unique_dim.default",
        "unique_consecutive.default",
        "equal.default",
        "repeat_interleave.Tensor",  # without an output size, the GPU must be asked for it
        "bincount.default",
    )
)
INDEXING = ("aten.index.Tensor", "aten._unsafe_index.Tensor", "aten.index_put_.default", "aten.index_put.default")
COPYING = ("aten._to_copy.default", "aten.copy_.default")
ALLOCATING = ("aten.empty", "aten.new_empty", "aten._pin_memory")
NO_SCALARS_FROM_THE_CPU = ("aten.cat.", "aten.stack.", "aten.mm.", "aten.bmm.", "aten.addmm.", "aten._foreach_norm.")
"""Operations that take not even a tensor of one number from the CPU beside those of a GPU."""


class PretendedGpu(TorchDispatchMode):
    """The mode. Counters have one entry for each (operation, line of ours)."""

    _active: ClassVar[PretendedGpu | None] = None

    def __init__(self, current_device: Callable[[], int], kind: str = "cuda") -> None:
        super().__init__()
        self.current_device, self.kind = current_device, kind
        self.launches: Counter[tuple[str, str]] = Counter()
        self.synchronizations: Counter[tuple[str, str]] = Counter()
        self.host_copies: Counter[tuple[str, str]] = Counter()
        self.capture: Any = None

    @classmethod
    def active(cls) -> PretendedGpu:
        assert cls._active is not None, "a GPU's tensor is used after its rehearsal"
        return cls._active

    def __enter__(self) -> PretendedGpu:
        PretendedGpu._active = self
        torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor(..., device="cuda") looks for CUDA itself
        super().__enter__()
        return self

    def __exit__(self, *fault: Any) -> None:
        super().__exit__(*fault)
        torch._C._set_only_lift_cpu_tensors(False)

    def reset(self) -> None:
        for counter in (self.launches, self.synchronizations, self.host_copies):
            counter.clear()

    def synchronize(self, what: str) -> None:
        """Count that the host waits for the GPU. Raises CaptureError during a capture."""
        where = line_of_ours()
        self.synchronizations[what, where] += 1
        if self.capture is not None:
            raise CaptureError(f"{what} at {where}: the host cannot wait for the GPU while a graph is captured")

    def copy_in(self, what: str, *, waits: bool = True) -> None:
        """Count a copy from main memory. Raises CaptureError during a capture.

        `waits`: from memory that is not pinned, or by a call that blocks: the host waits for all that came before.
        """
        where = line_of_ours()
        if self.capture is not None:
            raise CaptureError(f"{what} at {where}: a graph would read that main memory again at each replay")
        counter = self.synchronizations if waits else self.host_copies
        counter[what, where] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Do one operation, on the CPU's numbers where a GPU's tensors take part or come out."""
        name, asked = str(func), kwargs.get("device")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        own = [tensor for tensor in tensors if isinstance(tensor, GpuTensor)]
        to_gpu = asked is not None and torch.device(asked).type == self.kind
        if name == "aten._pin_memory.default":
            pinned = args[0].clone()
            pinned.is_pinned_for_gpu = True
            return pinned
        if not own and not to_gpu:
            return func(*args, **kwargs)
        if name == "prim.device.default":
            return own[0].device
        target = self._target(name, own, tensors, asked)
        self._refuse_mixtures(name, own, tensors, args)
        self._watch_the_host(name, args, kwargs, target)
        if own and name in attention.EMULATED:
            func = attention.EMULATED[name]
        plain_args, plain_kwargs = tree_map(_host_of, (tuple(args), dict(kwargs)))
        if to_gpu:
            plain_kwargs["device"] = torch.device("cpu")
        plain_kwargs.pop("pin_memory", None)
        if self.capture is not None:
            self.capture.before(func, plain_args, plain_kwargs, target)
        result = func(*plain_args, **plain_kwargs)
        inputs = {tensor.host.untyped_storage()._cdata for tensor in own}
        writes = _writes(name, func, result, inputs)
        if writes:
            self.launches[name, line_of_ours()] += 1
        if self.capture is not None:
            self.capture.reserve(result, inputs)
            if writes:
                self.capture.keep(func, plain_args, plain_kwargs, result, on_gpu={id(tensor.host) for tensor in own})
        return _wrapped(result, tensors, target)

    def _target(self, name: str, own: Sequence[GpuTensor], tensors: Sequence[Tensor], asked: Any) -> torch.device:
        """Return the device of what comes out."""
        if asked is not None:
            device = torch.device(asked)
            indexed = device.type != self.kind or device.index is not None
            return device if indexed else torch.device(self.kind, self.current_device())
        return tensors[0].device if name == "aten.copy_.default" else own[0].device

    def _refuse_mixtures(
        self, name: str, own: Sequence[GpuTensor], tensors: Sequence[Tensor], args: Sequence[Any]
    ) -> None:
        if name in COPYING:
            return
        strangers = [
            x for x in tensors if x.device.type == "cpu" and (x.ndim or name.startswith(NO_SCALARS_FROM_THE_CPU))
        ]
        if name in INDEXING and isinstance(args[0], GpuTensor):
            indices = [index for index in args[1] if isinstance(index, Tensor)]
            for index in (x for x in strangers if any(x is index for index in indices)):
                self.copy_in(f"an index of shape {tuple(index.shape)} from the CPU")
            strangers = [x for x in strangers if not any(x is index for index in indices)]
        devices = {str(x.device) for x in [*own, *strangers]}
        if len(devices) > 1:
            raise MixedDevicesError(f"{name} at {line_of_ours()}: tensors on {' and '.join(sorted(devices))}")

    def _watch_the_host(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], target: torch.device) -> None:
        if name in SYNCHRONIZING:
            self.synchronize(name)
        if name in INDEXING:
            for index in args[1]:
                if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                    self.synchronize("an index of booleans")
        if name not in COPYING:
            return
        is_copy = name == "aten.copy_.default"
        source = args[1] if is_copy else args[0]
        if isinstance(source, GpuTensor):
            if target.type == "cpu":
                self.synchronize("a copy to main memory")
        elif target.type == self.kind and source.device.type == "cpu":
            goes_on = kwargs.get("non_blocking", is_copy and len(args) > 2 and args[2])
            self.copy_in("a copy from main memory", waits=not (goes_on and hasattr(source, "is_pinned_for_gpu")))


def _host_of(value: Any) -> Any:
    return value.host if isinstance(value, GpuTensor) else value


def _writes(name: str, func: Any, result: Any, inputs: set[int]) -> bool:
    """Tell whether an operation launches a kernel: not so a view of its input, or memory that is only reserved.

    `inputs`: the storages of its arguments.
    """
    if name.startswith(ALLOCATING):
        return False
    if hasattr(func, "_schema") and func._schema.is_mutable:
        return True
    made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return any(tensor.untyped_storage()._cdata not in inputs for tensor in made)


def _wrapped(result: Any, tensors: Sequence[Tensor], target: torch.device) -> Any:
    """Return the result with each tensor on its device: an argument that comes back is the argument itself."""
    known = {id(tensor.host): tensor for tensor in reversed(tensors) if isinstance(tensor, GpuTensor)}
    known |= {id(tensor): tensor for tensor in tensors}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, GpuTensor):
            return value
        if id(value) in known:
            assert known[id(value)].shape == value.shape, (
                "a wrapper keeps its shape: squeeze_ and the like are not known"
            )
            return known[id(value)]
        if target.type == "mps" and value.dtype == torch.float64:
            raise TypeError(f"float64 on {target} at {line_of_ours()}: Apple's GPUs have none")
        return GpuTensor(value, target) if target.type in ("cuda", "mps") else value

    return tree_map(wrap, result)


def line_of_ours() -> str:
    """Return the innermost line of the project on the stack, of whoever called for a transfer; "backward" where
    autograd's own code runs.
    """
    frame = _frame_of_ours()
    return f"{_own_name(frame)}:{frame.f_lineno}" if frame else "backward"


def function_of_ours() -> str:
    """Return the function of that line."""
    frame = _frame_of_ours()
    return f"{_own_name(frame)}:{frame.f_code.co_qualname}" if frame else "backward"


def _frame_of_ours() -> FrameType | None:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if any(folder in name for folder in OURS) and not name.endswith("utils/transfer.py"):
            return frame
        frame = frame.f_back
    return None


def _own_name(frame: FrameType) -> str:
    name = frame.f_code.co_filename
    folder = next(folder for folder in OURS if folder in name)
    return name.rpartition(folder)[2] or name.rpartition("/")[2]
