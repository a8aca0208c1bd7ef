"""Formats for vLLM: every tensor of the folder is unpacked and compared; what is wrong is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigrpo.cli import main
from minigrpo.delivery.compressed.compressor import COMPRESSOR_PYTHON, Compressor, find_compressor
from minigrpo.delivery.compressed.export import compress, sealed_rows
from minigrpo.delivery.compressed.schemes import SCHEMES, Scheme, half_e4m3_step, packing_plan, split_formats
from minigrpo.delivery.compressed.weights import PackedProof, prove_packed
from minigrpo.errors import ArtifactError, MinigrpoError, ModelError
from minigrpo.models.model_files import open_base
from tests.helpers.delivered import edit_json
from tests.helpers.exported import merged_run, model_folder

Tensors = dict[str, torch.Tensor]
SIZE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256}
FUSED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model folder. Read only."""
    folder = tmp_path_factory.mktemp("model") / "mine"
    model_folder(folder, "qwen2", dtype=request.param, tied=request.param == torch.bfloat16, **SIZE)
    return folder


def packed_layer(weight_OI: torch.Tensor, scheme: Scheme, global_scale: float) -> Tensors:
    """Pack a weight as the format's description says, in the weight's own type."""
    dtype, groups = weight_OI.dtype, weight_OI.shape[1] // scheme.group if scheme.group else 1
    weight_OGX = weight_OI.unflatten(1, (groups, -1))
    scale_OG = weight_OGX.abs().amax(-1) / torch.tensor(scheme.end, dtype=dtype)
    if scheme.name == "FP8":
        codes_OI = (weight_OGX / scale_OG[..., None]).flatten(1).clamp(-448, 448)
        return {"weight": codes_OI.to(torch.float8_e4m3fn), "weight_scale": scale_OG}
    if scheme.name == "W4A16":
        codes_OI = (weight_OGX / scale_OG[..., None]).flatten(1).round().clamp(-8, 7).to(torch.int32) + 8
        packed_OX = (codes_OI.unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)
        return {"weight_packed": packed_OX, "weight_scale": scale_OG, "weight_shape": torch.tensor(weight_OI.shape)}
    block_OG = (scale_OG.float() * global_scale).clamp(max=448).to(torch.float8_e4m3fn)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    sizes_OI = (weight_OGX.float() / (block_OG.float() / global_scale)[..., None]).flatten(1)
    codes_OI = (sizes_OI.abs()[..., None] - grid).abs().argmin(-1) + 8 * (sizes_OI < 0)
    packed_OX = (codes_OI[:, ::2] + 16 * codes_OI[:, 1::2]).to(torch.uint8)
    return {"weight_packed": packed_OX, "weight_scale": block_OG, "weight_global_scale": torch.tensor([global_scale])}


def write_packed(model: Path, folder: Path, kind: str, change: Callable[[Tensors], None] | None = None) -> Path:
    """Write a model in a format by the few lines above. `change`: of its tensors before they are packed."""
    scheme, base = SCHEMES[kind], open_base(model)
    plan = packing_plan(base, scheme)
    shutil.copytree(model, folder)
    tensors = load_file(model / "model.safetensors")
    if change:
        change(tensors)
    for module in plan.packed:
        parent, _, name = module.partition("layers.")[2].partition(".")
        fused = next((group for group in FUSED if name in group), (name,))
        shared = [tensors.get(f"{module.removesuffix(name)}{other}.weight") for other in fused]
        largest = max(float(each.abs().max()) for each in shared if each is not None)
        whole = float(torch.tensor(448 * 6 / largest, dtype=base.dtype).float())
        layer = packed_layer(tensors[f"{module}.weight"], scheme, whole)
        tensors |= {f"packed {module}.{part}": value for part, value in layer.items()}
        assert parent.isdigit()
    for module in plan.packed:
        del tensors[f"{module}.weight"]
    found = {name.removeprefix("packed "): value.contiguous() for name, value in tensors.items()}
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    group = {
        **{"format": scheme.layout, "targets": ["Linear"], "output_activations": None},
        **{"weights": dict(scheme.arguments), "input_activations": scheme.activations and dict(scheme.activations)},
    }
    said = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "format": scheme.layout}
    edit_json(
        folder / "config.json",
        quantization_config={**said, "config_groups": {"a": group}, "ignore": list(plan.ignored)},
    )
    return folder


def proof_of(folder: Path, model: Path, kind: str) -> PackedProof:
    base = open_base(model)
    return prove_packed(folder, base, SCHEMES[kind], packing_plan(base, SCHEMES[kind]))


def weight(end: str) -> str:
    return f"model.layers.{end}.weight"


def times(factor: float) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({weight("0.mlp.down_proj"): tensors[weight("0.mlp.down_proj")] * factor})


def swap_layers(tensors: Tensors) -> None:
    one, two = weight("0.self_attn.o_proj"), weight("1.self_attn.o_proj")
    tensors[one], tensors[two] = tensors[two], tensors[one]


def transpose(tensors: Tensors) -> None:
    tensors[weight("1.mlp.down_proj")] = tensors[weight("1.mlp.down_proj")].T.contiguous()


def change_norm(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01


WRONG = {
    "times 0.97": times(0.97),
    "times 1.03": times(1.03),
    "layers swapped": swap_layers,
    "transposed": transpose,
    "norm changed": change_norm,
}


@pytest.mark.parametrize("kind", SCHEMES)
def test_a_right_folder_passes_and_a_wrong_one_does_not(tmp_path: Path, model: Path, kind: str) -> None:
    right = proof_of(write_packed(model, tmp_path / "right", kind), model, kind)
    assert right.fault is None
    assert right.packed == 14
    assert right.values > 400_000
    assert 0.01 < right.error < 0.15
    for name, change in WRONG.items():
        wrong = proof_of(write_packed(model, tmp_path / name, kind, change), model, kind)
        assert wrong.fault is not None, name
        assert len(wrong.faults) == (2 if name == "layers swapped" else 1)


def scale_doubled(tensors: Tensors) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale"
    changed = tensors[name].float()
    changed[3] *= 2
    tensors[name] = changed.to(tensors[name].dtype)


def one_value_off(tensors: Tensors) -> None:
    layer = "model.layers.0.mlp.up_proj"
    name = next(name for name in (f"{layer}.weight_packed", f"{layer}.weight") if name in tensors)
    raw = tensors[name].view(torch.uint8)
    raw[0, 0] ^= 0x10 if raw.dtype == tensors[name].dtype or tensors[name].dtype == torch.int32 else 0x04


def tensor_missing(tensors: Tensors) -> None:
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]


def tensor_added(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.up_proj.weight_zero_point"] = torch.zeros(1)


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.parametrize("change", [scale_doubled, one_value_off, tensor_missing, tensor_added])
def test_what_is_stored_wrongly_is_named(
    tmp_path: Path, model: Path, kind: str, change: Callable[[Tensors], None]
) -> None:
    folder = write_packed(model, tmp_path / "m", kind)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    told = proof_of(folder, model, kind).fault
    assert told is not None
    assert told.startswith("model.layers.0.mlp.up_proj")


def test_global_scales_that_vllm_would_mix_up_are_refused(tmp_path: Path, model: Path) -> None:
    folder = write_packed(model, tmp_path / "m", "NVFP4")
    tensors = load_file(folder / "model.safetensors")
    for half in ("weight_scale", "weight_global_scale"):  # the same weights, and another pair of scales
        name = f"model.layers.0.self_attn.k_proj.{half}"
        tensors[name] = (tensors[name].float() / 2).to(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    told = proof_of(folder, model, "NVFP4").fault
    assert told is not None
    assert "the global scales differ" in told


def test_files_beside_the_weights_and_the_config_are_the_models(tmp_path: Path, model: Path) -> None:
    folder = write_packed(model, tmp_path / "m", "FP8")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").unlink()
    assert proof_of(folder, model, "FP8").faults == (
        *("generation_config.json is missing", "chat_template.jinja is not the merged model's"),
    )
    shutil.rmtree(folder)
    write_packed(model, folder, "FP8")
    edit_json(folder / "config.json", rms_norm_eps=1e-5)
    assert proof_of(folder, model, "FP8").faults == ("config.json is not the merged model's",)
    shutil.rmtree(folder)
    write_packed(model, folder, "FP8")
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", quantization_config={**quantization, "ignore": []})
    assert proof_of(folder, model, "FP8").faults == ("config.json does not say what FP8 is",)


def test_half_a_step_of_e4m3_is_half_the_distance_of_its_neighbours() -> None:
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle, half = (numbers[1:] + numbers[:-1]) / 2, (numbers[1:] - numbers[:-1]) / 2
    assert torch.equal(half_e4m3_step(middle), half)


def test_layers_whose_width_does_not_divide_by_the_group_stay(tmp_path: Path) -> None:
    model_folder(tmp_path / "m", "qwen2", hidden_size=256, intermediate_size=192)
    plan = packing_plan(open_base(tmp_path / "m"), SCHEMES["W4A16"])
    assert sorted(plan.kept) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert set(plan.kept) | {"lm_head", "model.embed_tokens"} <= set(plan.ignored)
    model_folder(tmp_path / "narrow", "qwen2", hidden_size=64, intermediate_size=64)
    with pytest.raises(ModelError, match="no width divides by 128"):
        packing_plan(open_base(tmp_path / "narrow"), SCHEMES["W4A16"])


def test_vision_towers_stay_under_whatever_prefix_a_program_gives_them(tmp_path: Path) -> None:
    model_folder(tmp_path / "m", "mistral3")
    plan = packing_plan(open_base(tmp_path / "m"), SCHEMES["FP8"])
    assert all("vision" not in name for name in plan.packed)
    assert "re:.*vision_tower.*" in plan.ignored


def test_formats_are_known_in_any_case_and_others_are_named() -> None:
    assert split_formats(["fp8,q8_0", "nvFP4"]) == (["Q8_0"], [SCHEMES["FP8"], SCHEMES["NVFP4"]])
    with pytest.raises(MinigrpoError, match=r"--format FP9 is not known.*Q4_K_M.*W4A16"):
        split_formats(["fp9"])


def test_without_llm_compressor_the_two_commands_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(COMPRESSOR_PYTHON, raising=False)
    with pytest.raises(MinigrpoError, match=r"python -m venv compressor && compressor/bin/pip install llmcompressor=="):
        find_compressor(None)
    monkeypatch.setenv(COMPRESSOR_PYTHON, str(tmp_path / "none"))
    with pytest.raises(MinigrpoError, match="cannot be run"):
        find_compressor(None)


@pytest.mark.env("MINIGRPO_COMPRESSOR")
def test_a_run_is_packed_proved_measured_and_sealed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = merged_run(tmp_path / "mine", "qwen2", tied=True, **SIZE)
    found = compress(run, list(SCHEMES.values()), quiet=True)
    assert [each.verdict for each in found.folders] == ["weights proved"] * 3
    assert [each.rows[0]["name"] for each in found.folders] == [f"compressed {name}" for name in SCHEMES]
    assert all(0 < each.rows[0]["mean_kl"] < 0.2 for each in found.folders)
    assert {folder.name for folder in run.compressed.iterdir()} == {f"mine-{name}" for name in SCHEMES}
    assert len(sealed_rows(run, [])) == 6
    changed = run.compressed / "mine-W4A16" / "tokenizer.json"
    changed.write_text(changed.read_text() + " ")
    faults: list[str] = []
    assert len(sealed_rows(run, faults)) == 4
    assert "mine-W4A16/tokenizer.json was changed" in faults[0]

    def refuse(*asked: Any, **options: Any) -> None:
        raise AssertionError("nothing is to be made")

    monkeypatch.setattr(Compressor, "make", refuse)
    with pytest.raises(SystemExit) as ended:
        main.main(["export", str(run.path), "--format", "fp8", "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["compressed"]["folders"][0]["verdict"] == "there already"
    with pytest.raises(ArtifactError, match=r"tokenizer.json was changed .* --format W4A16 --force"):
        compress(run, [SCHEMES["W4A16"]], quiet=True)
    monkeypatch.undo()
    assert compress(run, [SCHEMES["W4A16"]], force=True, quiet=True).folders[0].verdict == "weights proved"


@pytest.mark.env("MINIGRPO_COMPRESSOR")
def test_a_model_that_reads_pictures_is_packed_and_runs(tmp_path: Path) -> None:
    model_folder(tmp_path / "m", "mistral3", dtype=torch.bfloat16)
    (found,) = compress(tmp_path / "m", [SCHEMES["FP8"]], quiet=True).folders
    assert found.folder == tmp_path / "m-FP8"
    assert found.rows


@pytest.mark.env("MINIGRPO_COMPRESSOR")
def test_a_folder_that_is_not_the_model_is_kept_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_folder(tmp_path / "m", "qwen2", **SIZE)

    def swapped(self: Compressor, model: Path, folder: Path, scheme: Scheme, ignored: Any) -> None:
        shutil.copytree(write_packed(model, tmp_path / "wrong", scheme.name, swap_layers), folder, dirs_exist_ok=True)

    monkeypatch.setattr(Compressor, "make", swapped)
    with pytest.raises(ArtifactError, match=r"model.layers.0.self_attn.o_proj: "):
        compress(tmp_path / "m", [SCHEMES["FP8"]], quiet=True)
    assert (tmp_path / "m-FP8.rejected" / "config.json").is_file()
    assert not (tmp_path / "m-FP8").exists()
