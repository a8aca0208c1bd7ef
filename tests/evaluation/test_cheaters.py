"""Cheaters: what never saw the question, what chance is, and weak graders found without a model."""

from dataclasses import replace
from functools import partial

import pytest

from minigrpo.config.load import load_recipe
from minigrpo.evaluation.cheaters import HIDDEN, Chance, grader_words, hide_questions, shared_messages
from minigrpo.pipeline.attack import attack_task
from minigrpo.tasks.registry import open_task
from minigrpo.types import Grade
from tests.helpers.planted import planted_recipe


@pytest.fixture
def planted(tmp_path):
    return partial(planted_recipe, tmp_path)


@pytest.mark.parametrize(
    ("name", "leak", "way", "part"),
    [
        ("anywhere", "", "every answer at once", "anywhere"),
        ("tagged", "", "an answer to another question, 8 times over", "tags"),
        ("lengthy", "", "an answer to another question, 8 times over", "long"),
        ("worded", "", "a word of the grader, 'because'", "keyword"),
        ("right", " (item {answer} of the book)", "copied into the form: its last number", "right"),
    ],
)
def test_each_planted_weakness_is_found_without_a_model(planted, name, leak, way, part):
    found = attack_task(planted(name, leak), steps=0)
    exploit = next(exploit for exploit in found.exploits if exploit.name == way)
    assert not found.ok
    assert next(iter(exploit.parts)) == part  # the function that paid most
    assert exploit.examples
    assert exploit.gain.low > 0


@pytest.mark.parametrize("name", ["quickstart", "gsm8k-tiny"])
def test_the_sound_tasks_of_the_package_pay_no_cheater(name):
    found = attack_task(load_recipe(name, {"task.size": 64}), steps=0)
    assert (found.ok, found.exploits) == (True, ())
    assert found.solving > found.chance.value


def test_the_sound_grader_over_the_planted_rows_pays_none(planted):
    assert attack_task(planted("right"), steps=0).ok


def test_what_prompts_share_stays_and_what_differs_goes():
    def asked(words, system="Be brief."):
        return ({"role": "system", "content": system}, {"role": "user", "content": words})

    shown = shared_messages([asked("Solve 3 + 4 and box it."), asked("Solve 31 - 9 and box it.")])
    assert [message["content"] for message in shown] == ["Be brief.", f"Solve {HIDDEN} and box it."]
    assert shared_messages([asked("a b"), asked("c d", "Hint: 4")])[0]["content"] == HIDDEN
    assert shared_messages([asked("a b"), asked("a b c")])[1]["content"] == f"a b {HIDDEN}"
    turns = shared_messages([asked("a"), (*asked("b"), {"role": "assistant", "content": "c"})])
    assert [message["content"] for message in turns] == ["Be brief.", HIDDEN]


def test_a_cheater_sees_no_question_and_its_grader_sees_all(planted):
    task = open_task(planted("right"))
    hidden = hide_questions(task)
    assert len({str(prompt.messages) for split in ("train", "test") for prompt in hidden.prompts(split)}) == 1
    prompt, shown = task.prompts("test")[0], hidden.prompts("test")[0]
    assert (shown.id, shown.target) == (prompt.id, prompt.target)
    assert hidden.grade(shown, task.gold(prompt)) == task.grade(prompt, task.gold(prompt))
    reads = replace(task, grade=lambda p, t: Grade(float(t in p.messages[-1]["content"])), grade_group=None)
    copy = replace(shown, id=f"{shown.id}#2")  # as a sampler makes them
    assert hide_questions(reads).grade(copy, prompt.messages[-1]["content"]).reward == 1


def test_the_words_of_a_grader_are_found_where_its_code_keeps_them():
    words, pattern = ("therefore", "hence"), "thus"

    def inner(text):
        return "inside" in text

    def grade(prompt, text):
        """Not a word of it."""
        return Grade(float(any(word in text for word in words) or pattern in text or inner(text)))

    found = grader_words(replace(open_task(load_recipe("quickstart")), grade=grade))
    assert {"therefore", "hence", "thus", "inside"} <= set(found)
    assert not [word for word in found if "Not a word" in word]


def test_luck_is_no_exploit_and_neither_is_a_gain_too_small_to_matter():
    paid, none = Grade(1.0), Grade(0.0)
    chance = Chance([none] * 50, solving=1.0)
    assert not chance.is_beaten(chance.gain([[paid]] * 2 + [[none]] * 48))
    assert chance.is_beaten(chance.gain([[paid]] * 10 + [[none]] * 40))
    assert not chance.is_beaten(chance.gain([[Grade(0.01)]] * 50))  # sure, but a hundredth of what solving earns
