"""The slot engine says what the native engine says, token for token, whatever its shapes and however rows leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from minigrpo.config.schema import Recipe, RolloutConfig
from minigrpo.errors import RecipeError
from minigrpo.models.policy import Policy
from minigrpo.rollouts.engines import cuda_graph
from minigrpo.rollouts.engines.cuda_graph import SlotEngine, own_slots
from minigrpo.rollouts.engines.native import NativeEngine
from minigrpo.rollouts.engines.registry import open_engine
from minigrpo.types import Completion, Engine, Rendered, Sampling
from tests.helpers.models import make_policy, rendered, set_lora
from tests.helpers.tiny import LLAMA_LIKE

STOPS = [3, 17, 50, 60]
LIMIT = 50
PROMPTS = (1, 40, 23, 7, 12)


def both(policy: Policy, rows: int = 256) -> tuple[NativeEngine, SlotEngine]:
    """In float64: the two sum in different order, and among thousands of draws rounding in float32 may change one."""
    return NativeEngine(policy, stop_ids=STOPS, rows=rows), SlotEngine(policy, stop_ids=STOPS, rows=rows)


def said(engine: Engine, prompts: list[Rendered], heat: float = 0.9, seed: int = 8, n: int = 4) -> list[Any]:
    answers = engine.generate(prompts, n, Sampling(heat, LIMIT, seed))
    return [[(c.token_ids, c.text, c.finish) for c in own] for own in answers]


@pytest.mark.parametrize("arch", LLAMA_LIKE)
def test_both_engines_say_the_same(arch: str) -> None:
    native, fixed = both(make_policy(arch, double=True))
    assert said(fixed, rendered(PROMPTS)) == said(native, rendered(PROMPTS))


@pytest.mark.parametrize("window", [8, 30])
def test_sliding_windows_reach_as_far(window: int) -> None:
    native, fixed = both(make_policy("mistral", sliding_window=window, double=True))
    assert said(fixed, rendered(PROMPTS)) == said(native, rendered(PROMPTS))


@pytest.mark.parametrize(("look", "first", "multiple"), [(1, 2, 3), (7, 16, 64), (100, 64, 1)])
def test_no_shape_changes_a_token(monkeypatch: pytest.MonkeyPatch, look: int, first: int, multiple: int) -> None:
    native, fixed = both(make_policy(double=True))
    for name, value in {"CHECK_EVERY": look, "MIN_OWN_SLOTS": first, "PROMPT_SLOT_STEP": multiple}.items():
        monkeypatch.setattr(cuda_graph, name, value)
    assert said(fixed, rendered(PROMPTS)) == said(native, rendered(PROMPTS))


def test_a_state_is_used_again_and_nothing_of_an_earlier_call_is_left_in_it() -> None:
    native, fixed = both(make_policy(double=True))
    calls = [(PROMPTS, 7), ((5, 2), 8), ((33,), 9), (PROMPTS, 10), ((90, 3), 11)]
    states = []
    for lengths, seed in calls:
        assert said(fixed, rendered(lengths), seed=seed) == said(native, rendered(lengths), seed=seed)
        states.append(fixed._graph_sets[0])
    assert states[0] is states[1] is states[2] is states[3]
    assert states[4] is not states[3]  # longer than the room of the first
    assert said(fixed, rendered(PROMPTS), heat=0.0, n=1) == said(native, rendered(PROMPTS), heat=0.0, n=1)


def test_an_evaluation_in_between_leaves_training_its_state() -> None:
    native, fixed = both(make_policy(double=True))
    said(fixed, rendered(PROMPTS))
    training = fixed._graph_sets[0]
    for evaluation in ((PROMPTS, 0.0, 1), ((5, 2), 0.0, 1), ((33,), 0.7, 2)):
        lengths, heat, n = evaluation
        assert said(fixed, rendered(lengths), heat, n=n) == said(native, rendered(lengths), heat, n=n)
        assert said(fixed, rendered(PROMPTS), seed=9) == said(native, rendered(PROMPTS), seed=9)
        assert fixed._graph_sets[0] is training
        assert len(fixed._graph_sets) == cuda_graph.KEPT_SHAPES


def test_a_rollout_that_breaks_off_lets_its_graphs_go_and_the_next_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a state is no use, and where memory ran out, what it takes is needed for the next try."""
    native, fixed = both(make_policy(double=True))
    said(fixed, rendered(PROMPTS))
    assert fixed._graph_sets
    with monkeypatch.context() as patch:
        patch.setattr(fixed.decoder, "decode", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
        with pytest.raises(torch.OutOfMemoryError):
            said(fixed, rendered(PROMPTS))
    assert not fixed._graph_sets
    assert said(fixed, rendered(PROMPTS)) == said(native, rendered(PROMPTS))


def test_steps_get_narrower_as_prompts_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "CHECK_EVERY", 4)
    native, fixed = both(make_policy(double=True))
    assert said(fixed, rendered(PROMPTS), n=1) == said(native, rendered(PROMPTS), n=1)
    (graphs,) = fixed._graph_sets
    assert max(graphs._sizes) == 5
    assert min(graphs._sizes) < 5


def test_prompts_are_told_as_they_end_each_once() -> None:
    _, fixed = both(make_policy(), rows=12)
    told: dict[int, tuple[Completion, ...]] = {}
    answers = fixed.generate(rendered(PROMPTS), 4, Sampling(0.9, LIMIT, 7), told.__setitem__)
    assert [told[place] for place in range(len(PROMPTS))] == answers


@pytest.mark.parametrize("sixteen_bit", [False, True])
def test_update_takes_over_the_weights_where_they_are(sixteen_bit: bool) -> None:
    policy = make_policy(lora=0.02)
    if sixteen_bit:
        for parameter in policy.model.get_base_model().parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    _, fixed = both(policy)
    tensors = fixed.decoder.weight_copies()
    before = [tensor.clone() for tensor in tensors]
    set_lora(policy, 0.2)
    fixed.update(policy)
    now = fixed.decoder.weight_copies()
    # A recorded step reads addresses: the same tensors must hold the new numbers.
    assert [tensor.data_ptr() for tensor in now] == [tensor.data_ptr() for tensor in tensors]
    assert any(not torch.equal(old, new) for old, new in zip(before, now, strict=True))
    said(fixed, rendered())
    with policy.adapter_off():
        fixed.update(policy)
        assert (not fixed._graph_sets) == sixteen_bit  # there the adapter is a pass of its own, which is gone
        _, fresh = both(policy)
        assert said(fixed, rendered()) == said(fresh, rendered())


def test_own_slots_double_up_to_the_limit() -> None:
    assert [own_slots(so_far, 300) for so_far in (0, 63, 64, 127, 128, 299)] == [64, 64, 128, 128, 256, 300]


def test_a_recipe_may_name_it_and_an_architecture_that_it_does_not_know_is_refused() -> None:
    named = Recipe(rollout=RolloutConfig(engine="slots"))
    assert isinstance(open_engine(make_policy("qwen3"), named), SlotEngine)
    with pytest.raises(RecipeError, match="lfm2"):
        open_engine(make_policy("lfm2"), named)


def test_a_reward_that_computes_on_the_gpu_in_its_own_thread_does_not_break_a_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While a graph is captured, CUDA refuses calls of any thread in its mode "global", and ours in "thread_local"."""
    capturing: list[str] = []

    @contextmanager
    def capture(graph: Any, capture_error_mode: str = "global", **_: Any) -> Iterator[None]:
        capturing.append(capture_error_mode)
        yield
        capturing.clear()

    def reward() -> None:
        if "global" in capturing:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        graded.append(bool(capturing))

    graded: list[bool] = []
    for name, fake in {
        "Stream": lambda device: MagicMock(),
        "current_stream": MagicMock,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": MagicMock,
        "graph_pool_handle": MagicMock,
        "graph": capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    step: Any = lambda own: reward()  # noqa: E731 (what a grader's thread does while the step is captured)
    step.state = SimpleNamespace(changing_tensors=list)
    cuda_graph.CapturedStep(step, cuda_graph.GraphRecorder(torch.device("cuda")))(64)
    assert graded == [False, True]  # once before the capture, once inside it


@pytest.mark.gpu
def test_recorded_steps_say_what_the_native_engine_says() -> None:
    policy = make_policy()
    policy.model.cuda()
    policy.device = torch.device("cuda")
    native, fixed = both(policy)
    for seed in (7, 8):
        assert said(fixed, rendered(PROMPTS), seed=seed) == said(native, rendered(PROMPTS), seed=seed)
        set_lora(policy, 0.05)
        native.update(policy)
        fixed.update(policy)
