"""minigrpo's loss is TRL's loss: the same completions and rewards through both, values and gradients compared.

TRL's side is its real code from end to end: a GRPOTrainer that is handed the completions by its rollout function pads
them, computes the advantages and the reference's log-probabilities, and runs its own loss on the padded batch. Only
`old` is put in by hand, so that ratios leave 1 and clipping acts. Ours passes each prompt once and pads nothing. The
weights are float64; TRL's output head rounds to float32, whence the tolerance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="TRL is compared with where it is installed: pip install 'minigrpo[bench]'")

from minigrpo.loading import Loaded
from minigrpo.objective import OBJECTIVES, Objective
from minigrpo.packing import Part, pack
from minigrpo.policy import Policy
from minigrpo.types import Completion, Grade, Group, Prompt

TOLERANCE = 1e-5
LIMIT = 12
TEMPERATURE = 0.8
# Of unequal lengths, from one token to the limit; the second group has no two rewards alike.
LENGTHS_PG = ((1, 12, 5, 8), (7, 3, 12, 2))
REWARDS_PG = ((1.0, 0.0, 0.0, 1.0), (0.3, 0.2, 1.2, -0.5))
PROMPT_LENGTHS_P = (9, 4)


@dataclass(frozen=True)
class Settings:
    """One member of the family, in our words and in TRL's."""

    name: str
    beta: float = 0.0
    clip: tuple[float, float] | None = None

    @property
    def objective(self) -> Objective:
        objective = replace(OBJECTIVES[self.name], kl=self.beta)
        return objective if self.clip is None else replace(objective, clip_low=self.clip[0], clip_high=self.clip[1])

    @property
    def trl(self) -> dict[str, Any]:
        objective = self.objective
        return {
            "loss_type": self.name,
            "beta": self.beta,
            "epsilon": objective.clip_low,
            "epsilon_high": objective.clip_high,
            "scale_rewards": "none" if self.name == "dr_grpo" else "group",
            # TRL's default multiplies the KL by the ratio (DeepSeek-V3.2); the papers of these three do not.
            "use_bias_correction_kl": False,
        }


@dataclass(frozen=True)
class Outcome:
    loss: float
    gradients: dict[str, Tensor]
    advantages_B: Tensor


CASES = [
    Settings(name, beta, clip)
    for name in ("grpo", "dr_grpo", "dapo")
    for beta, clip in ((0.0, None), (0.04, None), (0.0, (0.1, 0.4)), (0.04, (0.1, 0.4)))
]


@pytest.fixture(scope="module")
def groups() -> tuple[Group, ...]:
    generator = torch.Generator().manual_seed(5)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, 260, (count,), generator=generator).tolist())

    made = []
    for p, (lengths_G, rewards_G) in enumerate(zip(LENGTHS_PG, REWARDS_PG, strict=True)):
        completions = tuple(Completion("", ids(n), (0.0,) * n, "stop") for n in lengths_G)
        grades = tuple(Grade(reward) for reward in rewards_G)
        made.append(Group(Prompt(f"p{p}", ()), ids(PROMPT_LENGTHS_P[p]), completions, grades))
    return tuple(made)


@pytest.fixture(scope="module")
def policy(tiny_model: Callable[..., Any], tiny_folder: Callable[..., Path], tokenizer: Any) -> Policy:
    """All parameters trained, some way from its reference, the model that lies in the folder."""
    reference = tiny_model("qwen2").double()
    model = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.03 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    policy = Policy(Loaded(model, tokenizer, str(tiny_folder("qwen2"))), temperature=TEMPERATURE, seed=0)
    policy.frozen_copy = reference
    reference.set_attn_implementation(model.config._attn_implementation)
    return policy


def ours(policy: Policy, part: Part, settings: Settings, groups: tuple[Group, ...]) -> Outcome:
    policy.model.zero_grad()
    if settings.beta:
        part = replace(part, ref_N=policy.reference(part))
    loss = settings.objective.loss(policy.logprobs(part, step=0).logprobs_N, part)
    loss.total.backward()
    gradients = {name: weight.grad.clone() for name, weight in policy.model.named_parameters()}
    return Outcome(loss.total.item(), gradients, pack(groups, settings.objective, LIMIT).advantages_PG.flatten())


def trls(policy: Policy, part: Part, settings: Settings, groups: tuple[Group, ...], folder: Path) -> Outcome:
    trainer = trl_trainer(policy, settings, groups, folder)
    rows = [{"prompt": group.prompt.id} for group in groups for _ in group.completions]
    inputs = trainer._generate_and_score_completions(rows)
    assert part.old_N is not None
    inputs["old_per_token_logps"] = padded(part.old_N, inputs["completion_mask"])
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = {name: weight.grad for name, weight in trainer.model.named_parameters()}
    return Outcome(loss.item(), gradients, inputs["advantages"])


def trl_trainer(policy: Policy, settings: Settings, groups: tuple[Group, ...], folder: Path) -> Any:
    """A GRPOTrainer of the policy's weights, whose rollouts are the groups' completions."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model = copy.deepcopy(policy.model)
    model.set_attn_implementation("sdpa")
    model.config._name_or_path = policy.path  # TRL loads its reference from there
    rewards = [reward for group in groups for reward in group.rewards]
    answers = {
        "prompt_ids": [list(group.prompt_ids) for group in groups for _ in group.completions],
        "completion_ids": [list(completion.token_ids) for group in groups for completion in group.completions],
        "logprobs": None,
    }
    config = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(rewards),
        num_generations=len(groups[0].completions),
        max_completion_length=LIMIT,
        temperature=TEMPERATURE,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        **settings.trl,
    )
    trainer = GRPOTrainer(
        model,
        reward_funcs=[lambda completions, **_: rewards],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": group.prompt.id} for group in groups]),
        processing_class=policy.tokenizer,
        rollout_func=lambda prompts, trainer: dict(answers),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def padded(values_N: Tensor, mask_BT: Tensor) -> Tensor:
    return torch.zeros(mask_BT.shape, dtype=values_N.dtype).masked_scatter(mask_BT.bool(), values_N)


def strayed(policy: Policy, groups: tuple[Group, ...], objective: Objective) -> Part:
    """The whole batch in one micro-batch; `old` lies so far from the policy that many ratios are clipped."""
    (part,) = pack(groups, objective, LIMIT).split(10_000)
    with torch.no_grad():
        now_N = policy.logprobs(part, step=0).logprobs_N
    noise_N = torch.randn(now_N.shape, generator=torch.Generator().manual_seed(2), dtype=now_N.dtype)
    return replace(part, old_N=now_N + 0.3 * noise_N)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", CASES, ids=lambda s: f"{s.name}-kl{s.beta}-clip{s.clip or ''}")
def test_loss_and_gradient_are_those_of_trl(
    settings: Settings, policy: Policy, groups: tuple[Group, ...], tmp_path: Path
) -> None:
    part = strayed(policy, groups, settings.objective)
    here, there = ours(policy, part, settings, groups), trls(policy, part, settings, groups, tmp_path)
    torch.testing.assert_close(here.advantages_B.float(), there.advantages_B, rtol=TOLERANCE, atol=TOLERANCE)
    assert here.loss == pytest.approx(there.loss, rel=TOLERANCE, abs=TOLERANCE)
    assert here.gradients.keys() == there.gradients.keys()
    whole, other = (torch.cat([g.flatten() for g in side.gradients.values()]) for side in (here, there))
    assert (whole - other).norm() <= TOLERANCE * other.norm()
    for name, gradient in here.gradients.items():
        assert (gradient - there.gradients[name]).abs().max() <= TOLERANCE * other.abs().max(), name


def test_the_comparison_reaches_what_it_should(policy: Policy, groups: tuple[Group, ...]) -> None:
    """Ratios beyond both bounds, on both sides of zero advantage, and a reference that differs."""
    objective = OBJECTIVES["dapo"]
    part = strayed(policy, groups, objective)
    with torch.no_grad():
        now_N = policy.logprobs(part, step=0).logprobs_N
        figures = objective.loss(now_N, part).figures
        gap = (policy.reference(part) - now_N).abs().mean()
    assert figures["clip_ratio/low_mean"] > 0.05
    assert figures["clip_ratio/high_mean"] > 0.05
    assert gap > 0.02
