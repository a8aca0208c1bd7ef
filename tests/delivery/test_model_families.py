"""From an adapter to GGUF files, for each model family, at the limits that the formats are documented with.

The models are random, but not like noise: as in trained ones the residual stream outweighs what a layer adds, one token
is clearly likeliest (logits of standard deviation above 2, entropy of about one nat), and weights are in 16 bits.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigrpo.delivery.gguf import writer
from minigrpo.delivery.gguf.export import export
from minigrpo.delivery.gguf.llamacpp import LlamaCpp
from minigrpo.delivery.gguf.parity import GgufProof, GgufReference, comparison_prompts, gguf_reference, prove_file
from minigrpo.delivery.gguf.pretokenizer import token_faults
from minigrpo.delivery.gguf.quantize import quantise
from minigrpo.delivery.merge.merge import merge
from minigrpo.delivery.parity.compare import find_task
from minigrpo.runs.rundir import RunDir
from tests.helpers.delivered import FAMILIES, adapted, build, make_run
from tests.helpers.exported import bpe_tokenizer
from tests.helpers.marks import rest_is_long
from tests.helpers.tiny import yarn

pytestmark = pytest.mark.extra("gguf")
KINDS = ("F32", "F16", "Q8_0")
ORIGINAL = 32
"""Ministral3's original context length in these tests: every held text is longer."""
WIDE, NARROW = ({"hidden_size": 256, "intermediate_size": 256}, {"hidden_size": 64, "intermediate_size": 128})
CASES = [(family, wide, tied) for family in FAMILIES for wide in (True, False) for tied in (False, True)]
EACH = rest_is_long(CASES, ("qwen2", True, False), ("ministral3", True, False))
"""At once: wide and untied, of one family whose q and k are permuted in GGUF files and one whose are not."""


def peaked(model: Any) -> Any:
    """Make the model's output peaked: damp what each layer adds, and make one token (the previous one, moved by
    seven ids) likeliest everywhere."""
    core, words = model.get_decoder(), model.get_input_embeddings().weight
    width = words.shape[1]
    aligned = 6 / width**0.5
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in core.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.div_(1.8)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(0.3)
        out = model.get_output_embeddings().weight
        if out is not words:
            out.copy_(words.roll(7, 0) / width**0.5)
        core.norm.weight.copy_(aligned / (1 - aligned**2) ** 0.5 + torch.randn(width, generator=draw))
        ids_BT = torch.randint(4, words.shape[0], (8, 64), generator=draw)
        core.norm.weight.mul_(2.2 / model(input_ids=ids_BT).logits.std(-1).mean())
        for weight in model.parameters():
            weight.copy_(weight.half())  # not model.half(): that would round RoPE's frequencies, too
    return model


@dataclass(frozen=True)
class Case:
    run: RunDir
    reference: GgufReference

    @property
    def base(self) -> Path:
        return self.run.path.with_name("base")


def made(folder: Path, family: str, wide: bool, tied: bool) -> Case:
    """Make a run that is trained and merged in float16."""
    tokenizer, size = bpe_tokenizer(), WIDE if wide else NARROW
    rope = {"rope_parameters": {**yarn(), "llama_4_scaling_beta": 0.5}} if family.startswith("mi") else {}
    model = peaked(build(family, vocab_size=len(tokenizer) + 1, tied=tied, **size, **rope))
    save(model, folder / "base", tokenizer)
    run = make_run(folder / "mine", folder / "base", adapted(model, folder / "base", size=0.05))
    tokenizer.save_pretrained(run.adapter)
    assert merge(run, quiet=True).dtype == "float16"
    return Case(run, gguf_reference(run.merged, run))


def save(model: Any, folder: Path, tokenizer: Any) -> None:
    """Save in float16; the model itself stays as it was."""
    for weight in model.parameters():
        weight.data = weight.data.half()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for weight in model.parameters():
        weight.data = weight.data.float()


@pytest.fixture(
    scope="module",
    params=EACH,
    ids=lambda each: f"{each[0]}-{'wide' if each[1] else 'narrow'}-{'tied' if each[2] else 'untied'}",
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, wide, tied = request.param
    return made(tmp_path_factory.mktemp("family"), family, wide, tied)


def within(kind: str, proof: GgufProof) -> bool:
    """Tell whether a proof is within its type's own limit, whatever training did: on the largest difference, or on
    the mean KL."""
    if kind == "Q8_0":
        return proof.row.mean_kl <= 1e-4
    return proof.greatest <= {"F32": 1e-4, "F16": 1e-2}[kind]


def test_every_format_keeps_its_limit(case: Case, record_property: Any) -> None:
    reference = case.reference
    assert max(float(each.std(-1).mean()) for each in reference.merged) >= 2
    assert min(len(text.ids) for text in reference.held.texts) > ORIGINAL
    found = {file.format: file for file in export(case.run, [*KINDS, "Q4_K_M"], writer="own", quiet=True).files}
    assert [found[kind].verdict for kind in (*KINDS, "Q4_K_M")] == ["proved"] * 3 + ["measured"]
    figures = {kind: found[kind].proof for kind in found}
    assert figures["F32"]["greatest"] <= 1e-4
    assert figures["F16"]["greatest"] <= 1e-2
    assert figures["Q8_0"]["mean_kl"] <= 1e-4
    assert figures["Q4_K_M"]["mean_kl"] < 0.05
    assert ("Q4_K" in found["Q4_K_M"].types) == (text_config(case.base)["hidden_size"] % 256 == 0)
    for kind, row in figures.items():
        record_property(kind, f"{row['greatest']:.2g} {row['mean_kl']:.2g} {row['relative_kl']:.2g}")


def text_config(folder: Path) -> dict[str, Any]:
    """Return the config of the text part."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return dict(config.get("text_config", config))


def test_200_prompts_have_the_same_ids_in_tokenizer_and_file(case: Case, tmp_path: Path) -> None:
    prompts = comparison_prompts(find_task(case.run), case.reference.tokenizer, 200)
    assert len(prompts) > 200
    writer.write_gguf(case.run.merged, tmp_path / "x.gguf", "F16", "x")
    with LlamaCpp(tmp_path / "x.gguf", context=64) as llama:
        assert list(token_faults(llama, case.reference.tokenizer, prompts)) == []


def text_names(tensors: dict[str, Any]) -> list[str]:
    return [name for name in tensors if "vision" not in name and "projector" not in name]


def swap_layers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    swaps = {".layers.0.": ".layers.1.", ".layers.1.": ".layers.0."}
    changed = dict(tensors)
    for name in text_names(tensors):
        for one, other in swaps.items():
            if one in name:
                changed[name] = tensors[name.replace(one, other)].clone()
    save_file(changed, folder / "model.safetensors", {"format": "pt"})


def drop_biases(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    changed = {name: value * 0 if name.endswith("proj.bias") else value for name, value in tensors.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})


def change_rope(folder: Path, **changes: Any) -> None:
    """Change RoPE parameters, where the config has them."""
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    text["rope_parameters"].update(changes)
    text.pop("rope_theta", None)
    config.pop("rope_theta", None)
    (folder / "config.json").write_text(json.dumps(config))


def mutants(case: Case, folder: Path) -> Any:
    """Yield (what is wrong, a folder whose weights or settings have that fault)."""
    family = text_config(case.run.merged)["model_type"]
    edits = {"two layers swapped": swap_layers, "wrong rope theta": lambda path: change_rope(path, rope_theta=500.0)}
    if family == "ministral3":
        edits["missing attention scale"] = lambda path: change_rope(path, llama_4_scaling_beta=0.0)
    if family == "qwen2":
        edits["dropped bias"] = drop_biases
    for name, edit in edits.items():
        wrong = shutil.copytree(case.run.merged, folder / name.replace(" ", "-"))
        edit(wrong)
        yield name, wrong
    yield "adapter left out", case.base
    if family in ("llama", "ministral3"):
        yield "missing permutation of q and k", case.run.merged


def test_every_fault_fails_every_formats_limit(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof that an export makes must refuse each of them, too."""
    passed = []
    for name, wrong in mutants(case, tmp_path):
        with monkeypatch.context() as patch:
            if "permutation" in name:
                patch.setattr(writer, "_permuted", lambda values, *others: values)
            for kind in ("F32", "F16"):
                writer.write_gguf(wrong, tmp_path / f"{kind}.gguf", kind, "x")
        quantise(tmp_path / "F16.gguf", tmp_path / "Q8_0.gguf", "Q8_0", None)
        for kind in KINDS:
            proof = prove_file(tmp_path / f"{kind}.gguf", kind, case.reference)
            if within(kind, proof) or proof.ok:
                passed.append((name, kind, proof.greatest, proof.row.mean_kl, proof.row.relative_kl))
    assert not passed
