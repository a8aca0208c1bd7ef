"""User-defined reward functions: which kind they are, what they are passed, and what they must not do."""

import asyncio
import math

import pytest

from minigrpo.config.schema import Recipe, TaskConfig
from minigrpo.errors import TaskError
from minigrpo.rollouts.engines.scripted import Scripted
from minigrpo.rollouts.groups import rollout
from minigrpo.tasks.custom.reward_functions import function_kind
from minigrpo.tasks.custom.reward_task import reward_task
from minigrpo.tasks.registry import open_task
from minigrpo.training.metrics import group_metrics
from minigrpo.types import Completion, Sampling

ROWS = [{"prompt": f"say {i}", "answer": str(i), "level": i % 3} for i in range(20)]
CHATS = [{"prompt": [{"role": "user", "content": f"say {i}"}], "answer": str(i)} for i in range(20)]


def grades(*functions, rows=ROWS, texts=("0", "7"), **options):
    task = reward_task(*functions, rows=rows, **options)
    prompt = next(prompt for prompt in task.prompts("train") if prompt.target["answer"] == "7")
    return task.grade_group(prompt, [Completion(text, (1, 2), (0.0, 0.0), "stop") for text in texts])


def rewards(*functions, **options):
    return [grade.reward for grade in grades(*functions, **options)]


def right(completion, answer):
    return completion == answer


def batched(prompts, completions, completion_ids, trainer_state, answer, **columns):
    assert len(prompts) == len(completions) == len(completion_ids) == len(answer) == 2
    assert trainer_state.global_step is None
    assert columns["level"] == [1, 1]
    return [float(text == gold) for text, gold in zip(completions, answer, strict=True)]


def test_a_row_function_is_passed_what_its_parameters_name():
    assert rewards(right) == [0.0, 1.0]
    assert rewards(lambda completion: len(completion)) == [1.0, 1.0]
    assert rewards(lambda completion, prompt, level: (prompt == "say 7") + level) == [2.0, 2.0]
    assert rewards(lambda completion, nothing=3: nothing) == [3.0, 3.0]


def test_a_trl_function_is_passed_all_siblings_at_once():
    assert rewards(batched) == [0.0, 1.0]


def test_conversations_come_as_messages_as_trl_does_it():
    def talks(prompts, completions, **columns):
        assert prompts[0] == [{"role": "user", "content": "say 7"}]
        return [float(said == [{"role": "assistant", "content": "7"}]) for said in completions]

    assert rewards(talks, rows=CHATS) == [0.0, 1.0]


def test_async_functions_are_awaited_even_where_a_loop_is_running():
    async def slow(completions, answer, **columns):
        await asyncio.sleep(0)
        return [1.0, 2.0]

    async def in_a_notebook():
        return rewards(slow)

    assert rewards(slow) == [1.0, 2.0] == asyncio.run(in_a_notebook())


def test_parts_are_kept_unweighted_beside_their_weights():
    _, grade = grades(right, batched, weights={"batched": 0.5})
    assert grade.reward == 1.5
    assert grade.parts == {"right": 1.0, "batched": 1.0}
    assert grade.weights == {"right": 1.0, "batched": 0.5}
    assert grade.solved


def test_what_a_function_logs_stands_in_notes_and_metrics():
    def logs(completions, log_extra, log_metric, **columns):
        log_extra("length", [len(text) for text in completions])
        log_metric("seen", 1)
        log_metric("seen", 3)
        return [0.0] * len(completions)

    first, _ = grades(logs, texts=("four", "7"))
    assert (first.notes, first.metrics) == ({"length": 4}, {"seen": 2.0})


def test_none_leaves_a_function_out_and_all_none_leaves_the_completion_out():
    def sometimes(completion):
        return None if completion == "0" else 1.0

    alone, both = grades(sometimes), grades(sometimes, right)
    assert math.isnan(alone[0].reward)
    assert not alone[0].formed
    assert "sometimes gave None" in alone[0].notes["grader"]
    assert (both[0].reward, both[0].parts) == (0.0, {"right": 0.0})


@pytest.mark.parametrize("value", ["1.0", math.nan, math.inf, [1.0], {}, object(), 10**400, 1j])
def test_what_is_no_finite_number_is_refused_with_its_function_and_prompt(value):
    def odd(completion):
        return value

    with pytest.raises(TaskError, match=r"odd gave .* for prompt train-\d+, answer '0'. Return a finite number"):
        grades(odd)
    with pytest.raises(TaskError, match="fellow gave"):
        grades(renamed("fellow", lambda completions, **columns: [value, value]))


def renamed(name, function):
    function.__name__ = name
    return function


@pytest.mark.parametrize("value", [[1.0], [1.0] * 3, None, 1.0, "12", {0: 1.0, 1: 1.0}, (x for x in (1.0, 2.0))])
def test_a_batch_of_the_wrong_shape_is_refused(value):
    with pytest.raises(
        TaskError, match=r"fellow gave .* for the 2 completions of prompt train-\d+. Return a list of 2"
    ):
        grades(renamed("fellow", lambda completions, **columns: value))


def test_a_function_that_raises_is_named_with_its_line():
    def falls(completion, answer):
        return 1 / (len(completion) - 1)

    with pytest.raises(TaskError, match=r"falls raised ZeroDivisionError.*test_reward_functions.py:\d+.*answer '0'"):
        grades(falls)
    with pytest.raises(TaskError, match="raised SystemExit"):
        grades(lambda completion: exit(3))


def test_no_function_can_change_the_rows_or_what_the_next_one_sees():
    rows = [{"prompt": [{"role": "user", "content": f"say {i}"}], "answer": str(i), "tags": ["a"]} for i in range(9)]

    def changes(prompts, completions, completion_ids, tags, answer):
        for thing in (prompts, completions, completion_ids, tags, answer):
            (thing[0] if isinstance(thing[0], list) else thing).clear()
            thing.clear()
        return [0.0, 0.0]

    def spoils(completion, prompt, tags):
        prompt[0]["content"] = "spoilt"
        tags.append(completion)

    def looks(prompts, completions, tags, **columns):
        return [float(prompts == [[{"role": "user", "content": "say 7"}]] * 2 and tags == [["a"]] * 2)] * 2

    assert [grade.parts["looks"] for grade in grades(changes, spoils, looks, rows=rows)] == [1.0, 1.0]
    assert all(row["tags"] == ["a"] and row["prompt"][0]["content"].startswith("say") for row in rows)


def test_an_unknown_parameter_is_refused_with_the_one_that_was_meant():
    with pytest.raises(TaskError, match=r"asks for 'anwser'.*Did you mean answer\?"):
        grades(lambda completion, anwser: 1.0)
    with pytest.raises(TaskError, match=r"Did you mean completion in place of completoin\?"):
        function_kind(lambda completoin, answer: 1.0, "mine.py:score")
    with pytest.raises(TaskError, match=r"rows\[3\] does not have"):
        grades(lambda completion, level: 1.0, rows=[*ROWS[:3], {"prompt": "say 7", "answer": "7"}, *ROWS[8:]])


def test_functions_that_share_a_name_or_take_positional_parameters_are_refused():
    with pytest.raises(TaskError, match="share a name"):
        grades(right, right)
    with pytest.raises(TaskError, match="by position alone"):
        grades(lambda completion, answer, /: 1.0)
    with pytest.raises(TaskError, match="no reward function"):
        grades()
    with pytest.raises(TaskError, match="which this task does not have"):
        grades(right, weights={"rigth": 1.0})


FILE = """
rows = [{"prompt": f"say {i}", "answer": str(i)} for i in range(12)]

def score(completion, answer):
    return completion == answer

def short(completions, **columns):
    return [-len(text) for text in completions]

both = [score, short]
mixed = [score, 3]
system = "Be brief."
"""


@pytest.fixture
def opened(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)

    def open_it(name, **knobs):
        return open_task(Recipe(task=TaskConfig(name=f"{tmp_path}/mine.py:{name}", **knobs)))

    return open_it


def test_a_file_of_functions_and_rows_is_a_task(opened):
    task = opened("both", size=5, weights={"short": 0.1})
    prompt = task.prompts("train")[0]
    assert len(task.prompts("train")) == 5
    assert [message["role"] for message in prompt.messages] == ["system", "user"]
    assert task.grade(prompt, task.gold(prompt)).reward == pytest.approx(1 - 0.1 * len(prompt.target["answer"]))
    assert opened("short").grade(prompt, "four").reward == -4


def test_a_list_of_other_things_and_functions_without_rows_are_refused(opened, tmp_path):
    with pytest.raises(TaskError, match="not of reward functions alone"):
        opened("mixed")
    (tmp_path / "bare.py").write_text("def score(completion):\n    return 1\n")
    with pytest.raises(TaskError, match=r"there are none. Give --task.data FILE"):
        open_task(Recipe(task=TaskConfig(name=f"{tmp_path}/bare.py:score")))
    (tmp_path / "bad.py").write_text("def score(completion):\n    return 1\n\ndef rows():\n    return [1 / 0]\n")
    with pytest.raises(TaskError, match=r"bad.py, line 5: ZeroDivisionError"):
        open_task(Recipe(task=TaskConfig(name=f"{tmp_path}/bad.py:score")))


def roll(task, script, tokenizer):
    prompts = task.prompts("train")[:3]
    return rollout(Scripted(script, tokenizer), task, prompts, n=2, sampling=Sampling(), tokenizer=tokenizer)


def test_a_completion_that_nothing_applies_to_is_left_out_and_counted(tokenizer):
    task = reward_task(lambda completion: 1.0 if completion == "a" else None, rows=ROWS)
    with pytest.warns(UserWarning, match=r"Left out.*lambda gave None.*first on prompt train-1"):
        groups = roll(task, ["a", "b"], tokenizer)
    figures = group_metrics(groups)
    assert (figures["unscored"], figures["reward"], figures["rewards/lambda/mean"]) == (0.5, 1.0, 1.0)
    assert math.isnan(figures["reward_std"])  # no group has two to compare


def test_a_step_in_which_nothing_applies_is_refused_with_the_functions(tokenizer):
    with pytest.raises(TaskError, match=r"could not score one completion of this step.*lambda gave None"):
        roll(reward_task(lambda completion: None, rows=ROWS), ["a", "b"], tokenizer)
