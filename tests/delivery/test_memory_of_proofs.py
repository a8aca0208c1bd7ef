"""A proof holds one model in float32 and little else: no logits that nobody asks for, no text in float64 at once."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minigrpo.delivery.parity import kl
from minigrpo.delivery.parity.kl import kl_divergence
from minigrpo.delivery.parity.texts import ScoredText, text_logprobs
from minigrpo.models.model_files import open_base
from tests.helpers.delivered import adapted, make_run, save_base
from tests.helpers.tiny import ARCHITECTURES, build_model

TEXTS = (ScoredText(tuple(range(4, 60)), 40), ScoredText(tuple(range(60, 100)), 1), ScoredText((5, 6, 7), 2))
MAX_TIMES_FLOAT32 = 2.5
"""Largest memory of merge and verify, over the model in float32: the model, its files as they are read, and the
libraries."""


class Counting(nn.Module):
    """A model that notes how many positions it gives logits for. `plain`: its forward knows no logits_to_keep."""

    def __init__(self, model: Any, plain: bool) -> None:
        super().__init__()
        self.model, self.device, self.rows = model, model.device, list[int]()
        self.forward = self._plain if plain else self._choosy

    def _plain(self, input_ids: Any, use_cache: bool) -> Any:
        return self._choosy(input_ids, use_cache)

    def _choosy(self, input_ids: Any, use_cache: bool, logits_to_keep: int = 0) -> Any:
        out = self.model(input_ids=input_ids, use_cache=use_cache, logits_to_keep=logits_to_keep)
        self.rows.append(out.logits.shape[1])
        return out


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_scored_positions_alone_get_logits_and_the_numbers_are_the_same(arch: str) -> None:
    model = build_model(arch)
    some, all_of_them = Counting(model, plain=False), Counting(model, plain=True)
    for few, whole, held in zip(text_logprobs(some, TEXTS), text_logprobs(all_of_them, TEXTS), TEXTS, strict=True):
        assert few.shape == (held.scored, 260)
        assert torch.allclose(few, whole, rtol=0, atol=1e-5)
    assert some.rows == [held.scored for held in TEXTS]
    assert all_of_them.rows == [len(held.ids) - 1 for held in TEXTS]


def test_under_an_adapter_too_scored_positions_alone_get_logits(tmp_path: Path) -> None:
    under = adapted(build_model("qwen2"), tmp_path)
    rows: list[int] = []
    under.get_output_embeddings().register_forward_hook(lambda head, given, out: rows.append(out.shape[1]))
    list(text_logprobs(under, TEXTS))
    assert rows == [held.scored for held in TEXTS]


def test_a_text_is_compared_in_blocks_and_the_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found, reference = (torch.randn(37, 50).log_softmax(-1) for _ in range(2))
    whole = kl_divergence(found, reference)
    for size in (1, 50, 51, 400):
        monkeypatch.setattr(kl, "BLOCK_ELEMENTS", size)
        assert torch.equal(kl_divergence(found, reference), whole)


WIDE = """
import gc, torch
from minigrpo.delivery.parity.kl import compare_distributions
from minigrpo.delivery.parity.texts import ScoredText, StoredLogprobs, text_logprobs
from minigrpo.utils.memory import peak_bytes, reset_peak, resident_bytes
from tests.helpers.tiny import build_model
torch.set_num_threads(1)
model = build_model("qwen2", vocab_size=80000, hidden_size=8, intermediate_size=8, tie_word_embeddings=True)
def proof(prompt):
    texts = [ScoredText(tuple(range(4, 4 + prompt + 96)), prompt)] * 2
    compare_distributions("again", text_logprobs(model, texts), StoredLogprobs(text_logprobs(model, texts)))
proof(8)  # libraries are warm
gc.collect()
reset_peak()
before = resident_bytes()
proof(400)
print(peak_bytes() - before)
"""


@pytest.mark.needs("clear_refs")
def test_with_a_large_vocabulary_a_proof_needs_a_few_texts_room_however_long_their_prompts() -> None:
    # Each large block is mapped on its own, so peak memory is what was requested, not what the allocator kept.
    malloc = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    ended = subprocess.run([sys.executable, "-c", WIDE], capture_output=True, text=True, timeout=120, env=malloc)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 5 * (96 * 80000 * 4)


GROWTH = """
import json, sys
from pathlib import Path
from minigrpo.delivery.merge.merge import merge
from minigrpo.runs.rundir import RunDir
from minigrpo.utils.memory import peak_bytes, reset_peak, resident_bytes
small, large = (RunDir(Path(path)) for path in sys.argv[1:])
merge(small, proof=False, quiet=True)  # libraries are warm
reset_peak()
before = resident_bytes()
merge(large, proof=False, quiet=True)
print(peak_bytes() - before)
"""


@pytest.mark.long
@pytest.mark.needs("clear_refs")
def test_memory_of_the_weights_proof_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    sizes: tuple[dict[str, Any], ...] = ({}, {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 12})
    runs = []
    for number, size in enumerate(sizes):
        base = tmp_path / f"base{number}"
        model = save_base(base, "qwen2", dtype=torch.bfloat16, **size)
        runs.append(make_run(tmp_path / f"run{number}", base, adapted(model, base)))
    command = [sys.executable, "-c", GROWTH, *(str(run.path) for run in runs)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 24 * (4 * 512 * 4096)  # the largest weight, in float32; the model has 40 of them


WHOLE = """
import json, sys
from pathlib import Path
from minigrpo.delivery.merge.merge import merge
from minigrpo.delivery.verify import verify
from minigrpo.runs.rundir import RunDir
from minigrpo.utils.memory import peak_bytes
run, peaks = RunDir(Path(sys.argv[1])), {}
merge(run, dtype=sys.argv[2], quiet=True)
peaks["merge"] = peak_bytes()
found = verify(run, quiet=True)
assert found.ok, found.faults
peaks["verify"] = peak_bytes()
print(json.dumps(peaks))
"""


@pytest.mark.long
@pytest.mark.env("MINIGRPO_REAL_MODEL")
@pytest.mark.needs("clear_refs")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_merge_and_verify_of_a_real_model_need_no_more_than_two_and_a_half_times_its_float32_weights(
    tmp_path: Path, dtype: str, record_property: Any
) -> None:
    from transformers import AutoModelForCausalLM

    base = Path(os.environ["MINIGRPO_REAL_MODEL"])
    run = make_run(tmp_path / "run", base, adapted(AutoModelForCausalLM.from_pretrained(base), base, size=0.02))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (run.adapter / name).unlink(missing_ok=True)  # the tests' small tokenizer: the base's own counts
    command = [sys.executable, "-c", WHOLE, str(run.path), dtype]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    assert ended.returncode == 0, ended.stderr
    size = 4 * sum(math.prod(tensor.shape) for tensor in open_base(base).tensors.values())
    for stage, peak in json.loads(ended.stdout).items():
        record_property(stage, f"{peak / 1e9:.2f} GB, {peak / size:.2f} times the weights in float32")
        assert peak <= MAX_TIMES_FLOAT32 * size, f"{stage}: {peak / 1e9:.2f} GB"
