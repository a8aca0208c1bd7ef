"""Shared by the tests of delivery: bases and adapters as the libraries save them, and a run around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from minigrpo.config.load import dump_recipe
from minigrpo.config.schema import Recipe
from minigrpo.runs.rundir import RunDir
from tests.helpers.models import build_mistral3
from tests.helpers.tiny import build_model, build_tokenizer

FAMILIES = ("qwen2", "qwen3", "llama", "ministral3", "mistral3")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"k_proj": 40}},
    "saved": {"modules_to_save": ["lm_head"]},
}
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(arch: str, *, tied: bool = False, **config: Any) -> Any:
    if arch == "mistral3":
        return build_mistral3(tied=tied, **config)
    return build_model(arch, tie_word_embeddings=tied, **config)


def save_base(folder: Path, arch: str, *, dtype: torch.dtype = torch.float32, shard: str = "1GB", **config: Any) -> Any:
    """Save a base and return the model, in float32 again."""
    model = build(arch, **config).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    build_tokenizer().save_pretrained(folder)
    return model.float()


def adapted(model: Any, base: Path, *, size: float = 0.02, seed: int = 3, **variant: Any) -> Any:
    """Return the model under a PEFT adapter in which every part matters; `size`: of the entries of B."""
    from peft import LoraConfig, get_peft_model

    layers = rf".*language_model\.(.+\.)?({'|'.join(LAYERS)})" if hasattr(model.model, "language_model") else LAYERS
    options = {"r": 4, "lora_alpha": 8, "target_modules": layers, "task_type": "CAUSAL_LM", **variant}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # PEFT draws A from the global generator, whose state depends on earlier tests
        under = get_peft_model(model, LoraConfig(**options)).eval()
    under.peft_config["default"].base_model_name_or_path = str(base)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in under.named_parameters():
            noise = torch.randn(weight.shape, generator=draw)
            if "lora_B" in name or "lora_embedding_B" in name:
                weight.copy_(noise * size)
            elif "magnitude" in name or "modules_to_save" in name:
                weight.add_(noise * 5 * size)
    return under


def save_adapter(folder: Path, under: Any) -> Path:
    under.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def make_run(folder: Path, base: Path, under: Any = None, **model: Any) -> RunDir:
    """Make a trained run: recipe and adapter."""
    run = RunDir(folder)
    run.path.mkdir(parents=True)
    recipe = Recipe(model={"path": str(base), **model}, train={"full": under is None})  # type: ignore[arg-type]
    run.recipe.write_text(dump_recipe(recipe))
    if under is not None:
        save_adapter(run.adapter, under)
    return run


def edit(file: Path, **changes: Any) -> None:
    """Change tensors of a safetensors file; None removes one."""
    tensors = {**load_file(file), **{name.replace("__", "."): value for name, value in changes.items()}}
    save_file({name: value for name, value in tensors.items() if value is not None}, file, {"format": "pt"})


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
