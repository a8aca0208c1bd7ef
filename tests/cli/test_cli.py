"""The command line: quick, helpful, and plain where something is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import minigrpo
from minigrpo.cli import main
from minigrpo.cli.options import EXAMPLES, split_overrides
from minigrpo.config.load import field_table, load_recipe, recipe_names
from minigrpo.config.schema import TASK_NAMES
from minigrpo.errors import ModelError, RecipeError
from minigrpo.evaluation.cheaters import AttackResult, Exploit
from minigrpo.pipeline import attack, forks, stages
from minigrpo.runs.rundir import RunDir
from minigrpo.utils.rates import mean_interval

ROAD = ("preflight", "plan", "warmup", "train", "evaluate", "check", "merge", "export", "run", "quickstart")
COMMANDS = (*ROAD, "fork", "check-task", "doctor", "tasks", "recipes", "view")
SHOWN = ("report", "watch", "inspect")
DELIVERY = ("check", "merge", "export", "verify", "publish", "serve")
KNOB_COMMANDS = ("preflight", "train", "run", "quickstart")


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


@dataclass
class Spy:
    """Replaces a stage and records its arguments."""

    answer: Any = None
    args: tuple[Any, ...] = ()
    options: Any = None

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.args, self.options = args, options
        if isinstance(self.answer, BaseException):
            raise self.answer
        print("a table for people")
        return self.answer


@pytest.fixture
def minigrpo_says(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command line in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> Ended:
        with pytest.raises(SystemExit) as ended:
            main.main(list(args))
        out, err = capsys.readouterr()
        return Ended(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(stage: str, answer: Any = None) -> Spy:
        found = Spy(answer)
        monkeypatch.setattr(stages, stage, found)
        return found

    return install


def test_help_and_refusals_load_no_torch() -> None:
    code = (
        "import sys; from minigrpo.cli.main import main\n"
        "for args in (['--help'], ['train', '--help'], ['recipes'], ['train', 'quickstart', '--lora.rnak', '3']):\n"
        "    try: main(args)\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy'} & sys.modules.keys()\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_python_runs_the_package_as_the_command() -> None:
    ended = subprocess.run([sys.executable, "-m", "minigrpo", "--version"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0
    assert ended.stdout.startswith("minigrpo ")


def test_help_lists_the_commands(minigrpo_says: Any) -> None:
    ended = minigrpo_says("--help")
    assert ended.code == 0
    assert all(command in ended.out for command in COMMANDS)


def test_help_shows_the_commands_under_headings_in_the_order_of_a_run(minigrpo_says: Any) -> None:
    shown = re.findall(r"^│ ([a-z-]+) |^╭─ ([A-Z][\w ]+) ─", minigrpo_says("--help").out, re.MULTILINE)
    words = [command or heading for command, heading in shown]
    assert words[words.index("Begin") : words.index("Train and measure")] == [
        *("Begin", "quickstart", "run", "recipes", "tasks"),
        *("Before training", "check-task", "plan", "preflight", "warmup"),
    ]
    assert "Commands" not in words  # the heading of what has none


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples_in_its_help(minigrpo_says: Any, command: str) -> None:
    ended = minigrpo_says(command, "--help")
    assert ended.code == 0
    assert f"minigrpo {command}" in ended.out.partition("Examples")[2]


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_breaks_a_sentence_only_where_the_terminal_ends(minigrpo_says: Any, command: str) -> None:
    about = minigrpo_says(command, "--help").out.partition("╭")[0]
    for line, following in pairwise(line.strip() for line in about.splitlines()):
        if line and following:
            assert len(f" {line} {following.split()[0]} ") > 80, line


@pytest.mark.parametrize("width", ["80", "120"])
@pytest.mark.parametrize("command", KNOB_COMMANDS)
def test_every_knob_is_in_the_help_with_its_default_unit_and_range(
    minigrpo_says: Any, monkeypatch: pytest.MonkeyPatch, command: str, width: str
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    lines = minigrpo_says(command, "--help").out.splitlines()
    assert max(map(len, lines)) <= int(width)
    flat = " ".join(" ".join(line.strip("│ ") for line in lines).split())
    assert all(f"--{knob.name} " in flat for knob in field_table())
    assert "longest completion [default 256 tokens, 1 to 16777216]" in flat
    assert "rank of the adapter [default 64, 1 to 4096]" in flat


def test_every_example_in_the_help_is_a_command_that_parses(
    minigrpo_says: Any, spy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in ("preflight", "train", "evaluate", "run_all", "quickstart", "warmup"):
        spy(stage, {} if stage != "preflight" else VERDICT)
    spy("plan", FakePlan(True))
    spy("train_on_ranks", 0)
    monkeypatch.setattr(attack, "attack_task", lambda *_, **__: NOTHING_FOUND)
    (tmp_path / "my.yaml").write_text("seed: 1\n")
    (tmp_path / "runs/r16").mkdir(parents=True)
    (tmp_path / "runs/r16/recipe.yaml").write_text("seed: 1\n")
    (tmp_path / "train.py").write_text("GRPOTrainer(model='M', args=GRPOConfig(max_steps=1))\n")
    lines = [line.partition("#")[0].partition(">")[0] for block in EXAMPLES.values() for line in block.splitlines()]
    for words in (line.split()[1:] for line in lines if line.strip()):
        # Most of these need a trained run, or an adapter.
        if words[0] not in ("doctor", "sandbox", "fork", "replay", "audit", "adopt", "view", *SHOWN, *DELIVERY):
            assert minigrpo_says(*words).code == 0, words


@dataclass(frozen=True)
class FakeVerdict:
    go: bool
    after_warmup: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"go": self.go}


VERDICT = FakeVerdict(True)


NOTHING_FOUND = AttackResult(
    task="sums",
    prompts=2,
    chance=mean_interval([0.1, 0.3]),
    shuffled=0.1,
    solving=1.0,
    right=True,
    tried=9,
    trained=mean_interval([0.0, -0.1]),
    steps=60,
    hidden=(),
    exploits=(),
    seconds=1.0,
)


@dataclass(frozen=True)
class FakePlan:
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        return {"fits": self.fits}


@pytest.mark.parametrize(("told", "meant"), [("15GB", 15.0), ("15", 15.0), ("7.5 gb", 7.5)])
def test_a_plan_that_does_not_fit_ends_with_one(minigrpo_says: Any, spy: Any, told: str, meant: float) -> None:
    asked = spy("plan", FakePlan(False))
    ended = minigrpo_says("plan", "quickstart", "--gpu-memory", told, "--json")
    assert ended.code == 1
    assert asked.args[1] == meant
    assert json.loads(ended.out) == {"fits": False}


def test_memory_that_is_no_number_is_refused(minigrpo_says: Any) -> None:
    assert "--gpu-memory 15GB" in " ".join(minigrpo_says("plan", "quickstart", "--gpu-memory", "much").err.split())


def test_the_version_is_told(minigrpo_says: Any) -> None:
    assert minigrpo_says("--version") == Ended(0, f"minigrpo {minigrpo.__version__}\n", "")


def test_knobs_may_stand_anywhere_and_either_way(minigrpo_says: Any, spy: Any) -> None:
    train = spy("train")
    line = ("train", "--lora.rank", "16", "--train.full", "quickstart", "--train.lr=2e-5", "--seed", "7", "--resume")
    assert minigrpo_says(*line, "--samples", "--run", "runs/x").code == 0
    recipe, run = train.args
    assert (recipe.lora.rank, recipe.train.full, recipe.train.lr, recipe.seed) == (16, True, 2e-5, 7)
    assert run == RunDir(Path("runs/x"))
    assert train.options == {"resume": True, "show_samples": True}


def test_a_switch_takes_a_word_only_where_it_is_one() -> None:
    rest, pairs = split_overrides(["--train.full", "my.yaml", "--lora.rslora", "no", "--seed", "-3"], ["--run"])
    assert rest == ["my.yaml"]
    assert pairs == [("train.full", "true"), ("lora.rslora", "no"), ("seed", "-3")]


def test_after_two_dashes_nothing_is_a_knob() -> None:
    assert split_overrides(["--", "--lora.rank", "3"], []) == (["--", "--lora.rank", "3"], [])


def test_the_run_is_named_after_its_recipe(minigrpo_says: Any, spy: Any, tmp_path: Path) -> None:
    train = spy("train")
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    minigrpo_says("train", "mine.yaml")
    assert train.args[1] == RunDir(Path("runs/mine"))


def test_a_run_folder_may_stand_for_its_recipe(minigrpo_says: Any, spy: Any, tmp_path: Path) -> None:
    train = spy("train")
    (tmp_path / "runs/old").mkdir(parents=True)
    (tmp_path / "runs/old/recipe.yaml").write_text("seed: 9\n")
    minigrpo_says("train", "runs/old", "--resume")
    recipe, run = train.args
    assert (recipe.seed, run) == (9, RunDir(Path("runs/old")))


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--lora.rnak", "16"), "Did you mean lora.rank?"),
        (("--lr", "1e-5"), "Did you mean train.lr?"),
        (("--lora.rank", "0"), "lora.rank is 0, but must be a whole number, 1 to 4096"),
        (("--lora.rank",), "--lora.rank needs a value"),
        (("--rollout.completions", "1"), "A group of one compares nothing"),
        (("--lora", "16"), "lora is a section"),
        (("--rezume",), "--resume"),
        (("--zebra",), "--zebra"),
    ],
)
def test_a_wrong_option_ends_with_two_and_the_right_name(minigrpo_says: Any, args: tuple[str, ...], told: str) -> None:
    ended = minigrpo_says("train", "quickstart", *args)
    assert ended.code == 2
    assert told in ended.err
    assert "Traceback" not in ended.err
    assert ended.out == ""


@pytest.mark.parametrize("args", [("train",), ("trian",), ("train", "nowhere.yaml"), ("recipes", "nope"), ()])
def test_a_line_that_cannot_be_run_ends_with_two(minigrpo_says: Any, args: tuple[str, ...]) -> None:
    assert minigrpo_says(*args).code == 2


@pytest.mark.parametrize("command", ["train", "run"])
def test_a_run_folder_that_exists_is_refused_with_what_to_do(minigrpo_says: Any, tmp_path: Path, command: str) -> None:
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    (tmp_path / "runs/quickstart/recipe.yaml").write_text("seed: 1\n")
    ended = minigrpo_says(command, "quickstart")
    assert ended.code == 2
    assert "--resume" in ended.err
    assert "--run" in ended.err


def test_what_a_user_can_mend_ends_as_one_sentence_and_where_more_of_it_stands(minigrpo_says: Any, spy: Any) -> None:
    spy("train", ModelError("models/x has no config.json. [Download] it again."))
    ended = minigrpo_says("train", "quickstart")
    more = "More: docs/troubleshooting.md#a-model-is-refused"
    assert ended == Ended(2, "", f"error: models/x has no config.json. [Download] it again.\n{more}\n")


def test_a_fault_of_ours_keeps_its_traceback(spy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    spy("train", ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main.main(["train", "quickstart"])


def test_control_c_ends_with_130_and_what_was_kept(minigrpo_says: Any, spy: Any) -> None:
    spy("train", KeyboardInterrupt("Stopped after step 3 of 10."))
    assert minigrpo_says("train", "quickstart") == Ended(130, "", "Stopped after step 3 of 10.\n")


@pytest.mark.parametrize(("go", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_of_preflight_is_its_verdict(minigrpo_says: Any, spy: Any, go: bool, code: int) -> None:
    spy("preflight", FakeVerdict(go))
    assert minigrpo_says("preflight", "quickstart").code == code


@pytest.mark.parametrize(
    ("stage", "args"),
    [
        ("preflight", ("preflight", "quickstart")),
        ("evaluate", ("evaluate", "models/x")),
        ("run_all", ("run", "quickstart")),
        ("quickstart", ("quickstart",)),
    ],
)
def test_with_json_nothing_else_is_on_stdout(minigrpo_says: Any, spy: Any, stage: str, args: tuple[str, ...]) -> None:
    spy(stage, VERDICT if stage == "preflight" else {"accuracy": 0.5})
    ended = minigrpo_says(*args, "--json")
    assert ended.code == 0
    assert isinstance(json.loads(ended.out), dict)
    assert "a table for people" in ended.err


def test_evaluate_takes_the_recipe_of_the_run_that_made_the_model(minigrpo_says: Any, spy: Any, tmp_path: Path) -> None:
    evaluate = spy("evaluate", {})
    (tmp_path / "runs/old/adapter").mkdir(parents=True)
    (tmp_path / "runs/old/recipe.yaml").write_text("seed: 9\n")
    for model in ("runs/old", "runs/old/adapter", "runs/old/warmup", "runs/old/gguf/old-Q8_0.gguf"):
        minigrpo_says("evaluate", model, "--n", "4", "--rollout.max_tokens", "99")
        assert evaluate.args[0] == model
        assert (evaluate.args[1].seed, evaluate.args[1].rollout.max_tokens) == (9, 99)
        assert evaluate.options == {
            "base": None,
            "limit": None,
            "n": 4,
            "temperature": 1.0,
            "split": "test",
            "out": None,
        }


def test_one_answer_is_the_likeliest_by_default(minigrpo_says: Any, spy: Any) -> None:
    evaluate = spy("evaluate", {})
    minigrpo_says("evaluate", "models/x")
    assert evaluate.options["temperature"] == 0.0


def test_a_fork_takes_its_changes_one_by_one(minigrpo_says: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Spy({"kl": 0.5})
    monkeypatch.setattr(forks, "fork", asked)
    line = ("--set", "task.weights.format=0", "--set", "task.system=a=b", "--steps", "5", "--times", "3")
    ended = minigrpo_says("fork", "runs/x", "--at", "50", *line, "--json")
    assert (ended.code, json.loads(ended.out)) == (0, {"kl": 0.5})
    assert asked.args == (RunDir(Path("runs/x")),)
    assert asked.options["change"] == [("task.weights.format", "0"), ("task.system", "a=b")]
    assert (asked.options["at"], asked.options["steps"], asked.options["times"]) == (50, 5, 3)
    assert "Write the knob and its value" in minigrpo_says("fork", "runs/x", "--at", "50", "--set", "train.lr").err


def test_an_attack_that_finds_something_ends_with_one_and_shows_it(
    minigrpo_says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = Exploit("no text at all", 0.5, mean_interval([0.3, 0.5, 0.4]), {"length": 0.4}, (("[b]", 0.5),))
    monkeypatch.setattr(attack, "attack_task", lambda *_, **__: replace(NOTHING_FOUND, exploits=(way,)))
    ended = minigrpo_says("check-task", "--attack")
    assert ended.code == 1
    assert all(words in ended.out for words in ("no text at all", "length +0.4", "[b]", "1 way to be paid"))
    told = minigrpo_says("check-task", "--attack", "--json")
    assert (told.code, json.loads(told.out)["exploits"][0]["name"]) == (1, "no text at all")


def test_recipes_lists_them_and_prints_one_that_can_be_read_back(minigrpo_says: Any, tmp_path: Path) -> None:
    assert all(name in minigrpo_says("recipes").out for name in recipe_names())
    (tmp_path / "my.yaml").write_text(minigrpo_says("recipes", "quickstart").out, encoding="utf-8")
    assert load_recipe("my.yaml") == load_recipe("quickstart")
    assert json.loads(minigrpo_says("recipes", "quickstart", "--json").out)["lora"]["rank"]


def test_tasks_lists_them_and_says_where_others_come_from(minigrpo_says: Any) -> None:
    listed = json.loads(minigrpo_says("tasks", "--json").out)
    assert [row["name"] for row in listed] == [*TASK_NAMES, "rg:NAME", "FILE.py:NAME"]
    assert all(row["about"] for row in listed)


def test_the_entry_point_is_installed() -> None:
    program = Path(sys.executable).with_name("minigrpo.exe" if os.name == "nt" else "minigrpo")
    ended = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60)
    assert ended.stdout == f"minigrpo {minigrpo.__version__}\n"


def test_an_option_without_its_value_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(RecipeError, match="needs a value"):
        split_overrides(["--lora.rank", "--seed", "3"], [])
