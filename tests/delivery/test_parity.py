"""What proves a merge, and what a merge survives: rounding, a full disk, a model larger than memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minigrpo.cli import main
from minigrpo.delivery.artifacts.merged_weights import measure_rounding
from minigrpo.delivery.artifacts.source import read_seal, source_of
from minigrpo.delivery.merge.merge import merge
from minigrpo.delivery.parity.compare import compare_texts, prove_merged, trained_reference
from minigrpo.delivery.parity.kl import MAX_KL, OTHER_TEXTS
from minigrpo.delivery.parity.texts import (
    MAX_TEXT_TOKENS,
    HeldTexts,
    ScoredText,
    StoredLogprobs,
    held_texts,
    other_texts,
)
from minigrpo.errors import ArtifactError, ModelError
from minigrpo.models.model_files import open_base
from minigrpo.runs.manifest import settle_base
from minigrpo.runs.rundir import RunDir, read_json
from tests.helpers.delivered import adapted, edit, make_run, save_adapter, save_base
from tests.helpers.marks import rest_is_long
from tests.helpers.tiny import build_tokenizer

YOUNG = 2e-5
"""Size of the entries of B after two steps of Adam at 1e-5."""


@pytest.fixture
def young(tmp_path: Path) -> RunDir:
    """Return a run with a bfloat16 base and an adapter that has hardly begun to learn."""
    base = tmp_path / "base"
    under = adapted(save_base(base, "qwen2", dtype=torch.bfloat16), base, size=YOUNG)
    return make_run(tmp_path / "run", base, under)


def log_answers(run: RunDir, *texts: str, step: int = 3) -> None:
    messages = [{"role": "user", "content": "say it"}]
    said = [{"text": text, "finish": "stop"} for text in texts]
    with run.groups.open("a") as stream:
        stream.write(json.dumps({"step": step, "prompt": "p", "messages": messages, "completions": said}) + "\n")


@pytest.mark.parametrize("family", rest_is_long(["qwen3", "mistral3"], "mistral3"))
def test_the_untouched_base_does_not_pass_and_a_good_merge_does(tmp_path: Path, family: str) -> None:
    base = tmp_path / "base"
    run = make_run(tmp_path / "run", base, adapted(save_base(base, family), base))
    source = source_of(run)
    reference = trained_reference(source, open_base(base))
    assert [row.ok for row in prove_merged(base, source, open_base(base), reference)[0]] == [True, True, False, False]
    found = merge(run, quiet=True)
    assert [row.name for row in found.stages] == ["base", "base, other texts", "merged", "merged, other texts"]
    for before, after in (found.stages[::2], found.stages[1::2]):
        assert after.mean_kl < 1e-6 * before.mean_kl
        assert after.top1 == 1


def test_16_bits_round_a_young_adapter_away_and_32_do_not(young: RunDir) -> None:
    with pytest.raises(ArtifactError, match=r"not what was trained.*of the changed weights.*--dtype float32.*longer"):
        merge(young, dtype="bfloat16", quiet=True)
    assert not young.merged.exists()
    rejected = young.path / "merged.rejected"
    assert read_seal(rejected)["dtype"] == "bfloat16"
    failed = next(row for row in read_json(young.parity)["stages"] if row["name"] == "merged")
    assert failed["relative_kl"] > 0.1
    assert not failed["ok"]
    found = merge(young, dtype="float32", quiet=True)
    assert found.verdict == "merged"
    assert [row["ok"] for row in read_json(young.parity)["stages"]] == [True] * 4


@pytest.mark.parametrize(("size", "chosen"), [(YOUNG, "float32"), (1e-3, "float16"), (0.1, "bfloat16")])
def test_auto_takes_the_first_type_that_holds_what_was_learned(tmp_path: Path, size: float, chosen: str) -> None:
    base = tmp_path / "base"
    run = make_run(tmp_path / "run", base, adapted(save_base(base, "qwen2", dtype=torch.bfloat16), base, size=size))
    found = merge(run, quiet=True)
    assert (found.dtype, found.verdict) == (chosen, "merged")
    assert {value.dtype for value in load_file(run.merged / "model.safetensors").values()} == {getattr(torch, chosen)}
    assert bool(found.notes) == (chosen != "bfloat16")
    lost = [each.lost for each in found.rounding]
    assert lost == sorted(lost, reverse=True)


def test_rounding_is_reported_as_the_share_of_changes_that_vanish(tmp_path: Path) -> None:
    from minigrpo.delivery.artifacts.merged_weights import weight_changes

    base = tmp_path / "base"
    under = adapted(save_base(base, "llama", dtype=torch.bfloat16), base, size=1e-4)
    source = source_of(save_adapter(tmp_path / "adapter", under))
    files, adapter = source.open()
    (found,) = measure_rounding(weight_changes(files, adapter), [torch.bfloat16])
    changed = total = 0
    for name, after in under.merge_and_unload().state_dict().items():
        before = load_file(base / "model.safetensors")[name]
        changed += int((after.bfloat16() != before).sum())
        total += int((after != before.float()).sum())
    assert found.lost == pytest.approx(1 - changed / total, abs=0.01)


def test_an_adapter_that_learned_nothing_is_reported(tmp_path: Path) -> None:
    base = tmp_path / "base"
    run = make_run(tmp_path / "run", base, adapted(save_base(base, "qwen2"), base, size=0.0))
    found = merge(run, quiet=True)
    assert found.verdict == "nothing was learned"
    assert "Nothing was learned" in found.notes[0]
    assert next(row for row in found.stages if row.name == "merged").relative_kl is None


def test_texts_are_the_last_step_of_the_run_then_right_answers_then_the_models_own(young: RunDir) -> None:
    log_answers(young, "early", step=2)
    log_answers(young, "one", "two")
    tokenizer = build_tokenizer()
    held = held_texts(young, None, tokenizer, 260)
    assert held is not None
    assert [tokenizer.decode(text.ids[text.start :]) for text in held.texts] == ["one<|im_end|>", "two<|im_end|>"]
    young.groups.unlink()
    source = source_of(young)
    assert trained_reference(source, open_base(Path(source.base))).held.source == "right answers of the task"
    alone = source_of(young.adapter.rename(young.path.with_name("alone")))
    own = trained_reference(alone, open_base(Path(source.base))).held
    assert own.source == "likeliest answers of the trained policy"
    assert 0 < own.texts[0].scored <= MAX_TEXT_TOKENS


def test_held_texts_stay_within_their_limits(young: RunDir) -> None:
    log_answers(young, *["x" * 1000] * 50)
    held = held_texts(young, None, build_tokenizer(), 260)
    assert held is not None
    assert sum(text.scored for text in held.texts) <= 512
    few = held_texts(young, None, build_tokenizer(), 1 << 24)
    assert few is not None
    assert sum(text.scored for text in few.texts) == 8
    young.groups.write_text("{broken\n")
    with pytest.raises(ArtifactError, match="damaged in its last line"):
        held_texts(young, None, build_tokenizer(), 260)


def test_a_full_parameter_run_is_merged_by_copying_its_weights(tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = save_base(base, "qwen2", dtype=torch.bfloat16, shard="20KB")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    run = make_run(tmp_path / "run", base)
    model.save_pretrained(run.model)
    build_tokenizer().save_pretrained(run.model)
    found = merge(run, dtype="float32", quiet=True)
    assert found.verdict == "merged"
    ours = {k: v for file in run.merged.glob("*.safetensors") for k, v in load_file(file).items()}
    assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items() if name in ours)
    assert {file.name for file in base.glob("*.safetensors")} == {f.name for f in run.merged.glob("*.safetensors")}


@pytest.mark.extra("qlora")
def test_a_4_bit_run_is_merged_into_the_16_bit_base_and_says_how_far_that_is(tmp_path: Path) -> None:
    base = tmp_path / "base"
    size = {"hidden_size": 64, "intermediate_size": 128}  # nf4 packs blocks of 64
    under = adapted(save_base(base, "qwen2", dtype=torch.bfloat16, **size), base, size=0.1)
    run = make_run(tmp_path / "run", base, under, quantize="nf4")
    found = merge(run, quiet=True)
    assert found.verdict == "merged"
    assert found.dtype == "bfloat16"
    rows = {row.name: row for row in found.stages}
    packed = rows["merged (4-bit policy)"]
    assert packed.limit is None
    assert packed.mean_kl > rows["merged"].mean_kl


def test_a_merge_whose_keys_do_not_fit_is_not_proved(young: RunDir) -> None:
    merge(young, quiet=True)
    source = source_of(young)
    edit(young.merged / "model.safetensors", model__norm__weight=None)
    files = open_base(Path(source.base))
    with pytest.raises(ModelError, match="does not load as it should: missing keys"):
        prove_merged(young.merged, source, files, trained_reference(source, files))


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_leaves_what_was_there_before(young: RunDir) -> None:
    merge(young, quiet=True, proof=False)
    kept = read_seal(young.merged)
    with no_file_larger_than(30_000), pytest.raises(ArtifactError, match=r"Nothing half-written.*minigrpo merge"):
        merge(young, dtype="float16", quiet=True, proof=False)
    assert read_seal(young.merged) == kept
    assert not list(young.path.glob(".merged*"))


def test_what_a_killed_merge_left_is_gone_after_the_next(young: RunDir) -> None:
    draft = young.path / ".merged.abc.draft"
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(b"half")
    main.app(["merge", str(young.path), "--no-proof"], standalone_mode=False)
    assert young.merged.is_dir()
    assert not draft.exists()
    assert not young.lock.exists()


def test_too_little_disk_space_is_reported_before_anything_is_written(
    young: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minigrpo.delivery.merge import merge as verb

    monkeypatch.setattr(verb, "SPARE", 1 << 60)
    with pytest.raises(ArtifactError, match=r"needs .* GB, and .* GB left. Make room"):
        merge(young, quiet=True, proof=False)
    assert not young.merged.exists()


PEAK = """
import re, sys, torch
from pathlib import Path
from minigrpo.delivery.artifacts.source import source_of
from minigrpo.delivery.artifacts.merged_weights import weight_changes, write_merged
def status(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
torch.set_num_threads(1)
files, adapter = source_of(Path(sys.argv[1])).open()
changes = weight_changes(files, adapter)
out = Path(sys.argv[2]); out.mkdir()
write_merged(files, changes, getattr(torch, sys.argv[3]), out)  # libraries are warm
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
write_merged(files, changes, getattr(torch, sys.argv[3]), out)
print(status("VmHWM") - before)
"""


@pytest.mark.needs("clear_refs")
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.long)])
def test_memory_is_bounded_by_the_largest_shard_however_many_there_are(
    tmp_path: Path, dtype: str, record_property: Any
) -> None:
    base = tmp_path / "base"
    size: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 8}
    model = save_base(base, "qwen2", dtype=torch.bfloat16, shard="16MB", **size)
    save_adapter(tmp_path / "adapter", adapted(model, base, r=16))
    shards = [file.stat().st_size for file in base.glob("*.safetensors")]
    assert len(shards) >= 8
    assert sum(shards) > 6 * max(shards)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "adapter"), str(tmp_path / "out"), dtype]
    # Each large block is mapped on its own, so peak memory is what was requested, not what the allocator kept.
    malloc = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=250, env=malloc)
    assert ended.returncode == 0, ended.stderr
    times = int(ended.stdout) / max(shards)
    record_property("times the largest shard", f"{times:.2f}")
    assert times <= 3


def test_stored_log_probabilities_are_read_as_they_were_written() -> None:
    found = [torch.randn(rows, 7).log_softmax(-1) for rows in (3, 1, 5)]
    stored = StoredLogprobs(iter(found))
    assert len(stored) == 3
    assert all(torch.equal(*pair) for pair in zip(stored, found, strict=True))
    assert torch.equal(stored[-1], found[-1])
    assert [len(each) for each in stored[1:]] == [1, 5]
    assert torch.equal(stored[1:][1:][0], found[2])
    with pytest.raises(IndexError):
        stored[3]


def test_a_proof_stands_on_two_thousand_tokens_of_other_kinds_as_well(young: RunDir) -> None:
    others = other_texts(build_tokenizer())
    assert len(others) >= 32
    assert sum(text.scored for text in others) >= 2000
    found = merge(young, quiet=True)
    elsewhere = [row for row in found.stages if row.name.endswith(OTHER_TEXTS)]
    assert [row.name for row in elsewhere] == ["base, other texts", "merged, other texts"]
    assert elsewhere[1].tokens == sum(text.scored for text in others)
    assert elsewhere[1].ceiling == MAX_KL


def test_a_stage_that_says_other_things_elsewhere_fails_although_it_is_right_on_the_tasks_texts() -> None:
    here, elsewhere = ScoredText((1, 2), 1), ScoredText((3, 4), 1)
    held = HeldTexts((here,), "", (elsewhere,))
    right, wrong = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.6, 0.4]]).log()
    row, other = compare_texts("merged", [right, wrong], [right, right], held, base_kl=1.0, limit=0.1)
    assert row.ok
    assert other is not None
    assert other.excess == "on texts of other kinds it is 0.02 nats a token from the trained policy (limit 0.01)"


def test_an_adapter_that_does_when_run_what_its_merge_does_not_is_refused(
    young: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minigrpo.delivery.parity import compare

    attach = compare.attach_adapter

    def attach_with_more(*given: Any) -> Any:
        model = attach(*given)
        layer = model.get_base_model().model.layers[0].mlp.up_proj
        layer.register_forward_hook(lambda module, inputs, out: out + 1e-3 * (out - module.base_layer(*inputs)) / YOUNG)
        return model

    monkeypatch.setattr(compare, "attach_adapter", attach_with_more)
    with pytest.raises(ArtifactError, match=r"PEFT's own merge, in float32, is .* nats a token away from the policy"):
        merge(young, dtype="float32", quiet=True)
    monkeypatch.undo()
    assert merge(young, dtype="float32", quiet=True).verdict == "merged"


def test_another_revision_of_the_base_is_refused_and_a_moved_base_is_not(young: RunDir, tmp_path: Path) -> None:
    base = Path(source_of(young).base)
    settle_base(young, str(base), open_base(base).fingerprint())
    moved = shutil.copytree(base, tmp_path / "moved")
    edit(
        base / "model.safetensors",
        model__norm__weight=1.01 * load_file(base / "model.safetensors")["model.norm.weight"],
    )
    with pytest.raises(ArtifactError, match=r"is not the one that .* began from"):
        merge(young, quiet=True)
    assert merge(young, base=str(moved), quiet=True).verdict == "merged"
