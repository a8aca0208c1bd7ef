"""What `merge` writes is read by transformers 4 as by transformers 5: settings, tokens, probabilities.

MINIGRPO_TRANSFORMERS4 names a python that has transformers 4.57.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minigrpo.delivery.parity.compare import load_strictly
from minigrpo.models.model_files import compatible_config, compatible_tokenizer_config
from tests.helpers.exported import bpe_tokenizer, merged_run

YARN = {"rope_type": "yarn", "rope_theta": 20000.0, "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 20000.0, "factor": 8.0, "original_max_position_embeddings": 32},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}
ASKED = [{"role": "user", "content": "it's the 12 <answer> "}]
IDS = [*range(4, 260, 3)]
"""Beyond the original context."""
READ = """
import json, sys, torch, transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, asked, ids, out = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
assert transformers.__version__.startswith("4."), transformers.__version__
tokenizer = AutoTokenizer.from_pretrained(folder)
model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
with torch.no_grad():
    logits = model.eval()(torch.tensor([ids])).logits[0]
rendered = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=True)
save_file({"logits": logits, "rendered": torch.tensor(rendered)}, out)
print(json.dumps([sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")]))
"""


@pytest.mark.long
@pytest.mark.env("MINIGRPO_TRANSFORMERS4")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("family", "rope"), [("qwen2", PLAIN), ("qwen2", YARN), ("qwen3", YARN), ("llama", LLAMA3), ("llama", PLAIN)]
)
def test_transformers_4_says_what_transformers_5_says(
    tmp_path: Path, family: str, rope: dict[str, Any], tied: bool
) -> None:
    run = merged_run(tmp_path / "mine", family, rope_parameters=dict(rope), tied=tied)
    words = [run.merged, json.dumps(ASKED), json.dumps(IDS), tmp_path / "said.safetensors"]
    read = subprocess.run(
        [os.environ["MINIGRPO_TRANSFORMERS4"], "-c", READ, *map(str, words)], capture_output=True, text=True
    )
    assert read.returncode == 0, read.stderr
    assert json.loads(read.stdout.splitlines()[-1]) == [[], [], []]
    said = load_file(tmp_path / "said.safetensors")
    with torch.no_grad():
        logits_NV = load_strictly(run.merged).eval()(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(said["logits"], logits_NV, atol=1e-3, rtol=0)
    own = bpe_tokenizer().apply_chat_template(ASKED, add_generation_prompt=True, return_dict=True)
    assert said["rendered"].tolist() == own["input_ids"]


def test_extra_special_tokens_have_the_name_that_both_know(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = bpe_tokenizer()
    run = merged_run(tmp_path / "mine", "qwen2")
    written = json.loads((run.merged / "tokenizer_config.json").read_text())
    assert written["additional_special_tokens"] == tokenizer.extra_special_tokens == ["<|im_start|>"]
    assert "extra_special_tokens" not in written
    base, merged = (AutoTokenizer.from_pretrained(path) for path in (f"{run.path}-base", run.merged))
    assert merged.extra_special_tokens == tokenizer.extra_special_tokens
    assert merged.all_special_tokens == base.all_special_tokens
    named = {"extra_special_tokens": {"image_token": "[IMG]"}, "tokenizer_class": "Qwen2Tokenizer"}
    assert compatible_tokenizer_config(named) == named
    assert compatible_tokenizer_config({"extra_special_tokens": []}) == {}


@pytest.mark.parametrize("rope", [YARN, LLAMA3])
def test_scaled_rope_settings_are_where_older_readers_look(tmp_path: Path, rope: dict[str, Any]) -> None:
    from transformers import AutoConfig

    run = merged_run(tmp_path / "mine", "llama", rope_parameters=dict(rope))
    written = json.loads((run.merged / "config.json").read_text())
    assert {**written["rope_scaling"], "rope_theta": written["rope_theta"]} == written["rope_parameters"]
    base, merged = (AutoConfig.from_pretrained(path) for path in (f"{run.path}-base", run.merged))
    assert base.rope_parameters == merged.rope_parameters
    assert compatible_config(written, None) == written
    assert "rope_scaling" not in compatible_config({"rope_parameters": PLAIN}, None)
