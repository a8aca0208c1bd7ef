"""A GGUF file may be as far from the merged model as rounding explains, which is computed without the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minigrpo.delivery.gguf import rounding, writer
from minigrpo.delivery.gguf.parity import GgufReference, gguf_reference, prove_file
from minigrpo.delivery.gguf.quantize import quantise
from minigrpo.delivery.gguf.rounding import ROUNDINGS, explain_rounding
from tests.helpers.delivered import FAMILIES, edit_json
from tests.helpers.exported import model_folder

pytestmark = pytest.mark.extra("gguf")


def made(folder: Path, kind: str, target: Path) -> Path:
    """Write a model's folder as a file of that type."""
    if kind != "Q8_0":
        writer.write_gguf(folder, target, kind, "m")
        return target
    writer.write_gguf(folder, target.with_suffix(".f32"), "F32", "m")
    quantise(target.with_suffix(".f32"), target, kind, None)
    return target


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GgufReference]:
    folder = tmp_path_factory.mktemp("rounding") / "m"
    model_folder(folder, "qwen2", tied=True)
    return folder, gguf_reference(folder, None)


def test_values_are_rounded_as_the_gguf_package_rounds_them() -> None:
    import gguf

    values = torch.randn(6, 64) * torch.tensor([1e-9, 1e-3, 0.1, 1.0, 50.0, 0.0])[:, None]
    for kind, rounded in ROUNDINGS.items():
        packed = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[kind])
        theirs = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind]))
        assert torch.equal(rounded(values), theirs.float()), kind


@pytest.mark.parametrize("kind", ROUNDINGS)
def test_a_right_file_is_as_far_as_rounding_alone(
    qwen: tuple[Path, GgufReference], tmp_path: Path, kind: str, record_property: Any
) -> None:
    folder, reference = qwen
    proof = prove_file(made(folder, kind, tmp_path / "x.gguf"), kind, reference)
    assert proof.ok
    assert proof.rounding is not None
    assert proof.elsewhere is not None
    for row, cost in zip((proof.row, proof.elsewhere), proof.rounding, strict=True):
        record_property("over rounding", f"{row.mean_kl / cost:.3f}")
        assert row.mean_kl == pytest.approx(cost, rel=0.05)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_file_of_every_family_is_as_far_as_rounding_alone(
    tmp_path: Path, family: str, dtype: torch.dtype, record_property: Any
) -> None:
    folder = tmp_path / "m"
    model_folder(folder, family, dtype=dtype, hidden_size=256, intermediate_size=256, num_hidden_layers=4)
    reference = gguf_reference(folder, None)
    for kind in ROUNDINGS:
        proof = prove_file(made(folder, kind, tmp_path / f"{kind}.gguf"), kind, reference)
        assert proof.ok, proof.faults
        assert proof.rounding is not None
        assert proof.elsewhere is not None
        record_property(f"{kind}, over rounding", f"{proof.elsewhere.mean_kl / proof.rounding[1]:.3f}")
        assert proof.elsewhere.mean_kl == pytest.approx(proof.rounding[1], rel=0.1)


def turn_slower(factor: float) -> Callable[[Path], None]:
    """Rotate as if theta were that much larger."""

    def change(folder: Path) -> None:
        rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
        edit_json(folder / "config.json", rope_parameters={**rope, "rope_theta": factor * rope["rope_theta"]})

    return change


def add_more(folder: Path) -> None:
    """Add a thousand times as much under the root of every norm."""
    eps = json.loads((folder / "config.json").read_text())["rms_norm_eps"]
    edit_json(folder / "config.json", rms_norm_eps=1000 * eps)


@pytest.mark.parametrize(("kind", "fault"), [("F16", turn_slower(1.01)), ("F16", add_more), ("BF16", turn_slower(1.1))])
def test_settings_that_are_a_little_wrong_are_more_than_rounding(
    qwen: tuple[Path, GgufReference], tmp_path: Path, kind: str, fault: Callable[[Path], None]
) -> None:
    wrong = Path(shutil.copytree(qwen[0], tmp_path / "wrong"))
    fault(wrong)
    proof = prove_file(made(wrong, kind, tmp_path / "x.gguf"), kind, qwen[1])
    assert proof.tensors.fault is None
    (told,) = proof.faults
    assert f"and rounding to {kind} explains" in told


def test_where_it_is_not_known_how_llama_cpp_rounds_nothing_is_explained(
    qwen: tuple[Path, GgufReference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reference = qwen
    assert explain_rounding(folder, "Q4_K_M", reference.held, reference.merged) is None
    monkeypatch.setattr(rounding.platform, "machine", lambda: "arm64")
    proof = prove_file(made(folder, "F16", tmp_path / "x.gguf"), "F16", reference)
    assert proof.ok
    assert proof.rounding is None
