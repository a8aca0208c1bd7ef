"""Helpers of the tests of policy and engines: a policy over a tiny model, groups with made-up rewards, float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minigrpo.config.schema import AdapterConfig
from minigrpo.models.loading import LoadedModel
from minigrpo.models.lora import add_lora
from minigrpo.models.policy import Policy
from minigrpo.types import Completion, Grade, Group, Prompt, Rendered
from tests.helpers.tiny import build_model, build_tokenizer, enliven, tiny_config

DEFAULT_WORDS = "You are small."
# As the published template does: words of its own where no system message is given, and [/INST] opens the answer.
OWN_WORDS = (
    "{% if messages[0]['role'] == 'system' %}[S]{{ messages[0]['content'] }}[/S]{% set rest = messages[1:] %}"
    "{% else %}[S]" + DEFAULT_WORDS + "[/S]{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}"
    "{% elif m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def make_policy(
    arch: str = "qwen2", *, lora: float | None = 0.02, dropout: float = 0.0, double: bool = False, **config: Any
) -> Policy:
    """Build a policy over a tiny model.

    `lora`: size of the entries of B (None: no adapter). `double`: everything in float64, norms too.
    """
    model = build_mistral3(**config) if arch == "mistral3" else build_model(arch, **config)
    policy = Policy(LoadedModel(model, build_tokenizer(), "tiny"), temperature=0.9, seed=1)
    if lora is not None:
        policy.model.requires_grad_(False)
        policy.model, policy.dropouts = add_lora(policy.model, AdapterConfig(rank=8, alpha=16, dropout=dropout), seed=1)
        set_lora(policy, lora)
    if double:
        policy.model.double()
        norms_in_float64(policy.model)
    return policy


def mistral3_config(*, text: str = "ministral3", tied: bool = True, **overrides: Any) -> Any:
    """Return the config of a text model beside a vision tower with the same layer names. `tied`: head and embedding."""
    from transformers import Mistral3Config, PixtralVisionConfig

    tower = PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=16,
        image_size=28,
        patch_size=14,
    )
    inside = tiny_config(text, tie_word_embeddings=tied, **overrides)
    return Mistral3Config(text_config=inside, vision_config=tower, tie_word_embeddings=tied)


def build_mistral3(seed: int = 0, **options: Any) -> Any:
    """Build a tiny model of an architecture that also reads images."""
    from transformers import Mistral3ForConditionalGeneration

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: Any = Mistral3ForConditionalGeneration(mistral3_config(**options)).float()
        for name, weight in model.named_parameters():
            enliven(name, weight)
        ids_BT = torch.randint(4, 260, (8, 64))
        model.get_decoder().norm.weight.mul_(3.0 / model(ids_BT).logits.std())
    return model.eval()


def mistral3_folder(path: Path, **options: Any) -> Path:
    build_mistral3(**options).save_pretrained(path)
    build_tokenizer(OWN_WORDS).save_pretrained(path)
    return path


def set_lora(policy: Policy, size: float, seed: int = 5) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=draw) * size)


def norms_in_float64(model: torch.nn.Module) -> None:
    """Compute norms in float64: the library's RMSNorm casts to float32, which would hide differences below 1e-7."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = forward.__get__(module)


def made_up_groups(
    prompts: Sequence[int] = (9, 1, 40), lengths: Sequence[Sequence[int]] = ((5, 1, 12), (7, 60, 2), (3, 4, 30))
) -> list[Group]:
    """Make groups of random tokens with the given prompt and completion lengths; no two rewards tie."""
    draw = torch.Generator().manual_seed(3)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, 260, (n,), generator=draw).tolist())

    return [
        Group(
            Prompt(f"p{i}", ()),
            ids(prompt),
            tuple(Completion("", ids(n), tuple(-0.1 * k for k in range(n)), "stop") for n in own),
            tuple(Grade(float(i + j * j)) for j in range(len(own))),
        )
        for i, (prompt, own) in enumerate(zip(prompts, lengths, strict=True))
    ]


def rendered(lengths: Sequence[int] = (1, 40, 23)) -> list[Rendered]:
    draw = torch.Generator().manual_seed(4)
    return [
        Rendered(Prompt(f"p{i}", ()), tuple(torch.randint(4, 260, (n,), generator=draw).tolist()))
        for i, n in enumerate(lengths)
    ]


def gradients(policy: Policy) -> list[torch.Tensor]:
    """Return and clear the gradients of all trainable parameters."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in policy.trainable]
    for parameter in policy.trainable:
        parameter.grad = None
    return found
