"""Read and write safetensors files in blocks of rows: a shard is never in memory all at once.

The format is a length, a JSON header and raw bytes, so a tensor's rows can be read from the disk, changed and written
one block after the other. Every fault of a file is found in its header, before anything is made from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigrpo.errors import ArtifactError

_TORCH_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
}
DTYPE_NAMES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_LARGEST_SIZE = 1 << 40
"""Of one dimension of a tensor: beside a 0, a larger one would pass for the size of the file."""
BLOCK_ELEMENTS = 1 << 20
"""Elements of a block of rows: 4 MiB in float32, of which a merge holds about six at once."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor on the disk; `start` and `stop` are bytes from the beginning of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return _TORCH_DTYPES[self.dtype]

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def width(self) -> int:
        """Count the elements of a row."""
        return math.prod(self.shape[1:])

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        """Read rows [first, last) as stored; a scalar is one row. Raise ArtifactError where reading fails."""
        last = self.rows if last is None else last
        size = self.width * self.torch_dtype.itemsize
        shape = (last - first, *self.shape[1:])
        if not math.prod(shape):
            return torch.empty(shape, dtype=self.torch_dtype)
        data = bytearray((last - first) * size)
        try:
            with self.file.open("rb") as stream:
                stream.seek(self.start + first * size)
                count = stream.readinto(data)
        except OSError as fault:
            raise ArtifactError(f"{self.file} cannot be read: {fault.strerror or fault}.") from None
        if count != len(data):
            raise ArtifactError(f"{self.file} was cut short while it was read. Copy or download it again.")
        return torch.frombuffer(data, dtype=self.torch_dtype).view(shape)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield (first, last) of blocks of at most BLOCK_ELEMENTS elements, or of one row."""
        step = max(1, BLOCK_ELEMENTS // max(1, self.width))
        for first in range(0, self.rows, step):
            yield first, min(first + step, self.rows)


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A file's header: `raw`, byte for byte, and the tensors in the order of their bytes."""

    raw: bytes
    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]


def read_header(file: Path) -> SafetensorsHeader:
    """Read a file's header. Raise ArtifactError where it is missing, cut short, too long, or no safetensors file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            raw = stream.read(min(length, max(size - 8, 0)))
    except OSError as fault:
        raise ArtifactError(f"{file} cannot be read: {fault.strerror or fault}.") from None
    if size < 8 or (length > size - 8 and raw[:1] == b"{"):
        raise ArtifactError(f"{file} was cut short: {size} bytes do not hold its header. Copy or download it again.")
    try:
        table = json.loads(raw if length <= size - 8 else b"")
        metadata = table.pop("__metadata__", {})
        tensors = [_parse_entry(name, entry, file, 8 + length) for name, entry in table.items()]
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError(f"its metadata is {str(metadata)[:40]}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        raise ArtifactError(
            f"{file} is damaged: its first bytes are no safetensors header{_reason(fault)}. Copy or download it again."
        ) from None
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end or tensor.stop - tensor.start != _tensor_bytes(tensor.dtype, tensor.shape):
            raise ArtifactError(f"{file} is damaged: the place of {tensor.name} in it is wrong. Copy it again.")
        end = tensor.stop
    if size != end:
        what = "was cut short" if size < end else "has bytes that nothing names"
        raise ArtifactError(f"{file} {what}: {size} bytes, and its header counts {end}. Copy or download it again.")
    return SafetensorsHeader(raw, metadata, {tensor.name: tensor for tensor in tensors})


def _reason(fault: Exception) -> str:
    """Return the reason of our own errors only: a parser's is about characters that nobody has typed."""
    return f" ({fault})" if isinstance(fault, ValueError) and not isinstance(fault, json.JSONDecodeError) else ""


def _parse_entry(name: str, entry: Any, file: Path, origin: int) -> StoredTensor:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if any(type(number) is not int for number in (start, stop, *shape)):
        raise ValueError(f"{name} has a shape or a place that is no list of whole numbers")
    if entry["dtype"] not in _TORCH_DTYPES or min(shape, default=0) < 0 or max(shape, default=0) > _LARGEST_SIZE:
        raise ValueError(f"{name} is of type {entry['dtype']} and shape {shape}, which cannot be read here")
    return StoredTensor(name, file, entry["dtype"], shape, origin + start, origin + stop)


def _tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _TORCH_DTYPES[dtype].itemsize


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor to be written; its blocks of rows are made one by one, as they are written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Iterable[Tensor]


def write_safetensors(file: Path, planned: Iterable[PlannedTensor], header: SafetensorsHeader) -> int:
    """Write a file like the one with that header; the header's bytes stay where no name, dtype or shape changed.

    Return how many bytes of tensors it holds.
    """
    # Wide types first, so that no tensor begins where its type may not.
    entries = sorted(planned, key=lambda entry: -_TORCH_DTYPES[entry.dtype].itemsize)
    then = {name: (tensor.dtype, tensor.shape) for name, tensor in header.tensors.items()}
    if {entry.name: (entry.dtype, entry.shape) for entry in entries} == then:
        place = {name: i for i, name in enumerate(header.tensors)}
        entries.sort(key=lambda entry: place[entry.name])
        raw = header.raw
    else:
        raw = _raw_header(entries, header.metadata)
    total = 0
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for entry in entries:
            for block in entry.blocks:
                stream.write(block.contiguous().view(-1).view(torch.uint8).numpy().data)
            total += _tensor_bytes(entry.dtype, entry.shape)
            if stream.tell() != 8 + len(raw) + total:
                raise AssertionError(f"{entry.name}: its blocks are not of the planned size")
    return total


def _raw_header(entries: Iterable[PlannedTensor], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for entry in entries:
        start, end = end, end + _tensor_bytes(entry.dtype, entry.shape)
        table[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    raw = json.dumps(table, separators=(",", ":")).encode()
    return raw + b" " * (-len(raw) % 8)
