"""Shard a model over the ranks: each holds a slice of every parameter, of its gradient and of the optimizer's moments.

FSDP2 does it (torch.distributed.fsdp.fully_shard, after ZeRO, arXiv 1910.02054). A layer is gathered
from all ranks before it computes, and let go afterwards; its gradient is added up over the ranks as soon as it is
there, and each rank keeps its slice of the sum. What travels takes the same wire as all else (distributed/ranks.py):
sums are taken in the order of the ranks, bytes are counted, and a rank that is lost is named.

A pass takes all ranks, so all make as many, in the same order.

On the disk the slices are a checkpoint of torch.distributed.checkpoint, which ranks of any number read, each what it
needs, without asking the others:

    shards/  __0_0.distcp  __1_0.distcp ...  one file a rank
             index                           which slice of which tensor stands where

Shapes: R ranks, L numbers of a slice.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigrpo.distributed.ranks import Item, Ranks

SHARDS = "shards"
"""The folder of a checkpoint that holds slices."""
INDEX = "index"
"""torch calls it `.metadata`; but hidden files are nobody's, and are not hashed."""
WEIGHT = "weight/"
"""How names of weights begin; those of moments begin with the moment's own name."""
RUN = "run_sharded"
"""The method of a sharded model that `run_gathered` calls."""


def shard(model: nn.Module, layers: Sequence[nn.Module], ranks: Ranks) -> dict[str, nn.Parameter]:
    """Keep only a slice of each parameter on this rank. All ranks call it, with equal weights.

    What lies outside the layers (embedding, last norm, head) is gathered for a whole pass, forward and back. Return the
    slices by name: DTensors, which the optimizer takes as parameters.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks.size,))
    is_trained = any(parameter.requires_grad for parameter in model.parameters())
    for module in (*layers, model):
        sharded: Any = fully_shard(module, mesh=mesh, reshard_after_forward=module is not model or not is_trained)
        sharded.set_custom_all_gather(_Gather(ranks))
        sharded.set_custom_reduce_scatter(_Sum(ranks))
        # FSDP would divide by the number of ranks; the weights of a batch are shares of all of it already.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    setattr(model, RUN, _call)
    register_fsdp_forward_method(model, RUN)
    return dict(model.named_parameters())


def run_gathered(model: nn.Module, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Do the work of a pass with what lies outside the layers gathered. A model that is not sharded just does it."""
    run: Callable[..., tuple[Tensor, ...]] = getattr(model, RUN, _call)
    return run(work)


def _call(work: Callable[[], Item]) -> Item:
    return work()


def gather_module(module: Any) -> None:
    """Gather a sharded module's own parameters, until its next backward pass, or `release_module`."""
    if is_sharded(module):
        module.unshard()


def release_module(module: Any) -> None:
    """Let go of what was gathered: it is gathered anew, from the slices as they are then."""
    if is_sharded(module):
        module.reshard()


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Gather a sharded module's own parameters inside the block. A module that is not sharded stays as it is."""
    gather_module(module)
    try:
        yield
    finally:
        release_module(module)


def is_sharded(module: nn.Module) -> bool:
    return hasattr(module, "unshard")


class _Memory:
    """Allocates the buffers of an exchange, as torch's own classes do."""

    def __init__(self, ranks: Ranks) -> None:
        assert ranks.wire is not None, "a model is sharded after the ranks have connected"
        self.ranks, self.wire = ranks, ranks.wire

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Memory):
    """Gathers the slices of all ranks."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        torch.cat(self.wire.gather(input_tensor), out=output_tensor)
        self.ranks.sent["weights"] += (self.ranks.size - 1) * input_tensor.nbytes


class _Sum(_Memory):
    """Adds up gradients in the order of the ranks, whoever comes first; each rank gets its slice of the sum."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        first_L, *others = self.wire.swap(input_tensor.view(self.ranks.size, -1))
        output_tensor.copy_(first_L)
        for slice_L in others:
            output_tensor += slice_L
        self.ranks.sent["gradients"] += (self.ranks.size - 1) * output_tensor.nbytes


def slice_like(parameter: Any, whole: Tensor) -> Any:
    """Return this rank's slice of a whole tensor, as a DTensor laid out as the parameter is. Nothing travels."""
    from torch.distributed.tensor import distribute_tensor

    placed = distribute_tensor(
        whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
    # Of the slice alone, or the whole tensor stays in memory. torch 2.13 copies it itself; older ones may not.
    return placed.clone()


def unite(shards: Mapping[str, Any], ranks: Ranks) -> dict[str, Tensor]:
    """Gather all parameters, one by one, in the main memory of the leading rank; the others get none."""
    whole: dict[str, Tensor] = {}
    assert ranks.wire is not None
    for name, parameter in shards.items():
        own = parameter.detach().to_local()
        even = own.new_zeros(-(-parameter.shape[0] // ranks.size), *parameter.shape[1:])
        even[: len(own)] = own
        parts = ranks.wire.gather(even)
        if ranks.leads:
            whole[name] = torch.cat(parts)[: parameter.shape[0]].cpu()
    return whole


def write_shards(folder: Path, tensors: Mapping[str, Any], ranks: Ranks) -> None:
    """Write the slices of all ranks. All ranks call it, with the same names. Raise OSError where a disk refuses."""
    import torch.distributed.checkpoint as dcp

    assert ranks.wire is not None
    try:
        index = ranks.wire.guarded(lambda: dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder)))
    except dcp.CheckpointException as fault:
        raise _first(fault) from None
    if ranks.leads:
        index.storage_meta = None  # names of this moment: the same slices shall be the same bytes
        (folder / INDEX).write_bytes(pickle.dumps(index))
        (folder / ".metadata").unlink()


def names_of_shards(folder: Path) -> list[str]:
    """Return the names of the tensors whose slices lie in a folder."""
    return list(_read_index(folder).state_dict_metadata)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the whole weights whose slices lie in a folder, by name."""
    found = _read_index(folder).state_dict_metadata
    tensors = {
        name: torch.empty(each.size, dtype=each.properties.dtype)
        for name, each in found.items()
        if name.startswith(WEIGHT)
    }
    read_shards(folder, tensors)
    return {name.removeprefix(WEIGHT): tensor for name, tensor in tensors.items()}


def read_shards(folder: Path, tensors: Mapping[str, Any]) -> None:
    """Fill these tensors: whole ones, or DTensors with the slice that this rank holds. Nothing travels.

    Raise ValueError or LookupError where the folder holds others.
    """
    import torch.distributed.checkpoint as dcp

    index = _read_index(folder)

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return index

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that nothing travels is meant so
            dcp.load(dict(tensors), storage_reader=Reader(folder), no_dist=True)
    except dcp.CheckpointException as fault:
        raise _first(fault) from None


def _first(fault: Any) -> Exception:
    """Return what the first rank met, of an error that torch raises on all."""
    error: Exception = next(iter(fault.failures.values()))[0]
    return error


def _read_index(folder: Path) -> Any:
    with (folder / INDEX).open("rb") as stream:
        return _IndexReader(stream).load()


class _IndexReader(pickle.Unpickler):
    """Reads an index, and builds nothing else: a pickle may name any function to be called."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _IN_AN_INDEX:
            raise pickle.UnpicklingError(f"an index of slices does not hold {module}.{name}")
        return super().find_class(module, name)


_METADATA = "torch.distributed.checkpoint.metadata"
_IN_AN_INDEX = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties")),
    *((_METADATA, name) for name in ("ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}
