"""Mistral3: the text model inside is trained and sampled from as if it stood alone; the vision tower stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minigrpo.algorithms.objective import OBJECTIVES
from minigrpo.algorithms.packing import pack
from minigrpo.config.load import dump_recipe
from minigrpo.config.schema import AdapterConfig, ModelConfig, Recipe, RolloutConfig, SaveConfig, TrainConfig
from minigrpo.errors import ModelError, RecipeError
from minigrpo.models.chat_template import render
from minigrpo.models.context_window import context_length
from minigrpo.models.loading import LoadedModel, open_model
from minigrpo.models.lora import add_lora
from minigrpo.models.policy import Policy, open_policy, open_trained, recompute_activations
from minigrpo.models.quantize import quantize_four_bit
from minigrpo.rollouts.engines.decoder import decoder_supports
from minigrpo.rollouts.engines.native import NativeEngine
from minigrpo.rollouts.engines.registry import open_engine
from minigrpo.rollouts.engines.transformers import TransformersEngine
from minigrpo.runs.logger import RunLogger
from minigrpo.runs.rundir import RunDir
from minigrpo.training import checkpoint
from minigrpo.training.grpo import accumulate_gradient, grpo
from minigrpo.training.memory.planner import Device, make_plan
from minigrpo.types import Grade, Group, Prompt, Sampling, Task
from tests.helpers.models import (
    DEFAULT_WORDS,
    build_mistral3,
    gradients,
    made_up_groups,
    make_policy,
    mistral3_config,
    mistral3_folder,
    rendered,
    set_lora,
)
from tests.helpers.tiny import build_tokenizer

CPU = torch.device("cpu")
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tied: bool) -> Path:
    return mistral3_folder(tmp_path_factory.mktemp("models") / "mistral3", tied=tied)


def opened(path: Path) -> Any:
    return open_model(str(path), revision=None, dtype=torch.float32, device=CPU)


def other_weights(model: Any) -> dict[str, bytes]:
    """Return the weights that belong neither to the text model nor to the head."""
    return {n: p.detach().numpy().tobytes() for n, p in model.named_parameters() if "vision" in n or "projector" in n}


def recipe_for(path: Path, steps: int = 4, **train: Any) -> Recipe:
    return Recipe(
        model=ModelConfig(path=str(path)),
        lora=AdapterConfig(rank=8, alpha=16),
        rollout=RolloutConfig(prompts=3, completions=4, max_tokens=8),
        train=TrainConfig(steps=steps, lr=2e-2, tokens_per_pass=120, **train),
        save=SaveConfig(every=2),
    )


def letters() -> Task:
    """Reward the share of lower-case letters. Even random weights can learn it."""

    def prompts(split: str) -> list[Prompt]:
        return [Prompt(f"{split}-{i}", ({"role": "user", "content": f"say {i}"},)) for i in range(20)]

    def grade(prompt: Prompt, text: str) -> Grade:
        share = sum(letter.islower() for letter in text) / 8
        return Grade(share, {"small": share}, formed=len(text) > 1, solved=share > 0.1)

    return Task("letters", prompts, grade)


def train(recipe: Recipe, run: RunDir) -> Policy:
    policy = open_policy(recipe)
    run.path.mkdir(exist_ok=True)
    grpo(recipe, letters(), policy, open_engine(policy, recipe), RunLogger(run, recipe.train.steps))
    return policy


def test_a_folder_opens_with_its_text_model_its_tower_and_its_tie(folder: Path, tied: bool) -> None:
    loaded, made = opened(folder), build_mistral3(tied=tied)
    assert type(loaded.model).__name__ == "Mistral3ForConditionalGeneration"
    pairs = zip(loaded.model.named_parameters(), made.named_parameters(), strict=True)
    assert all(mine == name and torch.equal(p, q) for (mine, p), (name, q) in pairs)
    assert (loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight) == tied
    assert context_length(loaded.model) == 512


def test_a_config_that_is_wrong_about_its_tie_yields_to_the_weights(tmp_path: Path) -> None:
    """The outer config says that weights are tied unless told otherwise, whatever the text model's says."""
    path = mistral3_folder(tmp_path / "model", tied=False)
    config = json.loads((path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (path / "config.json").write_text(json.dumps(config))
    model = opened(path).model
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert torch.equal(model.get_output_embeddings().weight, build_mistral3(tied=False).get_output_embeddings().weight)


@pytest.mark.parametrize(
    ("told", "name", "other"),
    [
        ({"quant_method": "fp8", "activation_scheme": "static"}, "small", "small-BF16"),
        ({"quant_method": "fbgemm_fp8"}, "small-FP8", "small"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "small-FP8", "small"),
    ],
)
def test_weights_in_fp8_are_refused_before_they_are_read(tmp_path: Path, told: Any, name: str, other: str) -> None:
    path = tmp_path / name
    mistral3_config().save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    (path / "model.safetensors").write_bytes(b"never read")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
    with pytest.raises(ModelError, match=f"FP8.*BF16.*{tmp_path / other}$"):
        opened(path)


@pytest.mark.parametrize("targets", ["all-linear", ",".join(sorted(LAYERS))])
def test_an_adapter_is_on_the_text_models_layers_and_nowhere_else(targets: str) -> None:
    model, _ = add_lora(build_mistral3(), AdapterConfig(rank=4, targets=targets), seed=1)
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert {name.rsplit(".", 1)[-1] for name in adapted} == LAYERS
    assert len(adapted) == 14
    assert all("language_model.layers" in name for name in adapted)


@pytest.mark.parametrize(("targets", "told"), [("q_proj, lm_head", "output head"), ("linear_1", "Those are: d")])
def test_the_head_and_the_projector_are_refused_as_targets(targets: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        add_lora(build_mistral3(), AdapterConfig(rank=4, targets=targets), seed=1)


def theirs(policy: Policy, group: Group, sibling: int) -> torch.Tensor:
    """Return log-probabilities from transformers' own forward pass over one text, head included."""
    answer = group.completions[sibling].token_ids
    ids = torch.tensor([[*group.prompt_ids, *answer]])
    with policy.plain_attention(), torch.no_grad():
        logits_TV = policy.model(input_ids=ids, use_cache=False).logits[0, len(group.prompt_ids) - 1 : -1]
    return (logits_TV / policy.temperature).log_softmax(-1)[torch.arange(len(answer)), list(answer)]


def one_micro_batch(groups: list[Group]) -> Any:
    (part,) = pack(groups, OBJECTIVES["grpo"], 60).split(1 << 30)
    return part


@pytest.mark.parametrize("text", ["ministral3", "mistral"])
def test_shared_prompts_score_as_transformers_own_forward_does(text: str, tied: bool) -> None:
    """In float64, with texts of up to 100 tokens where the original context is 32."""
    policy, groups = make_policy("mistral3", text=text, tied=tied, double=True), made_up_groups()
    assert policy.shares_prompts
    part = one_micro_batch(groups)
    found_N = policy.logprobs(part, step=0).logprobs_N.detach()
    wanted_N = torch.cat([theirs(policy, groups[packed.index], s) for packed in part.groups for s in packed.siblings])
    torch.testing.assert_close(found_N, wanted_N, rtol=0, atol=1e-11)


@pytest.mark.parametrize("recompute", [False, True])
def test_shared_prompts_have_the_gradients_of_padded_rows(recompute: bool) -> None:
    policy, part = make_policy("mistral3", double=True), one_micro_batch(made_up_groups())
    accumulate_gradient(policy, OBJECTIVES["grpo"], [part], step=0)
    shared = gradients(policy)
    if recompute:
        recompute_activations(policy.model)
    with policy.plain_attention():
        policy.shares_prompts = False
        accumulate_gradient(policy, OBJECTIVES["grpo"], [part], step=0)
    assert max(float(g.abs().max()) for g in shared) > 1e-4
    for mine, own in zip(shared, gradients(policy), strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lora", [None, 1e-3, 0.02])
def test_the_native_engine_samples_from_the_text_model(lora: float | None, tied: bool) -> None:
    """Prompts of up to 40 tokens and answers of 50: three times the original context of 32."""
    policy = make_policy("mistral3", lora=lora, tied=tied)
    engine = open_engine(policy, Recipe())
    assert isinstance(engine, NativeEngine)
    engine = NativeEngine(policy, stop_ids=[3, 17, 50, 60], rows=256)
    answers = engine.generate(rendered(), 4, Sampling(0.9, 50, 7))
    assert max(len(p.ids) + len(c.token_ids) for p, own in zip(rendered(), answers, strict=True) for c in own) > 64
    grades = tuple(Grade(float(i)) for i in range(4))
    groups = [Group(p.prompt, p.ids, own, grades) for p, own in zip(rendered(), answers, strict=True)]
    part = one_micro_batch(groups)
    gap_N = policy.logprobs(part, step=0).logprobs_N.detach() - part.engine_N
    assert float(gap_N.abs().max()) < 1e-4
    slow = TransformersEngine(policy, stop_ids=[3, 17, 50, 60], rows=256).generate(rendered(), 4, Sampling(0.9, 50, 7))
    assert [[c.token_ids for c in own] for own in answers] == [[c.token_ids for c in own] for own in slow]


def test_long_texts_scale_queries_by_the_logarithm_of_their_octave() -> None:
    """The scale that the engine takes is the one that transformers' layers take, far beyond the original context."""
    from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

    policy = make_policy("mistral3", lora=None, double=True)
    engine = NativeEngine(policy, stop_ids=[3], rows=4)
    places = torch.arange(512)
    scale = engine.decoder.rope_table(512).query_scale
    assert scale is not None
    wanted = get_llama_4_attn_scale(places[None], 0.1, 32).flatten()
    assert torch.equal(scale.flatten(), wanted.double())
    assert len(set(wanted.tolist())) == 16
    assert wanted[31] == 1.0
    assert wanted[32] > 1.0


def test_a_wrapper_that_is_not_known_keeps_to_padded_rows_and_transformers() -> None:
    """Only architectures that were tested share prompts: the text model's name alone is no proof."""
    loaded = LoadedModel(build_mistral3(), build_tokenizer(), "tiny")
    for kind, known in (("mistral3", True), ("llava", False)):
        loaded.model.config.model_type = kind
        assert decoder_supports(loaded.model) == known
        assert Policy(loaded, temperature=1.0, seed=0).shares_prompts == known


def test_training_leaves_the_tower_to_the_last_byte_and_a_resumed_run_ends_at_the_same_bits(
    folder: Path, tmp_path: Path
) -> None:
    whole, cut = RunDir(tmp_path / "whole"), RunDir(tmp_path / "cut")
    fresh = opened(folder).model
    expected = train(recipe_for(folder, steps=4), whole)
    base = expected.model.get_base_model()
    assert other_weights(base) == other_weights(fresh)
    assert len(other_weights(base)) == 24
    assert not any("vision" in n or "projector" in n for n, p in expected.model.named_parameters() if p.requires_grad)
    train(recipe_for(folder, steps=2), cut)
    found = train(recipe_for(folder, steps=4), cut)
    assert all(torch.equal(a, b) for a, b in zip(expected.trainable, found.trainable, strict=True))
    assert any(bool(p.any()) for n, p in found.model.named_parameters() if "lora_B" in n)


def test_peft_alone_reads_the_adapter_on_the_same_base(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    policy = open_policy(recipe_for(folder))
    set_lora(policy, 0.05)
    policy.save(tmp_path / "adapter")
    names = list(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert len(names) == 28
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), tmp_path / "adapter").eval()
    ids = torch.randint(4, 260, (2, 50), generator=torch.Generator().manual_seed(1))
    with policy.plain_attention(), torch.no_grad():
        mine = policy.model(input_ids=ids).logits
        assert torch.equal(mine, plain(input_ids=ids).logits)
        assert not torch.allclose(mine, opened(folder).model(input_ids=ids).logits, atol=1e-2)
    again = open_trained(str(tmp_path / "adapter"), recipe_for(folder))
    part = one_micro_batch(made_up_groups())
    torch.testing.assert_close(policy.logprobs(part, step=0).logprobs_N, again.logprobs(part, step=0).logprobs_N)
    fresh = open_policy(recipe_for(folder))
    fresh.restore(tmp_path / "adapter")
    assert all(torch.equal(a, b) for a, b in zip(policy.trainable, fresh.trainable, strict=True))


def test_where_all_is_trained_the_tower_is_not_and_a_checkpoint_holds_both(folder: Path, tmp_path: Path) -> None:
    recipe, run = recipe_for(folder, steps=2, full=True), RunDir(tmp_path / "run")
    policy, fresh = train(recipe, run), opened(folder).model
    assert other_weights(policy.model) == other_weights(fresh)
    before = dict(fresh.named_parameters())
    changed = {n for n, p in policy.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if n not in other_weights(fresh)}
    found, _ = checkpoint.find_latest(run)
    assert found is not None
    again = open_policy(recipe)
    again.restore(found.folder)
    assert all(torch.equal(a, b) for a, b in zip(policy.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.extra("qlora")
def test_four_bits_are_for_the_text_model() -> None:
    from minigrpo.models.lora_linear import is_four_bit

    model = quantize_four_bit(build_mistral3(), CPU)
    packed = {name for name, layer in model.named_modules() if is_four_bit(layer)}
    assert len(packed) == 14
    assert all("language_model.layers" in name for name in packed)
    assert other_weights(model) == other_weights(build_mistral3())
    wrapped, _ = add_lora(model.requires_grad_(False), AdapterConfig(rank=4), seed=1)
    assert sum("lora_A" in name for name, _ in wrapped.named_parameters()) == 14


@pytest.mark.parametrize("sections", [{}, {"model": {"quantize": "nf4"}}, {"train": {"full": True}}], ids=str)
def test_a_plan_counts_the_tower_as_held_and_never_as_trained(sections: Any, tied: bool) -> None:
    config, recipe = mistral3_config(tied=tied), Recipe(**sections)
    plan = make_plan(config, recipe, Device("cuda", torch.bfloat16, 4 * 10**9), 40)
    model = build_mistral3(tied=tied)
    tower = sum(len(weight) // 4 for weight in other_weights(model).values())
    every = sum(p.numel() for p in model.parameters())
    adapter = 2 * recipe.lora.rank * (2 * (32 + 64) + 2 * (32 + 32) + 3 * (32 + 64))
    trained = every - tower if recipe.train.full else adapter
    if recipe.model.quantize == "none":
        assert plan.line("weights") == pytest.approx(2 * every, abs=1000)
    else:
        assert 2 * (tower + 260 * 32) < plan.line("weights") < 2 * every
    assert plan.line("gradients") == trained * (2 if recipe.train.full else 4)
    assert plan.line("cache") > 0
    assert plan.fits


def test_the_templates_own_system_words_stand_where_the_task_gives_none(folder: Path) -> None:
    tokenizer = opened(folder).tokenizer
    asked = {"role": "user", "content": "2 + 2?"}
    plain = tokenizer.decode(render(tokenizer, Prompt("p", (asked,))).ids)
    assert plain == f"[S]{DEFAULT_WORDS}[/S][INST]2 + 2?[/INST]"
    told = tokenizer.decode(render(tokenizer, Prompt("p", ({"role": "system", "content": "Hm."}, asked))).ids)
    assert told == "[S]Hm.[/S][INST]2 + 2?[/INST]"


def test_the_command_line_looks_plans_trains_and_evaluates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mistral3_folder(tmp_path / "model")
    (tmp_path / "mine.py").write_text("from tests.models.test_mistral3 import letters\n\ntask = letters()\n")
    own = dump_recipe(recipe_for(Path("model"), steps=3))
    (tmp_path / "my.yaml").write_text(own.replace("name: wordproblems", "name: mine.py:task"))
    assert [command(verb, "my.yaml") for verb in ("preflight", "plan", "train")] == [0, 0, 0]
    assert command("evaluate", "runs/my") == 0
    steps = [json.loads(line) for line in Path("runs/my/metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert len(list(Path("runs/my/evals").glob("*.json"))) == 1


def command(*words: str) -> int:
    from minigrpo.cli import main

    with pytest.raises(SystemExit) as ended:
        main.main(list(words))
    return int(ended.value.code or 0)
