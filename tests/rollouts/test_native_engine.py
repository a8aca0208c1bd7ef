"""The native engine samples from the policy: the same distribution, exact stops, no pass too many."""

import copy
from collections.abc import Callable

import pytest
import torch

from minigrpo.algorithms.objective import OBJECTIVES
from minigrpo.algorithms.packing import pack
from minigrpo.config.schema import AdapterConfig, Recipe, RolloutConfig
from minigrpo.models.lora import add_lora
from minigrpo.models.policy import Policy
from minigrpo.rollouts.engines import kv_cache
from minigrpo.rollouts.engines.native import NativeEngine
from minigrpo.rollouts.engines.registry import open_engine, stop_ids
from minigrpo.rollouts.engines.sampling import draw
from minigrpo.rollouts.engines.transformers import TransformersEngine
from minigrpo.types import Completion, Engine, Grade, Group, Sampling
from minigrpo.utils.rng import uniform
from tests.helpers.models import make_policy, rendered, set_lora
from tests.helpers.tiny import LLAMA_LIKE

STOPS = [3, 17, 50, 60]
LIMIT = 50
TEN_STEPS, HUNDRED_STEPS = 1e-4, 1e-3  # size of B after so many Adam steps at lr 1e-5


def open_native(policy: Policy, rows: int = 256) -> NativeEngine:
    return NativeEngine(policy, stop_ids=STOPS, rows=rows)


def sampled(engine: Engine, n: int = 4, temperature: float = 0.9) -> list[tuple[Completion, ...]]:
    return engine.generate(rendered(), n, Sampling(temperature, LIMIT, 7))


def worst_gap(engine: Engine, policy: Policy) -> float:
    """Largest |engine - policy| over the log-probabilities of what the engine sampled."""
    answers = sampled(engine)
    grades = tuple(Grade(float(i)) for i in range(4))
    groups = [Group(p.prompt, p.ids, own, grades) for p, own in zip(rendered(), answers, strict=True)]
    (part,) = pack(groups, OBJECTIVES["grpo"], LIMIT).split(1 << 30)
    return float((policy.logprobs(part, step=0).logprobs_N.detach() - part.engine_N).abs().max())


@pytest.mark.parametrize("lora", [None, TEN_STEPS, HUNDRED_STEPS, 0.02])
@pytest.mark.parametrize("arch", LLAMA_LIKE)
def test_engine_and_policy_agree_on_what_was_sampled(arch: str, lora: float | None) -> None:
    policy = make_policy(arch, lora=lora)
    assert worst_gap(open_native(policy), policy) < 1e-4


@pytest.mark.parametrize("arch", ["mistral", "ministral3"])
@pytest.mark.parametrize("window", [8, 30, 45])
def test_sliding_windows_reach_as_far_as_the_policys(arch: str, window: int) -> None:
    policy = make_policy(arch, sliding_window=window)
    assert worst_gap(open_native(policy), policy) < 1e-4


def wrong_theta(engine: NativeEngine, policy: Policy) -> None:
    engine.decoder.model = copy.deepcopy(engine.decoder.model)
    engine.decoder.model.rotary_emb.inv_freq *= 1.05


def swapped_layers(engine: NativeEngine, policy: Policy) -> None:
    engine.decoder.layers.reverse()


def no_query_scale(engine: NativeEngine, policy: Policy) -> None:
    engine.decoder._query_scale = lambda places: None  # type: ignore[method-assign, assignment]


def no_bias(engine: NativeEngine, policy: Policy) -> None:
    engine.decoder.layers[0].qkv.fused_bias = None


def no_adapter(engine: NativeEngine, policy: Policy) -> None:
    with policy.adapter_off():
        engine.update(policy)


def no_qk_norm(engine: NativeEngine, policy: Policy) -> None:
    for layer in engine.decoder.layers:
        object.__setattr__(layer, "qk_norm", None)


def turning_where_it_should_not(engine: NativeEngine, policy: Policy) -> None:
    for layer in engine.decoder.layers:
        object.__setattr__(layer, "uses_rope", True)


@pytest.mark.parametrize(
    ("arch", "break_it"),
    [
        *[(arch, wrong_theta) for arch in LLAMA_LIKE],
        *[(arch, swapped_layers) for arch in LLAMA_LIKE],
        *[(arch, no_adapter) for arch in LLAMA_LIKE],
        ("ministral3", no_query_scale),
        ("qwen2", no_bias),
        ("qwen3", no_qk_norm),
        ("smollm3", turning_where_it_should_not),
    ],
)
def test_each_way_to_get_an_architecture_wrong_shows(
    arch: str, break_it: Callable[[NativeEngine, Policy], None]
) -> None:
    policy = make_policy(arch, lora=HUNDRED_STEPS)
    engine = open_native(policy)
    break_it(engine, policy)
    assert worst_gap(engine, policy) > 1e-4


def test_update_takes_over_the_policy_as_it_is_now_and_leaves_its_weights_alone() -> None:
    policy = make_policy(lora=TEN_STEPS)
    engine = open_native(policy)
    before = {name: weight.clone() for name, weight in policy.model.named_parameters() if "lora_" not in name}
    for size in (0.05, 0.0, 0.02):
        set_lora(policy, size)
        engine.update(policy)
        assert worst_gap(engine, policy) < 1e-4
    assert all(torch.equal(before[n], w) for n, w in policy.model.named_parameters() if n in before)


@pytest.mark.parametrize("arch", LLAMA_LIKE)
def test_update_takes_over_every_parameter_where_all_are_trained(arch: str) -> None:
    policy = make_policy(arch, lora=None)
    engine = open_native(policy)
    draw = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    assert worst_gap(engine, policy) > 1e-2
    engine.update(policy)
    assert worst_gap(engine, policy) < 1e-4


def test_with_its_adapter_off_the_engine_samples_the_base() -> None:
    policy, base = make_policy(lora=0.05), make_policy(lora=None)
    engine = open_native(policy)
    with policy.adapter_off():
        engine.update(policy)
    assert [c.token_ids for own in sampled(engine) for c in own] == [
        c.token_ids for own in sampled(open_native(base)) for c in own
    ]


def test_in_sixteen_bit_the_adapter_is_a_pass_of_its_own_and_the_base_is_not_copied() -> None:
    policy = make_policy(lora=HUNDRED_STEPS)
    base = policy.model.get_base_model()
    for parameter in base.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    engine = open_native(policy)
    projection = engine.decoder.layers[0].qkv
    assert not projection.is_fused
    assert projection.bases[0].weight.data_ptr() == base.model.layers[0].self_attn.q_proj.base_layer.weight.data_ptr()
    x = torch.randn(3, 32).bfloat16()
    normed = base.model.layers[0].input_layernorm(x)
    whole = torch.cat([m(normed) for m in projection.modules], -1)
    assert float((projection(x) - whole).abs().max()) < 0.05
    assert not torch.equal(projection(x), torch.cat([m.base_layer(normed) for m in projection.modules], -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bit_the_engine_rounds_as_the_policys_own_layers_do(dtype: torch.dtype) -> None:
    """Product and sum of the adapter in one call, and one product for all A: to the last bit what training computes."""
    policy = make_policy(lora=0.05)
    for parameter in policy.model.get_base_model().parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    (layer, *_), module = open_native(policy).decoder.layers, policy.model.get_base_model().model.layers[0]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    heads = torch.randn(3, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
    inner = torch.randn(3, 64, generator=torch.Generator().manual_seed(4)).to(dtype)
    normed, after = layer.qkv.norm(x), layer.gate_up.norm(x)  # type: ignore[misc]
    for projection, given, taken in ((layer.qkv, x, normed), (layer.gate_up, x, after)):
        for part, own in zip(projection.parts(given), projection.modules, strict=True):
            assert torch.equal(part, own(taken))
    assert torch.equal(layer.out(heads), module.self_attn.o_proj(heads))
    assert torch.equal(layer.down(inner), module.mlp.down_proj(inner))


def test_in_sixteen_bit_layers_without_an_adapter_stand_beside_those_with_one() -> None:
    policy = make_policy(lora=None)
    policy.model.requires_grad_(False)
    policy.model, _ = add_lora(policy.model.bfloat16(), AdapterConfig(rank=4, targets="q_proj,v_proj,up_proj"), seed=1)
    set_lora(policy, 0.5)
    layer = open_native(policy).decoder.layers[0]
    for projection in (layer.qkv, layer.out, layer.gate_up, layer.down):
        x = torch.randn(3, projection.bases[0].in_features, generator=torch.Generator().manual_seed(2)).bfloat16()
        taken = x if projection.norm is None else projection.norm(x)
        for part, own in zip(projection.parts(x), projection.modules, strict=True):
            assert torch.equal(part, own(taken))
    assert [B is not None for B in layer.qkv.Bs] == [True, False, True]
    assert layer.down.joint_A is None


def test_the_norm_that_lies_in_the_weights_is_the_norm() -> None:
    policy = make_policy(lora=HUNDRED_STEPS)
    layer = policy.model.get_base_model().model.layers[0]
    (projection, norm) = open_native(policy).decoder.layers[0].gate_up, layer.post_attention_layernorm
    assert projection.is_fused
    assert float((norm.weight - 1).abs().max()) > 0.01
    x = torch.randn(3, 32)
    whole = torch.cat([m(norm(x)) for m in projection.modules], -1)
    torch.testing.assert_close(projection(x), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("entries", [486, 5_000])
def test_the_highest_number_draws_an_entry_that_has_mass(entries: int) -> None:
    logits = torch.randn(50, entries, generator=torch.Generator().manual_seed(0)) * 5
    logits[:, -3:] = -torch.inf
    tokens, logprobs = draw(logits, torch.full((50,), 1 - 2.0**-53, dtype=torch.float64), 1.0)
    assert int(tokens.max()) < entries - 3
    assert bool(logprobs.isfinite().all())


def test_draws_do_not_depend_on_what_else_is_in_the_batch() -> None:
    engine = open_native(make_policy())
    together = sampled(engine)
    alone = [engine.generate([prompt], 4, Sampling(0.9, LIMIT, 7))[0] for prompt in rendered()]
    assert [[c.token_ids for c in own] for own in together] == [[c.token_ids for c in own] for own in alone]
    assert sampled(open_native(make_policy(), rows=4)) == alone


def test_siblings_and_seeds_draw_differently_and_greedy_siblings_do_not() -> None:
    engine = open_native(make_policy())
    first = engine.generate(rendered(), 4, Sampling(0.9, LIMIT, 7))
    other = engine.generate(rendered(), 4, Sampling(0.9, LIMIT, 8))
    assert len({c.token_ids for own in first + other for c in own}) == 24
    greedy = engine.generate(rendered(), 4, Sampling(0.0, LIMIT, 7))
    assert [len({c.token_ids for c in own}) for own in greedy] == [1, 1, 1]


def test_an_answer_ends_at_its_first_stop_token_or_at_the_limit() -> None:
    for completion in (c for own in sampled(open_native(make_policy())) for c in own):
        *inner, last = completion.token_ids
        assert not set(inner) & set(STOPS)
        assert completion.finish == ("stop" if last in STOPS else "length")
        assert (len(completion.token_ids) == LIMIT) or completion.finish == "stop"
        assert len(completion.logprobs) == len(completion.token_ids)


def test_each_prompt_passes_once_and_finished_rows_never_again() -> None:
    policy = make_policy()
    engine = open_native(policy)
    seen: list[int] = []
    engine.decoder.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    answers = sampled(engine, n=4)
    longest = max(len(prompt.ids) for prompt in rendered()) - 1
    assert seen[0] == 3 * longest  # prompts, padded to the longest, without their last tokens
    assert sum(seen[1:]) == sum(len(c.token_ids) for own in answers for c in own)


def test_the_cache_grows_past_its_first_slots_without_losing_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sampled(open_native(make_policy()))
    monkeypatch.setattr(kv_cache, "FIRST_SLOTS", 3)
    assert sampled(open_native(make_policy())) == expected


@pytest.mark.parametrize("arch", ["qwen2", "lfm2"])
def test_the_transformers_engine_agrees_with_the_policy_too(arch: str) -> None:
    policy = make_policy(arch)
    engine = TransformersEngine(policy, stop_ids=STOPS, rows=256)
    assert worst_gap(engine, policy) < 1e-4


def test_both_engines_draw_the_same_answers() -> None:
    policy = make_policy()
    ours, theirs = sampled(open_native(policy)), sampled(TransformersEngine(policy, stop_ids=STOPS, rows=256))
    assert [[c.token_ids for c in own] for own in ours] == [[c.token_ids for c in own] for own in theirs]
    assert [[c.text for c in own] for own in ours] == [[c.text for c in own] for own in theirs]


def test_the_architecture_decides_the_engine_and_a_wrong_choice_is_refused() -> None:
    from minigrpo.errors import RecipeError

    assert isinstance(open_engine(make_policy("qwen3"), Recipe()), NativeEngine)
    assert isinstance(open_engine(make_policy("lfm2"), Recipe()), TransformersEngine)
    with pytest.raises(RecipeError, match="lfm2"):
        open_engine(make_policy("lfm2"), Recipe(rollout=RolloutConfig(engine="native")))


def test_every_end_token_of_model_and_tokenizer_ends_an_answer() -> None:
    policy = make_policy()
    policy.model.generation_config.eos_token_id = [17, 50]
    assert stop_ids(policy) == {17, 50, policy.tokenizer.eos_token_id}


@pytest.mark.parametrize("vocabulary", [7, 512, 2500])
def test_tokens_are_drawn_as_often_as_the_softmax_says(vocabulary: int) -> None:
    logits_V = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1)) * 3
    logits_V[2] = -torch.inf
    rows = 40_000
    tokens_n, logprobs_n = draw(logits_V.expand(rows, -1), uniform(torch.arange(rows)), 1.3)
    probs_V = (logits_V / 1.3).softmax(-1)
    share_V = torch.bincount(tokens_n, minlength=vocabulary) / rows
    spread_V = (probs_V * (1 - probs_V) / rows).sqrt()
    assert float(((share_V - probs_V).abs() - 5 * spread_V).max()) < 2 / rows
    assert share_V[2] == 0
    torch.testing.assert_close(logprobs_n, probs_V.log()[tokens_n], atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", [1000, 3000])
def test_the_ends_of_the_unit_interval_draw_tokens_that_can_be(width: int) -> None:
    logits_nV = torch.full((2, width), -torch.inf)
    logits_nV[:, [5, 700]] = 0.0
    ends_n = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(logits_nV, ends_n, 1.0)[0].tolist() == [5, 700]
