"""An adapter is checked before anything is made from it: each fault is one sentence, and the figures are true."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from minigrpo.cli import main
from minigrpo.delivery.merge.check import Checked, check, checked_table
from minigrpo.errors import ArtifactError
from minigrpo.runs.rundir import RunDir, read_json
from tests.helpers.delivered import FAMILIES, VARIANTS, adapted, edit, edit_json, make_run, save_base

FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    base = tmp_path / "base"
    return make_run(tmp_path / "run", base, adapted(save_base(base, "qwen2"), base))


def adapter_file(run: RunDir) -> Path:
    return run.adapter / "adapter_model.safetensors"


def change(run: RunDir, end: str, act: Any, *, only: str = "") -> None:
    """Replace the tensors whose names end in `end` and contain `only`."""
    tensors = load_file(adapter_file(run))
    edit(adapter_file(run), **{n.replace(".", "__"): act(v) for n, v in tensors.items() if end in n and only in n})


def text_of(found: Checked) -> str:
    console = Console(width=160, file=io.StringIO())
    console.print(checked_table(found))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize("variant", ["plain", "dora", "patterns"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_adapter_passes(tmp_path: Path, family: str, variant: str) -> None:
    base = tmp_path / "base"
    run = make_run(tmp_path / "run", base, adapted(save_base(base, family), base, **VARIANTS[variant]))
    found = check(run, model=False)
    assert found.ok, found.faults
    assert len(found.facts) == 14
    assert found.effect is None
    assert read_json(run.check)["ok"] is True


def test_the_effect_on_the_base_is_measured(run: RunDir) -> None:
    found = check(run)
    assert found.ok
    assert found.effect is not None
    assert found.effect.mean_kl > 1e-4
    written = read_json(run.check)
    assert written["effect"]["mean_kl"] == found.effect.mean_kl
    assert len(written["facts"]) == 14
    assert written["made"]["verb"] == "check"
    shown = text_of(found)
    assert "sound" in shown
    assert "nats a token" in shown


def test_the_figures_of_a_layer_are_those_of_its_matrices(run: RunDir) -> None:
    change(run, "lora_A", lambda a: a.masked_fill(torch.arange(a.numel()).view(a.shape) % 4 == 0, 0.0))
    found = {fact.module: fact for fact in check(run, model=False).facts}["model.layers.0.self_attn.q_proj"]
    tensors = load_file(adapter_file(run))
    a, b = tensors[f"{FIRST}.lora_A.weight"], tensors[f"{FIRST}.lora_B.weight"]
    assert found.rank == 4
    assert found.norm_a == pytest.approx(float(a.norm()), rel=1e-5)
    assert found.norm_delta == pytest.approx(float((2 * b @ a).norm()), rel=1e-5)
    assert found.zeros == pytest.approx((a.numel() / 4) / (a.numel() + b.numel()))


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (lambda run: cut(adapter_file(run), 10), "was cut short: "),
        (lambda run: cut(adapter_file(run), 10**9), "was cut short: 0 bytes do not hold its header"),
        (lambda run: adapter_file(run).write_bytes(adapter_file(run).read_bytes()[:90]), "was cut short: 90 bytes do"),
        (lambda run: adapter_file(run).write_bytes(b"words " * 500), "is damaged: its first bytes are no safetensors"),
        (lambda run: adapter_file(run).write_bytes(b"\xff" * 500), "is damaged"),
        (lambda run: adapter_file(run).write_bytes((2).to_bytes(8, "little") + b"{}"), "holds no tensors"),
        (lambda run: adapter_file(run).unlink(), "is missing"),
        (lambda run: (run.adapter / "adapter_config.json").write_text("{"), "is damaged"),
        (lambda run: change(run, "lora_B", torch.zeros_like), "every B of the adapter is zero"),
        (lambda run: change(run, "lora_B", torch.zeros_like, only="0.self_attn.k"), "1 of 14 layers .*B of zeros"),
        (lambda run: change(run, "lora_A", lambda a: a * float("nan"), only="1.mlp"), "3 of 14 layers .*not finite"),
        (lambda run: change(run, "k_proj", lambda value: None), "2 of 14 layers .*not in the adapter"),
        (lambda run: change(run, "k_proj.lora_A", lambda value: None), "no lora_A .*half"),
        (lambda run: change(run, "lora_A", lambda a: torch.cat([a, a], 1), only="q_proj"), "is 32 x 32 there and 32 x"),
        (lambda run: change(run, "lora_A", lambda a: torch.cat([a, a]), only="q_proj"), "no pair"),
        (lambda run: change(run, "lora_B", lambda b: b * 1e-9), "with and without it .* the same prob"),
        (lambda run: shutil.rmtree(run.path.parent / "base"), "base model .* is not there"),
        (lambda run: save_base(run.path.parent / "base", "llama", num_hidden_layers=1), "is not the base of"),
        (lambda run: edit_json(run.adapter / "adapter_config.json", peft_type="LOHA"), "only LoRA"),
    ],
)
def test_what_is_wrong_is_one_sentence(run: RunDir, fault: Any, told: str) -> None:
    fault(run)
    found = check(run)
    assert not found.ok
    (sentence,) = found.faults
    assert re.search(told, sentence), sentence
    written = read_json(run.check)
    assert (written["ok"], written["faults"]) == (False, [sentence])
    assert "not fit to be used" in text_of(found)


def cut(file: Path, count: int) -> None:
    file.write_bytes(file.read_bytes()[: -min(count, file.stat().st_size)])


def test_target_modules_select_only_parts_of_the_model_that_the_adapter_changes(tmp_path: Path) -> None:
    """The vision tower of Mistral3 has layers named q_proj, too; the adapter does not mean them."""
    base = tmp_path / "base"
    run = make_run(tmp_path / "run", base, adapted(save_base(base, "mistral3"), base))
    edit_json(run.adapter / "adapter_config.json", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert check(run, model=False).ok


@pytest.mark.parametrize("limits", [{"layers_to_transform": [1]}, {"exclude_modules": ["layers.0.self_attn.q_proj"]}])
def test_layers_that_the_config_leaves_out_are_not_missed(tmp_path: Path, limits: dict[str, Any]) -> None:
    base = tmp_path / "base"
    under = adapted(save_base(base, "qwen2"), base, target_modules=["q_proj"], **limits)
    found = check(make_run(tmp_path / "run", base, under), model=False)
    assert found.ok, found.faults
    assert [fact.module for fact in found.facts] == ["model.layers.1.self_attn.q_proj"]


def test_a_run_that_trained_every_parameter_is_checked_tensor_by_tensor(tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = save_base(base, "qwen2")
    run = make_run(tmp_path / "run", base)
    model.save_pretrained(run.model)
    assert check(run, model=False).faults == ("Nothing was learned: every weight is the base's.",)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.1)
    model.save_pretrained(run.model)
    found = check(run, model=False)
    assert found.ok
    moved = [fact for fact in found.tensors if fact.unchanged < 1]
    assert [fact.name for fact in moved] == ["model.norm.weight"]
    assert moved[0].change == pytest.approx(0.1 * moved[0].norm, rel=1e-4)
    with torch.no_grad():
        model.model.norm.weight[3] = float("inf")
    model.save_pretrained(run.model)
    assert "not finite" in check(run).faults[0]


def test_checking_an_untrained_run_is_refused(run: RunDir, tmp_path: Path) -> None:
    shutil.rmtree(run.adapter)
    with pytest.raises(ArtifactError, match="trained nothing yet"):
        check(run)
    with pytest.raises(ArtifactError, match="is not there"):
        check(tmp_path / "nowhere")


def test_an_adapter_of_any_other_tool_is_checked_by_its_folder(run: RunDir) -> None:
    alone = run.adapter.rename(run.path.with_name("alone"))
    assert check(alone).ok
    edit_json(alone / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ArtifactError, match="Say which: --base MODEL"):
        check(alone)
    assert check(alone, base=str(run.path.with_name("base")), model=False).ok


@pytest.mark.parametrize("sound", [True, False])
def test_the_command_line_ends_with_one_where_something_is_wrong(
    run: RunDir, capsys: pytest.CaptureFixture[str], sound: bool
) -> None:
    if not sound:
        change(run, "lora_B", torch.zeros_like)
    with pytest.raises(SystemExit) as ended:
        main.main(["check", str(run.path), "--no-model", "--json"])
    assert int(ended.value.code or 0) == (0 if sound else 1)
    assert json.loads(capsys.readouterr().out)["ok"] is sound


def test_the_command_line_merges_and_says_where(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["merge", str(run.path), "--json"])
    assert not ended.value.code
    told = json.loads(capsys.readouterr().out)
    assert (told["verdict"], told["folder"]) == ("merged", str(run.merged))
    with pytest.raises(SystemExit):
        main.main(["merge", str(run.path)])
    assert "there already" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main.main(["merge", str(run.adapter), "--dtype", "int4"])
    assert ended.value.code == 2
