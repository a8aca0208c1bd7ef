"""Engines tell of a prompt as soon as its last sibling has ended, and tell what they return."""

import pytest

from minigrpo.errors import ModelError
from minigrpo.rollouts.engines.native import NativeEngine
from minigrpo.rollouts.engines.transformers import TransformersEngine
from minigrpo.types import Prompt, Rendered, Sampling
from tests.helpers.models import make_policy, rendered

STOPS = [3, 17, 50, 60]
SAMPLING = Sampling(0.9, 50, 7)


@pytest.mark.parametrize("kind", [NativeEngine, TransformersEngine])
@pytest.mark.parametrize("rows", [8, 256])
def test_every_prompt_is_told_once_with_what_is_returned(kind, rows):
    engine = kind(make_policy("qwen2"), stop_ids=STOPS, rows=rows)
    told = {}

    def ready(place, completions):
        assert place not in told
        told[place] = completions

    answers = engine.generate(rendered(), 4, SAMPLING, ready)
    assert answers == engine.generate(rendered(), 4, SAMPLING)
    assert told.keys() == set(range(len(answers)))
    assert all(told[place] is own for place, own in enumerate(answers))


def test_prompts_are_told_in_the_order_in_which_they_end():
    engine = NativeEngine(make_policy("qwen2"), stop_ids=STOPS, rows=256)
    order = []
    answers = engine.generate(rendered(), 4, SAMPLING, lambda place, own: order.append(place))
    lasted = [max(len(one.token_ids) for one in own) for own in answers]
    assert [lasted[place] for place in order] == sorted(lasted)
    assert len(set(lasted)) > 1


@pytest.mark.parametrize("kind", [NativeEngine, TransformersEngine])
def test_a_prompt_beyond_the_models_context_is_named(kind):
    engine = kind(make_policy("qwen2"), stop_ids=STOPS, rows=8)
    with pytest.raises(ModelError, match="Prompt endless has 512 tokens"):
        engine.generate([Rendered(Prompt("endless", ()), (5,) * 512)], 2, SAMPLING)
