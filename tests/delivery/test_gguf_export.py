"""Export: a file gets its name only if llama.cpp's output for it is the merged model's."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigrpo.cli import main
from minigrpo.delivery.gguf import export as exporting
from minigrpo.delivery.gguf import llamacpp
from minigrpo.delivery.gguf import writer as gguf_writer
from minigrpo.delivery.gguf.converter import Converter
from minigrpo.delivery.gguf.export import export, parse_formats
from minigrpo.delivery.gguf.parity import GgufReference, gguf_reference, prove_file
from minigrpo.delivery.gguf.quantize import choose_tensor_type
from minigrpo.delivery.parity.kl import OTHER_TEXTS
from minigrpo.errors import ArtifactError, MinigrpoError, ModelError
from minigrpo.models.embedded import seedling
from minigrpo.runs.rundir import RunDir
from tests.helpers.delivered import FAMILIES, edit_json
from tests.helpers.exported import bpe_tokenizer, merged_run, model_folder
from tests.helpers.marks import rest_is_long

pytestmark = pytest.mark.extra("gguf")


def exported(path: Any, *formats: str, **options: Any) -> dict[str, Any]:
    found = export(path, formats, quiet=True, **{"writer": "own", **options})
    return {file.format: file for file in found.files}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Return a merged run. Read only; each test exports into another folder."""
    return merged_run(tmp_path_factory.mktemp("qwen") / "mine", "qwen2")


@pytest.mark.parametrize("family", rest_is_long(FAMILIES, "qwen2", "ministral3"))
def test_llama_cpp_says_of_each_family_what_the_merged_model_says(tmp_path: Path, family: str) -> None:
    run = merged_run(tmp_path / "mine", family, tied=family in ("qwen2", "ministral3"))
    found = exported(run, "F32", "F16", "Q8_0")
    assert {file.verdict for file in found.values()} == {"proved"}
    assert found["F32"].proof["greatest"] < 1e-4
    assert found["F32"].proof["mean_kl"] < 1e-8
    assert found["F16"].proof["mean_kl"] < 2e-5
    assert found["Q8_0"].proof["relative_kl"] < 0.1
    assert found["F32"].bits == 32
    assert 8.5 <= found["Q8_0"].bits < 9
    rows = {row["name"]: row for row in json.loads(run.parity.read_text())["stages"]}
    stages = ("base", "merged", "gguf F32", "gguf F16", "gguf Q8_0")
    assert {name + texts for name in stages for texts in ("", OTHER_TEXTS)} == rows.keys()
    assert sorted(file.name for file in run.gguf.iterdir() if file.suffix == ".gguf") == [
        "mine-F16.gguf",
        "mine-F32.gguf",
        "mine-Q8_0.gguf",
    ]


def test_a_bfloat16_model_is_exported_without_a_visible_copy_in_floats_that_nobody_asked_for(tmp_path: Path) -> None:
    model_folder(tmp_path / "m", "qwen3", dtype=torch.bfloat16)
    found = exported(tmp_path / "m", "Q4_K_M")["Q4_K_M"]
    assert found.verdict == "measured"
    names = {file.name for file in found.file.parent.iterdir()}
    assert names == {"m-Q4_K_M.gguf", "m-Q4_K_M.Modelfile", "made.json", ".m-BF16.kept"}
    assert found.types["Q5_0"] > 0  # rows of 32 are no multiple of 256
    assert "Q4_K" not in found.types


def swap_layers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    changed = {
        name: tensors[name.replace(".0.", ".x.").replace(".1.", ".0.").replace(".x.", ".1.")].clone()
        for name in tensors
    }
    save_file(changed, folder / "model.safetensors", {"format": "pt"})


def change_rope_theta(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    rope = {**config["rope_parameters"], "rope_theta": 500.0}
    edit_json(folder / "config.json", rope_parameters=rope, rope_theta=500.0)


def drop_attention_scale(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", rope_parameters={**config["rope_parameters"], "llama_4_scaling_beta": 0.0})


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, GgufReference]]:
    found = {}
    for family in ("llama", "ministral3"):
        folder = tmp_path_factory.mktemp("truth") / family
        model_folder(folder, family)
        found[family] = folder, gguf_reference(folder, None)
    return found


@pytest.mark.parametrize(
    ("family", "fault"),
    [
        ("llama", swap_layers),
        ("llama", change_rope_theta),
        ("ministral3", change_rope_theta),
        ("ministral3", drop_attention_scale),
    ],
)
@pytest.mark.parametrize("kind", ["F32", "BF16"])
def test_a_file_with_other_weights_or_settings_fails(
    tmp_path: Path, references: Any, family: str, fault: Any, kind: str
) -> None:
    folder, reference = references[family]
    wrong = shutil.copytree(folder, tmp_path / "wrong")
    fault(wrong)
    for source, fine in ((folder, True), (wrong, False)):
        gguf_writer.write_gguf(source, tmp_path / "x.gguf", kind, "x")
        assert prove_file(tmp_path / "x.gguf", kind, reference).ok is fine


@pytest.mark.parametrize("family", ["llama", "ministral3"])
def test_a_file_without_the_permutation_of_q_and_k_fails(
    tmp_path: Path, references: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reference = references[family]
    monkeypatch.setattr(gguf_writer, "_permuted", lambda values, *others: values)
    gguf_writer.write_gguf(folder, tmp_path / "x.gguf", "F32", "x")
    proof = prove_file(tmp_path / "x.gguf", "F32", reference)
    assert "written wrongly" in proof.faults[0]


def test_nothing_is_made_from_a_float_file_that_is_wrong_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_folder(tmp_path / "m", "llama")
    monkeypatch.setattr(gguf_writer, "_permuted", lambda values, *others: values)
    found = exported(tmp_path / "m", "Q8_0", "Q4_K_M")
    assert {file.verdict for file in found.values()} == {"rejected"}
    assert all("written wrongly" in file.proof["faults"][0] for file in found.values())
    assert [file.name for file in (tmp_path / "m-gguf").iterdir()] == ["m-F32.gguf.rejected"]


def test_a_file_of_the_base_without_the_adapter_fails(qwen: RunDir, tmp_path: Path) -> None:
    reference = gguf_reference(qwen.merged, qwen)
    for kind in ("F32", "F16"):
        gguf_writer.write_gguf(qwen.path.with_name("mine-base"), tmp_path / "x.gguf", kind, "x")
        assert not prove_file(tmp_path / "x.gguf", kind, reference).ok


def test_a_format_coarser_than_what_was_learned_is_kept_as_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = merged_run(tmp_path / "young", "qwen2", size=0.001)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main.main(["export", "young", "--format", "F32,q8_0", "--writer", "own", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert ended.value.code == 1
    assert [file["verdict"] for file in told["files"]] == ["proved", "rejected"]
    assert "train longer" in told["files"][1]["proof"]["faults"][0]
    assert (run.gguf / "young-Q8_0.gguf.rejected").is_file()
    assert not (run.gguf / "young-Q8_0.gguf").exists()


def test_a_coarse_file_that_undoes_more_than_training_did_is_called_unusable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = merged_run(tmp_path / "young", "qwen2", size=0.001)
    for verdict in ("measured", "there already"):
        file = exported(run, "Q4_K_M")["Q4_K_M"]
        assert (file.verdict, file.to_dict()["unusable"]) == (verdict, file.unusable)
        assert file.proof["relative_kl"] > 1
        assert "times as far as training did. Take Q8_0, or pack it with an importance matrix" in (file.unusable or "")
    with pytest.raises(SystemExit) as ended:
        main.main(["export", str(run.path), "--format", "Q4_K_M", "--writer", "own"])
    printed = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert "young-Q4_K_M.gguf is unusable: rounding to Q4_K_M" in printed
    assert "measured" not in printed


def test_an_export_goes_on_where_it_was_stopped(qwen: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = exported(qwen, "F32", out=out)["F32"]
    (out / ".mine-F16.new.999999.draft").write_text("half")
    again = exported(qwen, "F32", "F16", out=out)
    assert [again[kind].verdict for kind in ("F32", "F16")] == ["there already", "proved"]
    assert again["F32"].proof == first.proof
    (out / "mine-F16.gguf").unlink()
    assert exported(qwen, "F16", out=out)["F16"].verdict == "proved"
    with (out / "mine-F32.gguf").open("ab") as stream:
        stream.write(b"!")
    with pytest.raises(ArtifactError, match=r"mine-F32.gguf was put there or changed.*--force"):
        exported(qwen, "F32", out=out)
    assert exported(qwen, "F32", out=out, force=True)["F32"].verdict == "proved"


def test_formats_asked_for_one_by_one_are_made_from_one_float_file(
    qwen: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted: list[str] = []
    convert = Converter.convert

    def counting(self: Converter, folder: Path, file: Path, kind: str, name: str) -> None:
        converted.append(kind)
        convert(self, folder, file, kind, name)

    monkeypatch.setattr(Converter, "convert", counting)
    out = tmp_path / "out"
    for kind in ("Q8_0", "Q4_K_M", "Q5_K_M"):
        assert exported(qwen, kind, out=out)[kind].verdict in ("proved", "measured")
    assert converted == ["F32"]
    kept = out / ".mine-F32.kept"
    assert kept.is_file()
    raw = kept.read_bytes()
    kept.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))  # changed by somebody: made again
    exported(qwen, "Q6_K", out=out)
    assert converted == ["F32", "F32"]
    exported(qwen, "F32", out=out)
    assert not kept.exists()  # the one that was asked for takes its place
    exported(qwen, "Q3_K_M", out=out)
    assert converted == ["F32"] * 3


def test_three_commands_convert_and_prove_the_embedded_models_float_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blueprint = seedling.parse_blueprint("seedling", seed=0)
    tokenizer = seedling.train_tokenizer(blueprint)
    seedling.init_model(blueprint, tokenizer).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    converted, proved = list[str](), list[str]()
    convert, prove = Converter.convert, exporting.prove_file

    def converting(self: Converter, folder: Path, file: Path, kind: str, name: str) -> None:
        converted.append(kind)
        convert(self, folder, file, kind, name)

    def proving(file: Path, kind: str, reference: GgufReference) -> Any:
        proved.append(kind)
        return prove(file, kind, reference)

    monkeypatch.setattr(Converter, "convert", converting)
    monkeypatch.setattr(exporting, "prove_file", proving)
    for kind in ("Q8_0", "Q4_K_M", "Q5_K_M"):
        with pytest.raises(SystemExit) as ended:
            main.main(["export", str(tmp_path / "m"), "--format", kind, "--writer", "own"])
        assert ended.value.code == 0
    assert converted == ["F32"]
    assert proved == ["F32", "Q8_0", "Q4_K_M", "Q5_K_M"]
    assert (tmp_path / "m-gguf" / ".m-F32.kept").is_file()


def test_an_export_replaces_nothing_but_an_export(qwen: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("mine-F32.gguf", "mine-F32.Modelfile", "made.json"):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (out / name).write_text("{}")
        for force in (False, True):
            with pytest.raises(ArtifactError, match=rf"{name} was not written by minigrpo export.*--out FOLDER"):
                exported(qwen, "F32", out=out, force=force)
        assert [(file.name, file.read_text()) for file in out.iterdir()] == [(name, "{}")]


@pytest.mark.parametrize("place", ["", "merged", "adapter", "checkpoints/000001", "adapter/new"])
def test_no_export_lies_among_the_files_of_a_run_or_a_model(qwen: RunDir, tmp_path: Path, place: str) -> None:
    before = {file: file.read_bytes() for file in qwen.path.rglob("*") if file.is_file()}
    model_folder(tmp_path / "m", "qwen2")
    for model in (qwen, tmp_path / "m"):
        with pytest.raises(ArtifactError, match="which no export may touch"):
            exported(model, "F32", out=qwen.path / place, force=True)
    with pytest.raises(ArtifactError, match="which no export may touch"):
        exported(tmp_path / "m", "F32", out=tmp_path / "m")
    assert {file: file.read_bytes() for file in qwen.path.rglob("*") if file.is_file()} == before


def test_a_model_that_has_changed_is_exported_again(tmp_path: Path) -> None:
    model_folder(tmp_path / "m", "llama")
    assert exported(tmp_path / "m", "F16")["F16"].verdict == "proved"
    assert exported(tmp_path / "m", "F16")["F16"].verdict == "there already"
    swap_layers(tmp_path / "m")
    assert exported(tmp_path / "m", "F16")["F16"].verdict == "proved"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "mamba"}, "the architecture 'mamba' is none of"),
        ({"use_sliding_window": True}, "sliding window"),
        ({"hidden_act": "gelu"}, "gelu for silu"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "'longrope'"),
    ],
)
def test_what_our_writer_does_not_know_is_refused_by_name(
    tmp_path: Path, change: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIGRPO_CACHE", str(tmp_path / "cache"))
    model_folder(tmp_path / "m", "qwen2")
    edit_json(tmp_path / "m" / "config.json", **change)
    for writer in ("own", "auto"):
        with pytest.raises(ModelError, match=told):
            exported(tmp_path / "m", "F16", writer=writer)
    assert not (tmp_path / "m-gguf").exists()


def test_a_tokenizer_with_an_unknown_split_pattern_is_refused(tmp_path: Path) -> None:
    model_folder(tmp_path / "m", "qwen2")
    bpe_tokenizer(r"\p{L}+|\p{N}+|.").save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match="no pre-tokenizer that is known to cut"):
        exported(tmp_path / "m", "F16")
    assert not list((tmp_path / "m-gguf").iterdir())


def test_misspelled_formats_and_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    assert parse_formats(["q8_0,F16", "Q8_0"]) == ["F16", "Q8_0"]
    with pytest.raises(MinigrpoError, match=r"Q8 is not known. There are: F32"):
        parse_formats(["Q8"])
    with pytest.raises(ArtifactError, match="neither a run's folder nor a model's"):
        exported(tmp_path, "F16")
    model_folder(tmp_path / "m", "qwen2")
    with pytest.raises(ArtifactError, match=r"holds no convert_hf_to_gguf.py"):
        exported(tmp_path / "m", "F16", llama_cpp=tmp_path, writer="official")


def test_without_xllamacpp_the_pip_line_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(llamacpp, "find_library", lambda: None)
    with pytest.raises(MinigrpoError, match=r"pip install 'minigrpo\[gguf\]'"):
        exported(tmp_path, "F16")


WIDTH = 896
"""Width of Qwen2.5-0.5B: no multiple of 256."""


@pytest.mark.parametrize(
    ("name", "shape", "kind", "expected"),
    [
        ("token_embd.weight", (1000, WIDTH), "Q4_K_M", "Q8_0"),
        ("blk.5.attn_q.weight", (WIDTH, WIDTH), "Q4_K_M", "Q5_0"),
        ("blk.0.attn_v.weight", (128, WIDTH), "Q4_K_M", "Q8_0"),
        ("blk.3.ffn_down.weight", (WIDTH, 4864), "Q4_K_M", "Q4_K"),
        ("blk.5.ffn_down.weight", (WIDTH, 4864), "Q4_K_M", "Q6_K"),
        ("blk.23.ffn_down.weight", (WIDTH, 4864), "Q4_K_M", "Q6_K"),
        ("blk.5.attn_norm.weight", (WIDTH,), "Q4_K_M", None),
        ("blk.5.attn_q.bias", (WIDTH,), "Q4_K_M", None),
        ("blk.5.attn_q.weight", (WIDTH, 40), "Q4_K_M", "F16"),
        ("token_embd.weight", (1000, 1024), "Q4_K_M", "Q6_K"),
        ("blk.1.ffn_down.weight", (1024, 1024), "Q8_0", "Q8_0"),
        ("blk.3.attn_v.weight", (1024, 1024), "Q4_K_S", "Q5_K"),
    ],
)
def test_each_tensor_gets_the_type_that_llama_cpp_gives_it(
    name: str, shape: tuple[int, ...], kind: str, expected: str | None
) -> None:
    assert choose_tensor_type(name, shape, kind, layers=24, tied=True) == expected


def test_bits_a_weight_count_everything_in_the_file(qwen: RunDir, tmp_path: Path) -> None:
    import gguf

    found = exported(qwen, "Q4_K_M", out=tmp_path)["Q4_K_M"]
    tensors = gguf.GGUFReader(found.file).tensors
    assert math.isclose(found.bits, 8 * sum(t.data.nbytes for t in tensors) / sum(int(t.n_elements) for t in tensors))
    assert found.bits > 6  # a model this narrow falls back to larger types
