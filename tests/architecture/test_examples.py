"""The files in examples/ are short, fit to train on, and train. And what reasoning-gym gives is told apart."""

import builtins
from pathlib import Path

import pytest

from minigrpo.cli import main
from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe, TaskConfig
from minigrpo.errors import TaskError
from minigrpo.runs.rundir import RunDir
from minigrpo.tasks.registry import open_task

EXAMPLES = Path(__file__).parents[2] / "examples"
LINES = {
    "per_row.py": ("quickstart", "--task.name", f"{EXAMPLES}/per_row.py:score"),
    "trl_style.py": ("quickstart", "--task.name", f"{EXAMPLES}/trl_style.py:reward"),
    "code_task.py": ("quickstart", "--task.name", f"{EXAMPLES}/code_task.py:task"),
    "reasoning_gym.yaml": (f"{EXAMPLES}/reasoning_gym.yaml",),
}
BRIEF = (
    *("--train.steps", "2", "--train.tokens_per_pass", "512", "--lora.rank", "2", "--task.size", "8"),
    *(
        "--rollout.prompts",
        "2",
        "--rollout.completions",
        "2",
        "--rollout.max_tokens",
        "6",
        "--model.device",
        "cpu",
        "--warmup.steps",
        "0",
    ),
)


def test_every_example_is_short():
    assert {file.name for file in EXAMPLES.iterdir() if file.is_file()} == LINES.keys()
    longest = {"code_task.py": 30}
    assert all(len((EXAMPLES / name).read_text().splitlines()) <= longest.get(name, 10) for name in LINES)


@pytest.mark.parametrize("name", LINES)
def test_an_example_trains(tiny_folder, tmp_path, name):
    run = RunDir(tmp_path / "run")
    # Commands end by returning or with SystemExit(0).
    with pytest.raises(SystemExit) as ended:
        main.main(["train", *LINES[name], *BRIEF, "--model.path", str(tiny_folder("llama")), "--run", str(run.path)])
    assert not ended.value.code
    assert len(run.metrics.read_text().splitlines()) == 2
    assert (run.adapter / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", LINES)
def test_an_example_is_fit_to_train_on(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["check-task", *LINES[name]])
    assert not ended.value.code, capsys.readouterr().out


def gym(name="leg_counting", seed=0, size=32):
    return open_task(Recipe(seed=seed, task=TaskConfig(name=f"rg:{name}", size=size)))


def test_problems_are_the_same_for_a_seed_and_never_on_both_sides():
    train, test = gym().prompts("train"), gym().prompts("test")
    assert gym().prompts("train") == train
    assert gym(seed=1).prompts("test") == test
    assert gym(seed=1).prompts("train") != train
    assert len(train) == 32
    assert not {prompt.messages for prompt in map(hashable, train)} & {p.messages for p in map(hashable, test)}


def hashable(prompt):
    from dataclasses import replace

    return replace(prompt, messages=tuple(message["content"] for message in prompt.messages))


def test_a_right_answer_earns_all_and_a_wrong_one_its_form_alone():
    task = gym()
    prompt = task.prompts("train")[0]
    right = task.grade(prompt, task.gold(prompt))
    assert (right.parts, right.solved) == ({"score": 1.0, "format": 1.0}, True)
    wrong = task.grade(prompt, "<think></think><answer>-1</answer>")
    assert (wrong.parts, wrong.solved) == ({"score": 0.0, "format": 1.0}, False)
    assert task.grade(prompt, prompt.target["answer"]).reward == 0.0


def test_crumbs_for_wrong_answers_are_nothing():
    task = gym("chain_sum")  # its scorer gives 0.01 and more for any wrong text
    for prompt in task.prompts("train")[:8]:
        assert task.grade(prompt, "<think></think><answer>none</answer>").parts["score"] == 0.0


def test_a_name_that_reasoning_gym_does_not_know_is_refused_with_the_nearest():
    with pytest.raises(TaskError, match=r"no data set 'leg_countin'. Did you mean rg:leg_counting\?"):
        gym("leg_countin")
    with pytest.raises(TaskError, match=r"task\.data has no meaning for rg:leg_counting"):
        open_task(Recipe(task=TaskConfig(name="rg:leg_counting", data="x.jsonl")))


def test_without_the_package_its_pip_line_is_told(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name.startswith("reasoning_gym"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(TaskError, match=r"pip install 'minigrpo\[reasoning-gym\]'"):
        gym()


def test_the_recipe_among_the_examples_says_what_it_is_for():
    assert load_recipe(str(EXAMPLES / "reasoning_gym.yaml")).about
