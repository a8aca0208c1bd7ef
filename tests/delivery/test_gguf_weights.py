"""Every tensor of a GGUF file is compared with the merged model's: what is wrong is refused in every format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from minigrpo.delivery.gguf import weights, writer
from minigrpo.delivery.gguf.quantize import quantise
from minigrpo.delivery.gguf.weights import prove_tensors, rotated_rows, worst_error
from minigrpo.delivery.gguf.writer import write_gguf
from minigrpo.models.model_files import open_base
from tests.helpers.delivered import FAMILIES, build
from tests.helpers.exported import bpe_tokenizer
from tests.helpers.tiny import yarn

pytestmark = pytest.mark.extra("gguf")
SIZE = {"hidden_size": 256, "intermediate_size": 256}
Tensors = dict[str, torch.Tensor]


def model_folder(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    rope = {"rope_parameters": {**yarn(), "llama_4_scaling_beta": 0.5}} if family.startswith("mi") else {}
    tokenizer = bpe_tokenizer()
    build(family, vocab_size=len(tokenizer), **SIZE, **rope).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def changed(folder: Path, change: Callable[[Tensors], None]) -> Path:
    """Change the tensors of a model's folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(
        {name: each.contiguous() for name, each in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def name_of(tensors: Tensors, end: str) -> str:
    return next(name for name in tensors if name.endswith(end))


def times(factor: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name_of(tensors, "layers.0.mlp.up_proj.weight")].mul_(factor)

    return change


def swap_layers(tensors: Tensors) -> None:
    one, two = (name_of(tensors, f"layers.{layer}.self_attn.o_proj.weight") for layer in (0, 1))
    tensors[one], tensors[two] = tensors[two], tensors[one]


def transpose(tensors: Tensors) -> None:
    name = name_of(tensors, "layers.1.mlp.down_proj.weight")
    tensors[name] = tensors[name].T.clone()


def shift_heads(tensors: Tensors) -> None:
    name = name_of(tensors, "layers.0.self_attn.q_proj.weight")
    tensors[name] = tensors[name].roll(1, 0)


WRONG = {
    "times 0.5": times(0.5),
    "times 0.97": times(0.97),
    "times 1.03": times(1.03),
    "layers swapped": swap_layers,
    "transposed": transpose,
    "rows moved": shift_heads,
}


def made(folder: Path, kind: str, target: Path) -> Path:
    """Write a model's folder as a file of that kind, by our writer."""
    if kind in ("F32", "F16", "BF16"):
        write_gguf(folder, target, kind, "m")
        return target
    write_gguf(folder, target.with_suffix(".f32"), "F32", "m")
    quantise(target.with_suffix(".f32"), target, kind, None)
    return target


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q4_K_M", "Q3_K_S"])
def test_a_right_file_passes_and_a_wrong_one_does_not(tmp_path: Path, family: str, kind: str) -> None:
    folder = model_folder(tmp_path / "model", family)
    right = prove_tensors(made(folder, kind, tmp_path / "right.gguf"), open_base(folder))
    assert right.fault is None
    assert right.values > 100_000
    for number, change in enumerate(WRONG.values()):
        wrong = changed(model_folder(tmp_path / f"wrong{number}", family), change)
        told = prove_tensors(made(wrong, kind, tmp_path / f"{number}.gguf"), open_base(folder)).fault
        assert told is not None
        assert "does not hold the merged model's weights: blk." in told


def test_rows_that_keep_the_models_order_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "model", "llama")
    monkeypatch.setattr(writer, "_permuted", lambda values, *others: values)
    told = prove_tensors(made(folder, "F16", tmp_path / "m.gguf"), open_base(folder)).fault
    assert told is not None
    assert "attn_q.weight" in told or "attn_k.weight" in told


def test_rows_of_a_head_alternate_between_its_halves() -> None:
    assert rotated_rows(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_tensor_that_is_missing_or_added_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "model", "qwen2")
    sources = writer.gguf_sources

    def without_one(base: Any) -> Any:
        return {name: each for name, each in sources(base).items() if name != "output_norm.weight"}

    monkeypatch.setattr(writer, "gguf_sources", without_one)
    file = made(folder, "F32", tmp_path / "m.gguf")
    monkeypatch.undo()
    assert prove_tensors(file, open_base(folder)).faults == ("output_norm.weight is missing",)


def test_an_unknown_layout_is_not_compared_and_says_so(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "qwen2")
    file = made(folder, "F32", tmp_path / "m.gguf")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"qwen2"', '"gemma3"'))
    assert not prove_tensors(file, open_base(folder)).compared


@pytest.mark.parametrize(("kind", "error"), [("Q8_0", 0.0128), ("Q4_K", 0.204), ("Q6_K", 0.051)])
def test_the_worst_error_of_a_type_follows_from_its_bits(kind: str, error: float) -> None:
    assert worst_error(kind) ** 0.5 == pytest.approx(error, rel=0.01)


def put_on_a_grid(grid: str) -> Callable[[Tensors], None]:
    """As a base that was published in few bits, unpacked, and trained a little."""

    def change(tensors: Tensors) -> None:
        draw = torch.Generator().manual_seed(0)
        for name, weight in tensors.items():
            if weight.ndim == 2:
                packed = gguf.quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType[grid])
                unpacked = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[grid]))
                learned = torch.randn(weight.shape, generator=draw) * weight.float().std() * 1e-3
                tensors[name] = (unpacked + learned).to(weight.dtype)

    return change


@pytest.mark.parametrize("grid", ["Q8_0", "Q5_0", "Q4_0"])
def test_a_model_that_was_packed_before_is_no_false_alarm(tmp_path: Path, grid: str) -> None:
    folder = changed(model_folder(tmp_path / "model", "qwen2", torch.bfloat16), put_on_a_grid(grid))
    for kind in ("Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_0", "Q3_K_M"):
        assert prove_tensors(made(folder, kind, tmp_path / f"{kind}.gguf"), open_base(folder)).fault is None, kind


def test_one_value_that_is_not_the_nearest_is_found_in_every_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder(tmp_path / "model", "qwen2")
    unpack = weights._unpack

    def slip(part: Any, kind: Any, like: torch.Tensor) -> torch.Tensor:
        unpacked = unpack(part, kind, like)
        if like.ndim == 2:
            unpacked[0, 0] = unpacked[0].abs().max() * torch.where(like[0, 0] > 0, -1, 1)
        return unpacked

    for kind in ("Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_0", "Q3_K_M"):
        file = made(folder, kind, tmp_path / f"{kind}.gguf")
        monkeypatch.setattr(weights, "_unpack", slip)
        found = prove_tensors(file, open_base(folder))
        monkeypatch.undo()
        assert found.faults
        assert found.faults[0].endswith(f"values are not what {found.faults[0].split()[-4]} rounds them to")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "IQ4_NL", "F16"])
def test_a_value_that_is_no_number_is_found_in_every_type(kind: str) -> None:
    values = torch.linspace(-1, 1, 256).reshape(1, -1)
    unpacked = values.clone()
    unpacked[0, 3] = torch.nan
    tally = weights._Tally(kind)
    tally.add(unpacked, values, (values - 1, values + 1) if kind == "Q4_K" else None)
    assert tally.fault() is not None


def test_one_value_far_from_all_others_is_no_false_alarm(tmp_path: Path) -> None:
    def spike(tensors: Tensors) -> None:
        tensors[name_of(tensors, "layers.0.mlp.up_proj.weight")][::3, ::32] *= 40

    folder = changed(model_folder(tmp_path / "model", "qwen2"), spike)
    for kind in ("Q8_0", "Q6_K", "Q4_K_M"):
        assert prove_tensors(made(folder, kind, tmp_path / f"{kind}.gguf"), open_base(folder)).fault is None
