"""The verdict before training: go, or what to change."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch

from minigrpo.config.schema import Recipe, WarmupConfig
from minigrpo.models.policy import open_policy
from minigrpo.rollouts.engines.scripted import Scripted
from minigrpo.training import preflight as preflight_module
from minigrpo.training.preflight import preflight, sample_groups
from minigrpo.training.preflight_findings import HOPELESS_GROUPS
from minigrpo.types import Grade
from minigrpo.ui.progress import no_report
from tests.helpers.marks import rest_is_long


@pytest.fixture(scope="module")
def recipe(tiny_folder):
    return Recipe(
        model={"path": str(tiny_folder("qwen2")), "device": "cpu"},
        lora={"rank": 2},
        rollout={"prompts": 4, "completions": 4, "max_tokens": 8},
        train={"steps": 10},
    )


@pytest.fixture(scope="module")
def policy(recipe):
    return open_policy(recipe)


@pytest.fixture
def check(recipe, policy, echo_task, tokenizer):
    def run(script, task=echo_task, recipe=recipe, report=no_report, **more):
        return preflight(recipe, task, policy, Scripted(script, tokenizer), report, **more)

    return run


def test_groups_whose_siblings_differ_are_a_go(check):
    verdict = check(lambda prompt, sibling: prompt.target if sibling else "no")
    assert verdict.go
    assert verdict.reasons == ()
    assert verdict.figures.informative == 1.0
    assert verdict.figures.solved == 0.75
    assert verdict.figures.reward_mean == pytest.approx(0.75)


def test_a_model_that_never_has_the_form_is_told_so(check):
    verdict = check(["I do not know"[:6]])
    (reason,) = verdict.reasons
    assert not verdict.go
    assert "Not one of 32 completions has the form" in reason.what
    assert "worked example" in reason.change


def test_a_missing_form_is_answered_with_the_command_that_teaches_it(check, recipe, echo_task):
    (reason,) = check(["no idea"[:6]]).reasons
    assert "minigrpo warmup RECIPE --warmup.steps 60" in reason.change
    (reason,) = check(["no idea"[:6]], task=replace(echo_task, gold=None)).reasons
    assert "minigrpo warmup RECIPE --warmup.data FILE --warmup.steps 60" in reason.change
    planned = recipe.model_copy(update={"warmup": WarmupConfig(steps=40)})
    (reason,) = check(["no idea"[:6]], recipe=planned).reasons
    assert "--warmup.steps 80" in reason.change


def test_a_form_that_the_template_began_is_not_missing(check, policy, echo_task, template, monkeypatch):
    opens = template.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    assert opens != template
    monkeypatch.setattr(policy.tokenizer, "chat_template", opens)

    def grade(prompt, text):
        solved = text == f"<think>\n{prompt.target}"
        return Grade(float(solved), formed=text.startswith("<think>"), solved=solved)

    task = replace(echo_task, grade=grade, gold=None)
    verdict = check(lambda prompt, sibling: prompt.target if sibling else "no", task=task)
    assert verdict.go
    assert (verdict.figures.formed, verdict.figures.solved) == (1.0, 0.75)
    assert verdict.samples[0]["text"].startswith("<think>\n")
    (reason,) = check(["no", "not"], task=task).reasons
    assert "The prompt itself begins each answer, with '<think>\\n'" in reason.change
    assert "warmup" not in reason.change


def test_only_a_missing_form_is_mended_by_a_warm_up(check):
    assert check(["no idea"[:6]]).warms
    assert check(["a very long answer"]).warms  # it has no form either, and right answers end
    assert not check(["999"]).warms
    assert not check(["1", "no"]).warms


def test_a_rare_form_is_a_warning_with_the_command(check):
    verdict = check(lambda p, sibling: p.target if p.id in ("train-3", "train-4") and not sibling else "no")
    assert verdict.go
    (warning,) = [warning for warning in verdict.warnings if "have the form" in warning]
    assert "minigrpo warmup RECIPE" in warning


def test_prompts_that_leave_no_room_are_named_with_the_knob(check, recipe):
    wide = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"max_tokens": 500})})
    reason = check(["1", "no"], recipe=wide).reasons[0]
    assert "100% of the prompts leave less than rollout.max_tokens 500" in reason.what
    longest = check(["1", "no"]).figures.prompts.longest
    assert f"the longest prompt has {longest}" in reason.what
    assert f"--rollout.max_tokens {512 - longest}" in reason.change


def test_rewards_that_could_not_be_told_are_left_out_of_the_figures(check, echo_task):
    def grade(prompt, text):
        return echo_task.grade(prompt, text) if text != "?" else Grade(math.nan, notes={"grader": "took longer"})

    task = replace(echo_task, grade=grade)
    verdict = check(lambda prompt, sibling: ("?", prompt.target, "no", "no")[sibling], task=task)
    assert verdict.go
    assert verdict.figures.unscored == 0.25
    assert verdict.figures.reward_mean == pytest.approx(1 / 3)
    assert any("25% of the completions could not be told" in warning for warning in verdict.warnings)
    none = check(["?"], task=task)
    assert "none of the 32 completions could be told" in none.reasons[0].what
    assert none.figures.reward_mean is None
    assert json.loads(json.dumps(none.to_dict(), allow_nan=False))["samples"][0]["reward"] is None


def test_a_reward_that_is_always_the_highest_needs_a_harder_task(check, echo_task):
    task = replace(echo_task, grade=lambda prompt, text: Grade(2.0))
    (reason,) = check(["1", "2", "3", "4"], task=task).reasons
    assert "earned 2, as much as the task's own right answers" in reason.change
    (reason,) = check(["1", "2", "3", "4"], task=replace(task, gold=None)).reasons
    assert "If the 2 that they earned is the most" in reason.change


def test_a_model_that_is_always_cut_off_is_pointed_to_the_limit(check):
    (reason,) = check(["a very long answer"]).reasons
    assert "100% of the completions were cut off at 8 tokens" in reason.what
    assert "--rollout.max_tokens 16" in reason.change


def test_a_limit_that_no_right_answer_fits_is_named_with_one_that_has_room(check, echo_task):
    """Half of the answers end, and earn something: without the task's own answers that would be no reason to stop."""
    paid = replace(echo_task, grade=lambda prompt, text: Grade(float(len(text)), solved=False))
    wordy = replace(paid, gold=lambda prompt: "a right answer of many words" + prompt.id)
    answers = ["no", "a very long answer"]
    assert check(answers, task=paid).go
    found = check(answers, task=wordy)
    shortest, longest = found.figures.shortest_gold, found.figures.longest_gold
    assert 8 < shortest < longest
    (reason,) = found.reasons
    assert reason.what.startswith(
        "50% of the completions were cut off at 8 tokens and none is right: even the shortest"
    )
    assert reason.what.endswith(f" has {shortest}.")
    assert reason.change.endswith(f"--rollout.max_tokens {2 * longest}.")
    assert check(["no", "nope"], task=wordy).go  # wrong, and none is cut off
    right = replace(wordy, grade=lambda prompt, text: Grade(float(len(text)), solved=text == "no"))
    assert check(answers, task=right).go


def test_cut_off_answers_that_earn_something_are_a_warning(check, recipe, echo_task):
    paid = replace(echo_task, grade=lambda prompt, text: Grade(float(len(set(text))), solved="b" in text))
    verdict = check(["aaaaaaaaaaaaaa", "abababababababa"], task=paid)
    assert verdict.go
    assert any("100% of the completions were cut off" in warning for warning in verdict.warnings)


def test_a_task_that_is_always_solved_is_too_easy(check):
    (reason,) = check(lambda prompt, _: prompt.target).reasons
    assert "harder task" in reason.change


def test_siblings_that_say_the_same_need_temperature(check):
    (reason,) = check(["999"]).reasons
    assert "--rollout.temperature" in reason.change


def test_formed_answers_that_are_never_right_need_an_easier_task(check):
    (reason,) = check(["997", "998", "999", "996"]).reasons
    assert "make the task easier" in reason.change
    assert "--rollout.completions 8" in reason.change


def test_a_prompt_solved_always_or_never_needs_more_siblings(check):
    (reason,) = check(lambda p, s: f"{p.target}{' ' * s}" if int(p.target) % 2 else f"99{s}").reasons
    assert "always or never" in reason.what + reason.change


def test_rare_differences_are_a_warning_not_a_stop(check):
    verdict = check(lambda p, sibling: p.target if p.id in ("train-3", "train-4") and not sibling else "999")
    assert verdict.go
    assert any("groups teach anything" in warning for warning in verdict.warnings)


def test_a_solved_task_with_little_left_is_a_warning(check):
    verdict = check(lambda p, sibling: "no" if p.id == "train-3" and not sibling else p.target)
    assert any("Little is left to learn" in warning for warning in verdict.warnings) == (verdict.figures.solved < 1)


def test_template_faults_are_among_the_warnings(recipe, policy, echo_task, tokenizer):
    policy = open_policy(recipe)
    policy.warnings = ("two beginnings",)
    verdict = preflight(recipe, echo_task, policy, Scripted(["1", "no"], tokenizer))
    assert "two beginnings" in verdict.warnings


def test_times_come_from_measured_rates(check, recipe):
    figures = check(lambda prompt, sibling: prompt.target if sibling else "no").figures
    assert figures.pass_seconds > 0
    assert figures.step_seconds == pytest.approx(figures.rollout_seconds + figures.pass_seconds)
    assert figures.training_seconds == pytest.approx(10 * figures.step_seconds)


def test_groups_that_tie_cost_no_training_pass(check):
    figures = check(["999"]).figures
    assert figures.step_seconds == figures.rollout_seconds


def test_the_policy_is_left_as_it_was(check, policy):
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    check(lambda prompt, sibling: prompt.target if sibling else "no")
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.model.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.trainable)


def test_the_best_and_the_worst_sample_are_shown(check):
    samples = check(lambda prompt, sibling: prompt.target if sibling else "no").samples
    assert {sample["which"]: sample["reward"] for sample in samples} == {"best": 1.0, "worst": 0.0}
    assert samples[0]["prompt"].startswith("say ")


def test_progress_is_reported(check):
    told = []
    check(["1", "no"], report=lambda *now: told.append(now))
    counts = [int(note.split()[0]) for _, _, note in told]
    assert counts == sorted(counts)
    assert counts[-1] == 32
    assert any("completions sampled; " in note and "tokens" in note for _, _, note in told)


def test_an_empty_task_is_refused_before_anything_is_sampled(check, echo_task):
    with pytest.raises(Exception, match="has no train prompts"):
        check(["1"], task=replace(echo_task, prompts=lambda split: []))


def test_none_of_a_few_groups_is_no_proof_and_sampling_goes_on_until_it_is_one(check):
    verdict = check(["999"])
    assert not verdict.go
    assert HOPELESS_GROUPS <= verdict.figures.groups < HOPELESS_GROUPS + 4


def test_when_time_is_up_before_it_is_sure_it_says_so_with_the_interval(check):
    verdict = check(["999"], seconds=0.0)
    assert verdict.go
    assert not verdict.figures.decided
    (warning,) = [warning for warning in verdict.warnings if "too few to call it hopeless" in warning]
    assert "In none of the 4 groups" in warning
    assert "up to 49% of the groups may differ" in warning
    assert "--seconds" in warning


def test_a_slow_model_without_the_form_needs_no_second_rollout(check, recipe, monkeypatch):
    monkeypatch.setattr(preflight_module, "QUICK_SECONDS", 0.0)
    wide = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"completions": 8, "prompts": 8})})
    verdict = check(["no idea"[:6]], recipe=wide)
    assert not verdict.go
    assert verdict.figures.groups == 8


@pytest.mark.parametrize("trials", rest_is_long([60, 400], 60))
@pytest.mark.parametrize(("rate", "most_wrong"), [(0.1, 0.02), (0.3, 0.0)])
def test_at_most_two_in_a_hundred_are_called_hopeless_where_one_group_in_ten_differs(
    rate, most_wrong, trials, recipe, policy, echo_task, tokenizer
):
    draws, wrong = random.Random(0), 0
    differs: dict[str, bool] = {}

    def script(prompt, sibling):
        if not sibling:
            differs[prompt.id] = draws.random() < rate
        return prompt.target if sibling or not differs[prompt.id] else "999"

    prompts = echo_task.prompts("train")
    for _ in range(trials):
        engine = Scripted(script, tokenizer)
        sampled = sample_groups(recipe, echo_task, policy, engine, prompts, report=no_report, seconds=60.0)
        assert sampled.decided
        wrong += not any(group.spread for group in sampled.groups)
    noise = 3 * math.sqrt(most_wrong * (1 - most_wrong) / trials)
    assert wrong / trials <= most_wrong + noise


class Interrupted(Scripted):
    """An engine that Ctrl-C interrupts after the first two prompts of a rollout."""

    def generate(self, prompts, n, sampling, ready=None, *, progress=None):
        super().generate(prompts[:2], n, sampling, ready, progress=progress)
        raise KeyboardInterrupt


def test_ctrl_c_shows_what_has_been_sampled(recipe, policy, echo_task, tokenizer):
    def script(prompt, sibling):
        return prompt.target if sibling else "no"

    verdict = preflight(recipe, echo_task, policy, Interrupted(script, tokenizer))
    assert verdict.interrupted
    assert (verdict.figures.groups, verdict.figures.completions, verdict.figures.solved) == (2, 8, 0.75)
    assert verdict.figures.step_seconds is None
    json.dumps(verdict.to_dict(), allow_nan=False)


def test_ctrl_c_before_anything_was_sampled_ends_it(recipe, policy, echo_task, tokenizer):
    class Early(Scripted):
        def generate(self, prompts, n, sampling, ready=None, *, progress=None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preflight(recipe, echo_task, policy, Early(["1"], tokenizer))
