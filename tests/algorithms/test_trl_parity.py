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

from minigrpo.algorithms.objective import OBJECTIVES, Objective
from minigrpo.algorithms.packing import MicroBatch, pack
from minigrpo.config.schema import ObjectiveConfig
from minigrpo.models.loading import LoadedModel
from minigrpo.models.policy import Policy
from minigrpo.training.top_entropy import mark_top_entropy
from minigrpo.types import Completion, Grade, Group, Prompt

pytestmark = pytest.mark.extra("bench")

TOLERANCE = 1e-5
LIMIT = 12
TEMPERATURE = 0.8
# Of unequal lengths, from one token to the limit; the second group has no two rewards alike.
LENGTHS_PG = ((1, 12, 5, 8), (7, 3, 12, 2))
REWARDS_PG = ((1.0, 0.0, 0.0, 1.0), (0.3, 0.2, 1.2, -0.5))
# Of two reward functions; the weights make their sum the rewards above. None: it does not apply there.
WEIGHTS_F = (1.0, 0.5)
SECOND_PG = ((0.0, 2.0, None, 1.0), (0.4, None, 0.0, 0.0))
PROMPT_LENGTHS_P = (9, 4)


@dataclass(frozen=True)
class Settings:
    """One objective, in our settings and in TRL's."""

    name: str
    beta: float = 0.0
    clip: tuple[float, float] | None = None
    knobs: tuple[tuple[str, Any], ...] = ()
    trls: tuple[tuple[str, Any], ...] = ()

    @property
    def objective(self) -> Objective:
        knobs = ObjectiveConfig(name=self.name, kl=self.beta, **{"importance": "off", **dict(self.knobs)})
        objective = OBJECTIVES[self.name].with_config(knobs, inexact_sampler=False)
        return objective if self.clip is None else replace(objective, clip_low=self.clip[0], clip_high=self.clip[1])

    @property
    def trl(self) -> dict[str, Any]:
        objective = self.objective
        return {
            "loss_type": {"gspo": "grpo"}.get(self.name, self.name),
            "importance_sampling_level": "sequence" if self.name == "gspo" else "token",
            "beta": self.beta,
            "epsilon": objective.clip_low,
            # TRL reads it as the cap itself for CISPO.
            "epsilon_high": objective.clip_high + (1 if self.name == "cispo" else 0),
            "scale_rewards": "none" if self.name == "dr_grpo" else "group",
            # TRL's default multiplies the KL by the ratio (DeepSeek-V3.2); the other papers do not.
            "use_bias_correction_kl": False,
            **dict(self.trls),
        }

    def __str__(self) -> str:
        words = [self.name, f"kl{self.beta}", *(f"{name}={value}" for name, value in self.knobs)]
        return "-".join([*words, f"clip{self.clip}"] if self.clip else words)


@dataclass(frozen=True)
class Outcome:
    loss: float
    gradients: dict[str, Tensor]
    advantages_B: Tensor


def option(name: str, beta: float, knobs: dict[str, Any], trl: dict[str, Any]) -> Settings:
    return Settings(name, beta, None, tuple(knobs.items()), tuple(trl.items()))


def importance(mode: str, **bounds: float) -> tuple[dict[str, Any], dict[str, Any]]:
    ours = {"importance": mode, "importance_cap": bounds["cap"], "importance_floor": bounds["floor"]}
    theirs = {
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_max": bounds["cap"],
        "vllm_importance_sampling_clip_min": bounds["floor"],
    }
    return ours, theirs


CASES = [
    *(
        Settings(name, beta, clip)
        for name in ("grpo", "dr_grpo", "dapo")
        for beta, clip in ((0.0, None), (0.04, None), (0.0, (0.1, 0.4)), (0.04, (0.1, 0.4)))
    ),
    *(Settings(name, beta) for name in ("bnpo", "gspo", "cispo", "sapo") for beta in (0.0, 0.04)),
    # Bounds that half of the sequences pass, and a cap that many tokens pass.
    *(Settings("gspo", beta, (0.03, 0.05)) for beta in (0.0, 0.04)),
    *(Settings("cispo", beta, (0.2, 0.1)) for beta in (0.0, 0.04)),
    *(
        option(name, beta, {"clip_dual": 1.3}, {"delta": 1.3})
        for name in ("grpo", "dapo", "bnpo", "dr_grpo", "gspo")
        for beta in (0.0, 0.04)
    ),
    *(
        option(name, 0.04, {"kl_unbiased": True}, {"use_bias_correction_kl": True})
        for name in ("grpo", "dapo", "gspo", "cispo")
    ),
    *(
        option(name, beta, *importance(mode, cap=1.3, floor=0.6))
        for name, beta in (("grpo", 0.0), ("dapo", 0.04), ("gspo", 0.0))
        for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    ),
    option("grpo", 0.0, {"off_policy": 0.05}, {"off_policy_mask_threshold": 0.05}),
    option(
        "dapo",
        0.04,
        {"off_policy": 0.05, **importance("token_truncate", cap=2.0, floor=0.0)[0]},
        {"off_policy_mask_threshold": 0.05, **importance("token_truncate", cap=2.0, floor=0.0)[1]},
    ),
    *(
        option(name, beta, {"entropy": 0.02}, {"entropy_coef": 0.02})
        for name in ("grpo", "dapo", "gspo")
        for beta in (0.0, 0.04)
    ),
    option("grpo", 0.0, {"top_entropy": 0.3}, {"top_entropy_quantile": 0.3}),
    option("dapo", 0.04, {"top_entropy": 0.3, "entropy": 0.02}, {"top_entropy_quantile": 0.3, "entropy_coef": 0.02}),
    option("grpo", 0.0, {"compare": "batch"}, {"scale_rewards": "batch"}),
    option("dr_grpo", 0.0, {"compare": "group"}, {"scale_rewards": "group"}),
    option("grpo", 0.0, {"compare": "gdpo"}, {"multi_objective_aggregation": "normalize_then_sum"}),
    option("grpo", 0.04, {"mask_truncated": True}, {"mask_truncated_completions": True}),
    option("dapo", 0.0, {"mask_truncated": True}, {"mask_truncated_completions": True}),
]


@pytest.fixture(scope="module")
def groups(tokenizer: Any) -> tuple[Group, ...]:
    generator = torch.Generator().manual_seed(5)

    def ids(count: int) -> tuple[int, ...]:
        # TRL knows by its last token that a completion was not cut off.
        last = () if count == LIMIT else (tokenizer.eos_token_id,)
        return (*torch.randint(4, 260, (count - len(last),), generator=generator).tolist(), *last)

    made = []
    for p, (lengths_G, rewards_G) in enumerate(zip(LENGTHS_PG, REWARDS_PG, strict=True)):
        completions = tuple(Completion("", ids(n), (0.0,) * n, "length" if n == LIMIT else "stop") for n in lengths_G)
        grades = tuple(graded(*pair) for pair in zip(rewards_G, SECOND_PG[p], strict=True))
        made.append(Group(Prompt(f"p{p}", ()), ids(PROMPT_LENGTHS_P[p]), completions, grades))
    return tuple(made)


def graded(reward: float, second: float | None) -> Grade:
    first = reward - WEIGHTS_F[1] * (second or 0.0)
    parts = {"first": first} if second is None else {"first": first, "second": second}
    return Grade(reward, parts, weights=dict(zip(("first", "second"), WEIGHTS_F, strict=True)))


@pytest.fixture(scope="module")
def policy(tiny_model: Callable[..., Any], tiny_folder: Callable[..., Path], tokenizer: Any) -> Policy:
    """Return a policy with all parameters trained, at some distance from its reference, the model in the folder."""
    reference = tiny_model("qwen2").double()
    model = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.03 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    policy = Policy(LoadedModel(model, tokenizer, str(tiny_folder("qwen2"))), temperature=TEMPERATURE, seed=0)
    policy.frozen_copy = reference
    reference.set_attn_implementation(model.config._attn_implementation)
    return policy


def ours(policy: Policy, part: MicroBatch, settings: Settings, groups: tuple[Group, ...]) -> Outcome:
    policy.model.zero_grad()
    if settings.beta:
        part = replace(part, ref_N=policy.reference(part))
    objective = settings.objective
    if objective.top_entropy < 1:
        (part,) = mark_top_entropy(policy, objective, [part], step=0)
    scores = policy.logprobs(part, step=0, entropy_learns=objective.entropy > 0)
    loss = objective.loss(scores.logprobs_N, part, scores.entropy_N)
    loss.total.backward()
    gradients = {name: weight.grad.clone() for name, weight in policy.model.named_parameters()}
    return Outcome(loss.total.item(), gradients, pack(groups, settings.objective, LIMIT).advantages_PG.flatten())


def trls(policy: Policy, part: MicroBatch, settings: Settings, groups: tuple[Group, ...], folder: Path) -> Outcome:
    trainer = trl_trainer(policy, settings, groups, folder)
    inputs = generated(trainer, groups)
    assert part.old_N is not None
    inputs["old_per_token_logps"] = padded(part.old_N, whole_mask(groups))
    return outcome(trainer, inputs)


def generated(trainer: Any, groups: tuple[Group, ...]) -> dict[str, Any]:
    return trainer._generate_and_score_completions([{"prompt": g.prompt.id} for g in groups for _ in g.completions])


def outcome(trainer: Any, inputs: dict[str, Any]) -> Outcome:
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = {name: weight.grad for name, weight in trainer.model.named_parameters()}
    return Outcome(loss.item(), gradients, inputs["advantages"])


def trl_trainer(policy: Policy, settings: Settings, groups: tuple[Group, ...], folder: Path) -> Any:
    """Return a GRPOTrainer with the policy's weights, whose rollouts are the groups' completions."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model = copy.deepcopy(policy.model)
    model.set_attn_implementation("sdpa")
    model.config._name_or_path = policy.path  # TRL loads its reference from there
    grades = [grade for group in groups for grade in group.grades]
    answers = {
        "prompt_ids": [list(group.prompt_ids) for group in groups for _ in group.completions],
        "completion_ids": [list(completion.token_ids) for group in groups for completion in group.completions],
        "logprobs": None,
    }
    if settings.objective.importance:
        answers["logprobs"] = [list(completion.logprobs) for group in groups for completion in group.completions]
    config = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(grades),
        num_generations=len(groups[0].completions),
        max_completion_length=LIMIT,
        temperature=TEMPERATURE,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        reward_weights=list(WEIGHTS_F),
        **settings.trl,
    )
    trainer = GRPOTrainer(
        model,
        reward_funcs=[
            lambda completions, **_: [grade.parts["first"] for grade in grades],
            lambda completions, **_: [grade.parts.get("second") for grade in grades],
        ],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": group.prompt.id} for group in groups]),
        processing_class=policy.tokenizer,
        rollout_func=lambda prompts, trainer: dict(answers),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    if settings.objective.importance:
        # TRL corrects for vLLM alone. There is none here, and none is needed: the rollouts are ours, nothing to sync.
        trainer.use_vllm = True
        trainer._last_loaded_step = trainer.state.global_step
    return trainer


def whole_mask(groups: tuple[Group, ...]) -> Tensor:
    lengths_B1 = torch.tensor([len(c.token_ids) for group in groups for c in group.completions])[:, None]
    return torch.arange(int(lengths_B1.max())) < lengths_B1


def padded(values_N: Tensor, mask_BT: Tensor) -> Tensor:
    return torch.zeros(mask_BT.shape, dtype=values_N.dtype).masked_scatter(mask_BT.bool(), values_N)


def strayed(policy: Policy, groups: tuple[Group, ...], objective: Objective) -> MicroBatch:
    """Return the batch as one micro-batch; `old` is so far from the policy that many ratios are clipped."""
    (part,) = pack(groups, objective, LIMIT).split(10_000)
    with torch.no_grad():
        now_N = policy.logprobs(part, step=0).logprobs_N
    noise_N = torch.randn(now_N.shape, generator=torch.Generator().manual_seed(2), dtype=now_N.dtype)
    return replace(part, old_N=now_N + 0.3 * noise_N)


def sampled(policy: Policy, groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Return the same completions with the log-probabilities of a sampler that differs from the policy."""
    (part,) = pack(groups, OBJECTIVES["grpo"], LIMIT).split(10_000)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        now_N = policy.logprobs(part, step=0).logprobs_N
    reported_N = now_N + 0.15 * torch.randn(now_N.shape, generator=draw, dtype=now_N.dtype)
    told = iter(reported_N.split(part.lengths))
    return tuple(
        replace(group, completions=tuple(replace(c, logprobs=tuple(next(told).tolist())) for c in group.completions))
        for group in groups
    )


def strayed_with_trl(
    policy: Policy, settings: Settings, groups: tuple[Group, ...], folder: Path
) -> tuple[MicroBatch, Outcome]:
    """As `strayed`, for importance weights, which TRL computes while it generates, with other weights than the loss."""
    trainer = trl_trainer(policy, settings, groups, folder)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight += 0.005 * torch.randn(weight.shape, generator=draw, dtype=weight.dtype)
    inputs = generated(trainer, groups)
    trainer.model.load_state_dict(policy.model.state_dict())
    (part,) = pack(groups, settings.objective, LIMIT).split(10_000)
    assert inputs["importance_sampling_ratio"].std() > 0.1  # weights that all agree would show nothing
    old_N = inputs["old_per_token_logps"][whole_mask(groups)]
    return replace(part, old_N=old_N.double()), outcome(trainer, inputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_loss_and_gradient_are_those_of_trl(
    settings: Settings, policy: Policy, groups: tuple[Group, ...], tmp_path: Path
) -> None:
    if settings.objective.importance:
        groups = sampled(policy, groups)
        part, there = strayed_with_trl(policy, settings, groups, tmp_path)
    else:
        part = strayed(policy, groups, settings.objective)
        there = trls(policy, part, settings, groups, tmp_path)
    here = ours(policy, part, settings, groups)
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
