"""The files in examples/ are short, fit to train on, and train."""

from pathlib import Path

import pytest

from minigrpo.cli import main
from minigrpo.config.load import load_recipe
from minigrpo.runs.rundir import RunDir

EXAMPLES = Path(__file__).parents[2] / "examples"
LINES = {
    "per_row.py": ("quickstart", "--task.name", f"{EXAMPLES}/per_row.py:score"),
    "trl_style.py": ("quickstart", "--task.name", f"{EXAMPLES}/trl_style.py:reward"),
    "code_task.py": ("quickstart", "--task.name", f"{EXAMPLES}/code_task.py:task"),
    "reasoning_gym.yaml": (f"{EXAMPLES}/reasoning_gym.yaml",),
}
EACH = [
    pytest.param(name, marks=pytest.mark.extra("reasoning-gym")) if name.startswith("reasoning_gym") else name
    for name in LINES
]
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


@pytest.mark.parametrize("name", EACH)
def test_an_example_trains(tiny_folder, tmp_path, name):
    run = RunDir(tmp_path / "run")
    # Commands end by returning or with SystemExit(0).
    with pytest.raises(SystemExit) as ended:
        main.main(["train", *LINES[name], *BRIEF, "--model.path", str(tiny_folder("llama")), "--run", str(run.path)])
    assert not ended.value.code
    assert len(run.metrics.read_text().splitlines()) == 2
    assert (run.adapter / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", EACH)
def test_an_example_is_fit_to_train_on(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["check-task", *LINES[name]])
    assert not ended.value.code, capsys.readouterr().out


def test_the_recipe_among_the_examples_says_what_it_is_for():
    assert load_recipe(str(EXAMPLES / "reasoning_gym.yaml")).about
