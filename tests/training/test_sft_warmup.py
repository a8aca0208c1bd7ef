"""A supervised start: which answers are taught, what is refused, and that GRPO goes on from there."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minigrpo.algorithms.objective import OBJECTIVES
from minigrpo.algorithms.packing import MicroBatch, pack
from minigrpo.cli import main
from minigrpo.config.load import dump_recipe
from minigrpo.config.schema import Recipe
from minigrpo.errors import ArtifactError, DivergenceError, MinigrpoError, RecipeError, TaskError
from minigrpo.models.policy import Policy
from minigrpo.pipeline import prepare, stages
from minigrpo.runs.logger import RunLogger
from minigrpo.runs.rundir import RunDir, read_json
from minigrpo.tasks.registry import open_task
from minigrpo.training.sft_warmup import (
    WarmupMeasure,
    WrittenAnswer,
    answers_to_tests,
    check_warmup,
    memorised_warnings,
    prepare_answers,
    tokenize_answers,
    warmup,
)
from minigrpo.types import Prompt, Task
from tests.helpers.models import made_up_groups, make_policy, set_lora

# A model whose outputs are noise never says yes or no; once it does, half of its answers are right: there is no rule.
TASK = """
from hashlib import md5
from minigrpo.types import Grade, Prompt, Task

def prompts(split):
    numbers = range(40) if split == "train" else range(100, 140)
    return [Prompt(f"{split}-{i}", ({"role": "user", "content": f"is {i} red"},), str(i)) for i in numbers]

def gold(prompt):
    return "no" if md5(prompt.target.encode()).digest()[0] % 2 else "yes"

def grade(prompt, text):
    formed = text in ("yes", "no")
    return Grade(float(formed) * (0.1 + (text == gold(prompt))), formed=formed, solved=text == gold(prompt))

task = Task("red", prompts, grade, gold)
mute = Task("red", prompts, grade)
"""


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tasks") / "yes.py"
    file.write_text(TASK)
    return file


@pytest.fixture(scope="module")
def make_recipe(tiny_folder: Any, task_file: Path) -> Any:
    def make(name: str = "task", **changes: Any) -> Recipe:
        sections: dict[str, Any] = {
            "model": {"path": str(tiny_folder("qwen2")), "device": "cpu"},
            "lora": {"rank": 8, "alpha": 16},
            "task": {"name": f"{task_file}:{name}"},
            "rollout": {"prompts": 4, "completions": 4, "max_tokens": 6},
            "train": {"steps": 2, "lr": 0.01, "tokens_per_pass": 512},
            "save": {"every": 1},
            "eval": {"limit": 5},
            "warmup": {"steps": 30, "rows": 8, "lr": 0.01},
        }
        for section, knobs in changes.items():
            sections[section] = sections.get(section, {}) | knobs
        return Recipe(**sections)

    return make


@pytest.fixture(scope="module")
def warm(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, dict[str, Any]]:
    """A warm-up through the command line, made once; tests that go on from it copy the folder."""
    home = tmp_path_factory.mktemp("warm")
    (home / "mine.yaml").write_text(dump_recipe(make_recipe(objective={"kl": 0.1})))
    run = RunDir(home / "run")
    main.app(["warmup", str(home / "mine.yaml"), "--run", str(run.path)], standalone_mode=False)
    return run, read_json(run.warmup / "made.json")


def test_a_model_that_never_has_the_form_has_it_after_a_warm_up(warm: Any) -> None:
    _, figures = warm
    assert figures["before"]["formed"] == 0
    assert figures["after"]["formed"] > 0.5
    assert figures["after"]["held_aside"] < figures["before"]["held_aside"]
    assert (figures["lessons"], figures["held_aside"]) == (36, 4)


def test_it_leaves_an_adapter_that_any_tool_reads(warm: Any) -> None:
    run, figures = warm
    names = {path.name for path in run.warmup.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "made.json"} <= names
    assert {"verb", "versions", "from"} <= figures["made"].keys()


@pytest.fixture
def copied(warm: Any, tmp_path: Path) -> RunDir:
    shutil.copytree(warm[0].path, tmp_path / "copy")
    return RunDir(tmp_path / "copy")


def test_a_warm_up_that_is_there_is_not_done_again(copied: RunDir, make_recipe: Any) -> None:
    before = (copied.warmup / "made.json").stat().st_mtime_ns
    figures = stages.warmup(make_recipe(objective={"kl": 0.1}), copied, resume=True)
    assert (copied.warmup / "made.json").stat().st_mtime_ns == before
    assert figures["run"] == str(copied.path)
    with pytest.raises(ArtifactError, match="already holds a run"):
        stages.warmup(make_recipe(objective={"kl": 0.1}), copied)


@pytest.mark.long
def test_training_goes_on_from_it_and_a_stop_changes_nothing(
    copied: RunDir, make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a KL term: a resumed run that had another reference would come out different."""
    recipe, whole = make_recipe(objective={"kl": 0.1}), RunDir(tmp_path / "whole")
    shutil.copytree(copied.path, whole.path)
    stages.train(recipe, whole, resume=True)
    record = RunLogger.record

    def interrupt(track: RunLogger, step: int, *rest: Any, **named: Any) -> None:
        record(track, step, *rest, **named)
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunLogger, "record", interrupt)
    with pytest.raises(KeyboardInterrupt):
        stages.train(recipe, copied, resume=True)
    monkeypatch.undo()
    stages.train(recipe, copied, resume=True)
    weights = [run.adapter / "adapter_model.safetensors" for run in (whole, copied)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert weights[0].read_bytes() != (copied.warmup / "adapter_model.safetensors").read_bytes()
    first = json.loads(whole.metrics.read_text().splitlines()[0])
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)  # GRPO begins where its reference is


@pytest.mark.long
def test_the_whole_road_warms_up_where_preflight_finds_only_the_form_missing(make_recipe: Any, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "road")
    figures = stages.run_all(make_recipe(train={"steps": 1}), run)
    assert read_json(run.preflight)["go"] is True
    assert read_json(run.preflight)["made"]["from"].keys() == {"recipe", "warmup"}
    greedy = figures["comparisons"]["greedy"]
    assert greedy["before"]["scores"]["formed"]["value"] == 0  # the base is the model without any adapter
    assert greedy["after"]["scores"]["formed"]["value"] > 0.5


@pytest.mark.parametrize(("steps", "code"), [(30, 0), (0, 1)])
def test_a_missing_form_is_no_reason_to_stop_where_the_recipe_warms_up(
    make_recipe: Any, tmp_path: Path, steps: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(dump_recipe(make_recipe(warmup={"steps": steps})))
    assert main.app(["preflight", str(tmp_path / "mine.yaml")], standalone_mode=False) == code
    told = capsys.readouterr().out
    assert ("verdict: go, by way of the recipe's warm-up" in told) == (code == 0)
    assert ("change this: " in told) == (code == 1)


def test_a_form_that_is_missing_after_the_warm_up_is_a_reason_to_stop(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "is_warm", lambda *_: True)  # as if this very model were the warm one
    monkeypatch.setattr(prepare, "begin_with_warmup", lambda *_: None)
    verdict = stages.preflight(make_recipe(), RunDir(tmp_path / "run"))
    assert (verdict.go, verdict.warms, verdict.after_warmup) == (False, True, False)


def test_without_a_warm_up_the_road_stops_and_preflight_names_the_command(make_recipe: Any, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "cold")
    with pytest.raises(MinigrpoError, match="would teach nothing"):
        stages.run_all(make_recipe(warmup={"steps": 0}), run)
    assert "minigrpo warmup RECIPE --warmup.steps 60" in read_json(run.preflight)["reasons"][0]["change"]


def test_a_warm_up_of_no_steps_is_refused(make_recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--warmup\.steps 60"):
        stages.warmup(make_recipe(warmup={"steps": 0}), RunDir(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_changed_answers_are_taught_anew_unless_training_has_gone_on(make_recipe: Any, tmp_path: Path) -> None:
    data, run = tmp_path / "answers.jsonl", RunDir(tmp_path / "run")
    data.write_text("\n".join(json.dumps(row(f"train-{i}", "yes")) for i in range(4)))
    recipe = make_recipe("mute", warmup={"steps": 1, "data": str(data)})
    first = stages.warmup(recipe, run)
    data.write_text(data.read_text() + "\n" + json.dumps(row("is 3 red", "no")))
    again = stages.warmup(recipe, run, resume=True)
    assert (first["lessons"], again["lessons"]) == (3, 4)
    assert any("have the form after the warm-up" in warning for warning in again["warnings"])
    run.checkpoints.mkdir()
    data.write_text(data.read_text().replace("no", "yes"))
    with pytest.raises(ArtifactError, match=r"other answers than warmup\.data holds now"):
        stages.warmup(recipe, run, resume=True)


def test_a_loss_without_bounds_keeps_nothing(make_recipe: Any, tmp_path: Path, echo_task: Task) -> None:
    from minigrpo.rollouts.engines.scripted import Scripted

    policy = make_policy(lora=float("nan"))
    with pytest.raises(DivergenceError, match=r"--warmup\.lr"):
        warmup(make_recipe(warmup={"steps": 1}), echo_task, policy, Scripted(["3"], policy.tokenizer))


def test_a_task_without_right_answers_says_what_to_give(make_recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no `gold`.*--warmup\.data FILE"):
        stages.warmup(make_recipe("mute"), RunDir(tmp_path / "mute"))
    assert not (tmp_path / "mute").exists()


@pytest.fixture
def answers(make_recipe: Any, tmp_path: Path, echo_task: Task) -> Any:
    """Return (taught, held aside) of a file with the given lines, for a task that cannot write answers itself."""

    def read(*lines: Any) -> Any:
        file = tmp_path / "answers.jsonl"
        file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        recipe = make_recipe(warmup={"data": str(file)})
        return prepare_answers(recipe, replace(echo_task, gold=None))

    return read


def row(prompt: Any, completion: str = "3") -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


def test_a_prompt_is_an_id_of_the_task_a_question_or_messages(answers: Any) -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "say 3"}]
    taught, aside = answers(row("train-3"), row("say three"), "", row(talk))
    found = {one.place.rpartition(":")[2]: one.prompt for one in (*taught, *aside)}
    assert found["1"].target == "3"
    assert found["2"].messages == ({"role": "user", "content": "say three"},)
    assert found["4"].messages == tuple(talk)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "is no JSON"),
        ("[1]", 'must have "prompt" and "completion"; it has list'),
        ({"prompt": "a", "text": "b"}, "it has 'prompt', 'text'"),
        (row("a", " "), "must be the text of a right answer"),
        (row("a", "\ud800"), "its completion holds half a character"),
        (row("\ud800"), "its prompt holds half a character"),
        (row(7), '"prompt" must be a prompt id'),
        (row([]), '"prompt" must be a prompt id'),
        (row([{"role": "user"}]), "is no message"),
        (row("test-21"), "to be measured on"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(answers: Any, line: Any, words: str) -> None:
    with pytest.raises(TaskError, match=rf"answers\.jsonl:2.*{words}"):
        answers(row("train-1"), line)


def test_lessons_that_answer_what_is_measured_are_found(make_recipe: Any) -> None:
    task = open_task(make_recipe())
    unseen = task.prompts("test")[0]
    taught = [WrittenAnswer(Prompt("line 1", unseen.messages), "yes", "line 1", known=False)]
    taught += [WrittenAnswer(prompt, "yes", prompt.id, known=True) for prompt in task.prompts("train")]
    assert answers_to_tests(task, taught) == taught[:1]


def test_the_same_question_about_other_puzzles_answers_no_test_prompt() -> None:
    sizes = {"games": 1, "fewest": 35, "most": 36, "example": False, "size": 20}
    task = open_task(Recipe.model_validate({"task": {"name": "sudoku", **sizes}}))
    taught = [WrittenAnswer(prompt, "...", prompt.id, known=True) for prompt in task.prompts("train")]
    unseen = task.prompts("test")[0]
    assert unseen.messages in [answer.prompt.messages for answer in taught]
    assert not answers_to_tests(task, taught)
    leaked = WrittenAnswer(replace(unseen, id="train-20"), "...", "line 21", known=True)
    assert answers_to_tests(task, [*taught, leaked]) == [leaked]


def test_a_mark_of_byte_order_and_a_separator_within_a_line_are_no_faults(answers: Any) -> None:
    taught, aside = answers("\ufeff" + json.dumps(row("train-1")), '{"prompt": "train-2", "completion": "a\u2028b"}')
    assert {one.answer for one in (*taught, *aside)} == {"3", "a\u2028b"}


def test_a_missing_file_and_too_few_prompts_are_refused(answers: Any, make_recipe: Any, echo_task: Task) -> None:
    with pytest.raises(TaskError, match=r"nowhere\.jsonl is missing"):
        prepare_answers(make_recipe(warmup={"data": "nowhere.jsonl"}), echo_task)
    with pytest.raises(TaskError, match="two different prompts"):
        answers(row("train-1"), row("train-1", "1"))


def test_all_answers_to_a_prompt_are_on_one_side(answers: Any) -> None:
    taught, aside = answers(*(row(f"train-{i % 5}", str(i)) for i in range(15)))
    assert len(aside) == 3
    assert not {one.prompt.id for one in taught} & {one.prompt.id for one in aside}


def test_prompts_kept_aside_for_evaluation_are_not_taught(make_recipe: Any, echo_task: Task) -> None:
    from minigrpo.training.prompt_sampler import split_held_out

    recipe = make_recipe(eval={"every": 1, "held_out": 5})
    held_out = {prompt.id for prompt in split_held_out(echo_task.prompts("train"), recipe.eval, recipe.seed)[1]}
    taught, aside = prepare_answers(recipe, echo_task)
    assert len(taught) + len(aside) == 15
    assert not held_out & {one.prompt.id for one in (*taught, *aside)}


def test_lessons_end_with_the_stop_token_once(answers: Any) -> None:
    policy = make_policy()
    taught, _ = answers(row("train-1", "yes"), row("train-2", "yes<|im_end|>"), row("train-3", "yes"))
    eos = policy.tokenizer.eos_token_id
    assert {lesson.answer_ids for lesson in tokenize_answers(taught, policy)} == {
        (*policy.tokenizer.encode("yes"), eos)
    }


def test_a_lesson_longer_than_the_context_is_refused_by_line(make_recipe: Any, tmp_path: Path, echo_task: Task) -> None:
    file = tmp_path / "long.jsonl"
    file.write_text("\n".join(json.dumps(row(f"train-{i}", "x" * (600 if i == 1 else 3))) for i in range(3)))
    with pytest.raises(TaskError, match=r"long\.jsonl:2: .*reads 512 at most"):
        check_warmup(make_recipe(warmup={"data": str(file)}), echo_task, make_policy())


def test_answers_learned_by_heart_are_noticed() -> None:
    cold = WarmupMeasure(0.0, 3.0, 3.0)
    assert list(memorised_warnings(cold, WarmupMeasure(1.0, 0.5, 0.6))) == []
    assert "by heart" in next(memorised_warnings(cold, WarmupMeasure(1.0, 0.1, 0.9)))


def part_of(policy: Policy) -> MicroBatch:
    (part,) = pack(made_up_groups(), OBJECTIVES["grpo"], 64).split(10**6)
    return part


@pytest.fixture
def begun(tmp_path: Path) -> tuple[Policy, MicroBatch, torch.Tensor]:
    """A policy that began with a warm adapter and has moved on since; and what the warm one said."""
    policy = make_policy(dropout=0.2)
    policy.save(tmp_path / "warm")
    policy.begin_with(tmp_path / "warm", keep_reference=True)
    part = part_of(policy)
    with policy._dropout_off(), torch.no_grad():
        said_N = policy._score(policy.model, part).logprobs_N
    set_lora(policy, 0.05, seed=6)
    return policy, part, said_N


def test_the_reference_is_the_warm_adapter_whatever_was_learned_or_restored_since(begun: Any, tmp_path: Path) -> None:
    policy, part, said_N = begun
    now = [parameter.detach().clone() for parameter in policy.trainable]
    assert torch.equal(policy.reference(part), said_N)
    assert all(torch.equal(one, other) for one, other in zip(now, policy.trainable, strict=True))
    policy.save(tmp_path / "checkpoint")
    resumed = make_policy(dropout=0.2)
    resumed.begin_with(tmp_path / "warm", keep_reference=True)
    resumed.restore(tmp_path / "checkpoint")
    assert torch.equal(resumed.reference(part), said_N)
    assert not torch.equal(resumed.logprobs(part, step=0).logprobs_N, said_N)


def test_a_reference_pass_in_between_leaves_the_gradient_as_it_is(begun: Any) -> None:
    policy, part, _ = begun
    grads = []
    for looks in (False, True):
        scores = policy.logprobs(part, step=3)
        if looks:
            policy.reference(part)
        scores.logprobs_N.sum().backward()
        grads.append([parameter.grad.clone() for parameter in policy.trainable])
        for parameter in policy.trainable:
            parameter.grad = None
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.long
def test_the_embedded_model_without_its_teachers_learns_the_form(tmp_path: Path) -> None:
    from minigrpo.models.embedded import seedling

    model = tmp_path / "school-only"
    model.mkdir()
    blueprint = seedling.Blueprint()
    seedling.build_seedling(replace(blueprint, imitation=replace(blueprint.imitation, steps=0)), model)
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(model), "device": "cpu"},
            "rollout": {"max_tokens": 64},
            "train": {"steps": 2, "lr": 1e-3, "threads": 1},
            "eval": {"limit": 20},
            "warmup": {"steps": 120, "lr": 2e-3},
        }
    )
    run = RunDir(tmp_path / "run")
    figures = stages.run_all(recipe, run)
    warmed = read_json(run.warmup / "made.json")
    assert warmed["before"]["formed"] < 0.1
    assert warmed["after"]["formed"] > 0.5
    assert figures["comparisons"]["greedy"]["after"]["scores"]["formed"]["value"] > 0.5
