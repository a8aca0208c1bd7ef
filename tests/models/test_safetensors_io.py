"""Safetensors files, block by block: the library reads what we write, and a broken file is always refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigrpo.errors import ArtifactError
from minigrpo.models.safetensors_io import DTYPE_NAMES, PlannedTensor, StoredTensor, read_header, write_safetensors

TENSORS = {
    "odd": torch.arange(3, dtype=torch.uint8),
    "half": torch.randn(5, 3).bfloat16(),
    "whole": torch.randn(4, 2, 3),
    "scalar": torch.tensor(7.0),
    "none": torch.empty(0, 4),
    "flags": torch.tensor([True, False]),
    "count": torch.tensor([2**40]),
    "words": torch.tensor([1, 2], dtype=torch.uint16),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "a.safetensors", {"format": "pt"})
    return tmp_path / "a.safetensors"


def copy(file: Path, cast: dict[str, torch.dtype]) -> Path:
    header = read_header(file)

    def plan(stored: StoredTensor) -> PlannedTensor:
        dtype = cast.get(stored.name, stored.torch_dtype)
        blocks = (stored.read(*rows).to(dtype) for rows in stored.blocks())
        return PlannedTensor(stored.name, DTYPE_NAMES[dtype], stored.shape, blocks)

    planned = [plan(stored) for stored in header.tensors.values()]
    write_safetensors(file.with_name("b.safetensors"), planned, header)
    return file.with_name("b.safetensors")


def test_what_is_read_is_what_the_library_reads(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minigrpo.models.safetensors_io.BLOCK_ELEMENTS", 4)
    for name, stored in read_header(file).tensors.items():
        assert stored.shape == TENSORS[name].shape
        parts = [stored.read(*rows) for rows in stored.blocks()]
        read = torch.cat([part.view(-1) for part in parts]) if parts else torch.empty(0)
        assert torch.equal(read, TENSORS[name].view(-1)), name


def test_a_file_written_without_a_change_is_the_same_to_the_byte(file: Path) -> None:
    assert copy(file, {}).read_bytes() == file.read_bytes()


def test_the_library_reads_what_is_written_with_other_types(file: Path) -> None:
    cast = {"half": torch.float32, "whole": torch.float16}
    again = load_file(copy(file, cast))
    assert again.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert torch.equal(again[name], value.to(cast.get(name, value.dtype))), name


def test_a_file_cut_at_any_place_is_refused(file: Path, tmp_path: Path) -> None:
    whole, part = file.read_bytes(), tmp_path / "part.safetensors"
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        part.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match=r"damaged|cut short"):
            read_header(part)
    part.write_bytes(whole + b"x")
    with pytest.raises(ArtifactError, match="bytes that nothing names"):
        read_header(part)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
        [],
        None,
        7,
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, entry: Any) -> None:
    raw = json.dumps({"x": entry}).encode()
    file = tmp_path / "lie.safetensors"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0\0\0\0")
    with pytest.raises(ArtifactError, match="damaged"):
        read_header(file)


def test_two_tensors_in_one_place_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    raw = json.dumps({"x": entry, "y": entry}).encode()
    file = tmp_path / "lie.safetensors"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0\0\0\0")
    with pytest.raises(ArtifactError, match="the place of"):
        read_header(file)
