"""Every code block of the pages runs, or is listed with the reason and is checked as far as it can be.

A command runs as the page shows it, with options that make it short (tests/helpers/newcomer.py). What is not run is
parsed: its command, arguments and options are known, and its recipe loads with them.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer.main

import minigrpo
from minigrpo.cli.main import app
from minigrpo.cli.options import OVERRIDES, RecipeCommand
from minigrpo.config.load import load_recipe, recipe_names
from minigrpo.errors import MinigrpoError
from tests.helpers.listed_blocks import DRAWN, KNOWN_WORDS, LONG, MADE_PAGES, NOT_RUN, OTHER_TOOLS, PRINTED
from tests.helpers.marks import rest_is_long
from tests.helpers.newcomer import TASK, Newcomer, newcomers
from tests.helpers.pages import (
    BLOCK_PAGES,
    ROOT,
    Block,
    commands_of,
    every_block,
    outside_of_blocks,
    share_of_known_words,
    words_of,
)

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

PYTHON = {
    ("README.md", "# letters.py"): "the commands of README train with it",
    ("README.md", 'RunDir("runs/from-python")'): "test_the_python_of_the_readme_runs",
    ("tasks.md", "# letters.py"): "the commands of the page train with it",
    ("tasks.md", "both = [score, reward]"): "test_the_reward_functions_of_the_page_grade_what_is_said_of_them",
    ("tasks.md", "code_task([double, square]"): "test_the_code_task_of_the_page_pays_its_right_answer",
    ("attack.md", "def anywhere"): "test_the_weak_grader_of_the_attack_finds_the_number_anywhere",
    ("sandbox.md", "def referee"): "test_the_referee_of_the_sandbox_page_referees",
    ("sudoku.md", "def strategy"): "test_the_sudoku_page_shows_the_strategies_that_the_game_asks_for",
    ("sudoku.md", "generate_strategies"): "test_the_script_of_the_sudoku_page_writes_answers_for_the_warm_up",
}
"""Blocks of Python, with the test that runs them."""

SETTINGS = {
    ("sudoku.md", "# sudoku-coder.yaml"): "test_the_recipes_of_the_pages_load",
    ("warmup.md", "warmup:"): "test_the_recipes_of_the_pages_load",
    ("tasks.md", "# quality.yaml"): "test_the_judge_of_the_page_is_one",
    ("tasks.md", '"level": 1'): "test_the_rows_of_the_page_are_read",
    ("warmup.md", '"prompt": "train-17"'): "test_the_written_answers_of_the_page_are_read",
}
"""Blocks of YAML and JSON, with the test that reads them."""

LANGUAGES = ("bash", "console", "text", "python", "yaml", "json")

IN_ORDER = ("README.md",)
"""Pages whose commands run one after the other, in a folder that is empty but for what the page shows."""


def table_of(block: Block) -> dict[tuple[str, str], str]:
    if block.language == "python":
        return PYTHON
    return SETTINGS if block.language in ("yaml", "json") else PRINTED | DRAWN


def block_of(page: str, words: str) -> Block:
    (found,) = [block for block in every_block() if block.is_listed_as((page, words))]
    return found


def reason_not_to_run(command: str) -> str | None:
    table = NOT_RUN if command.startswith("minigrpo ") else OTHER_TOOLS
    return next((reason for part, reason in table.items() if re.search(part, command)), None)


def test_every_block_runs_or_is_listed_with_the_reason() -> None:
    for block in every_block():
        assert block.language in ("bash", "console", "text", "python", "yaml", "json"), (
            f"{block.place}: which language?"
        )
        if block.language == "bash":
            for command in commands_of(block):
                assert command.startswith("minigrpo ") or reason_not_to_run(command), f"{block.place}: {command}"
        elif MADE_PAGES.get(block.page) != block.language:
            named = [name for name in table_of(block) if block.is_listed_as(name)]
            assert len(named) == 1, f"{block.place}: what runs this block, or how is it known to be true? {named}"


@pytest.mark.parametrize("page", BLOCK_PAGES, ids=lambda page: page.name)
def test_no_page_has_a_block_without_a_fence(page: Path) -> None:
    """An indented line after an empty one is code, unless it belongs to the item of a list."""
    in_list = False
    for before, line in pairwise(["", *outside_of_blocks(page)]):
        assert not (line.startswith("    ") and not before and not in_list), line
        in_list = bool(re.match(r" *([-*]|\d+\.) ", line)) or (in_list and not re.match(r"\S", line))


def test_no_table_lists_what_the_pages_do_not_show() -> None:
    blocks = list(every_block())
    for name in (*PRINTED, *DRAWN, *PYTHON, *SETTINGS):
        assert any(block.is_listed_as(name) for block in blocks), name
    commands = [command for block in every_block("bash") for command in commands_of(block)]
    for table, own in ((NOT_RUN, True), (OTHER_TOOLS, False)):
        for part in table:
            assert any(re.search(part, one) for one in commands if one.startswith("minigrpo ") is own), part


def test_every_test_that_a_table_names_is_there() -> None:
    named = [test for table in (PYTHON, SETTINGS) for test in table.values() if test.startswith("test_")]
    assert [test for test in named if test not in globals()] == []
    folders = re.findall(r"tests/\w+(?:/\w+\.py)?", str([NOT_RUN, OTHER_TOOLS, PRINTED, DRAWN]))
    assert [folder for folder in folders if not (ROOT / folder).exists()] == []


# Commands


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Newcomer]:
    with newcomers(tmp_path_factory.mktemp("newcomer")) as found:
        yield found


def commands_by_page(*, long: bool) -> dict[str, list[str]]:
    """Return the commands of minigrpo that are run by the page that has them first, whatever it calls the run."""
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for block in every_block("bash"):
        in_order = block.page in IN_ORDER
        for command in commands_of(block):
            runs = command.startswith("minigrpo ") and not reason_not_to_run(command)
            alike = command if in_order else re.sub(r"runs/\w+|\b(my|mine)\.yaml|me/[\w-]+", "NAME", command)
            if runs and alike not in seen and (not in_order and LONG.search(command) is not None) is long:
                found.setdefault(block.page, []).append(command)
            seen.add(alike)
    return found


SLOW_PAGE = "commands.md"
"""Made from `--help`, with an example of every command; other pages show most of them, too."""


@pytest.mark.extra("gguf")
@pytest.mark.parametrize(
    "page",
    rest_is_long(commands_by_page(long=False), *(page for page in commands_by_page(long=False) if page != SLOW_PAGE)),
)
def test_the_commands_of_a_page_run(page: str, newcomer: Newcomer, tmp_path: Path) -> None:
    do_all(newcomer, page, commands_by_page(long=False)[page], tmp_path / "home")


@pytest.mark.long
@pytest.mark.extra("gguf")
@pytest.mark.parametrize("page", commands_by_page(long=True))
def test_the_long_commands_of_a_page_run(page: str, newcomer: Newcomer, tmp_path: Path) -> None:
    do_all(newcomer, page, commands_by_page(long=True)[page], tmp_path / "home")


def do_all(newcomer: Newcomer, page: str, commands: list[str], home: Path) -> None:
    in_order = page in IN_ORDER
    if in_order:
        home.mkdir()
    else:
        shutil.copytree(newcomer.folder, home)
    for block in every_block("python"):
        if block.page == page and (file := re.match(r"# (\w+\.py)\n", block.text)):
            (home / file[1]).write_text(block.text)
    one = Newcomer(newcomer.server, newcomer.whole, home)
    for command in commands:
        one.do(command, in_order=in_order)
    if page == "README.md":
        assert_readme_kept_its_promises(home)


def assert_readme_kept_its_promises(home: Path) -> None:
    assert (home / "runs/mine/adapter/adapter_model.safetensors").is_file()
    lines = (home / "runs/letters/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    explained = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    for name in json.loads(lines[-1]):
        pieces = name.split("/")
        known = pieces[0] == "rewards" or f"`{name}`" in explained or f"`{pieces[-1]}`" in explained
        assert known or f"/{pieces[-1]}`" in explained, name


def parsed_commands() -> list[Any]:
    """Return the commands of minigrpo that are not run: in `bash` blocks, at the end of torchrun's, and after a `$`."""
    found = {
        f"minigrpo {part}": block.place
        for block in every_block("bash")
        for command in commands_of(block)
        if "minigrpo " in command and reason_not_to_run(command)
        for part in [command.partition("minigrpo ")[2]]
    }
    found |= {
        command[2:]: block.place
        for block in every_block("console")
        for command in block.text.splitlines()
        if command.startswith("$ ")
    }
    return [pytest.param(command, id=f"{place} {command}") for command, place in found.items()]


@pytest.mark.parametrize("command", parsed_commands())
def test_a_command_that_is_not_run_is_one_of_the_command_line(
    command: str, newcomer_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(newcomer_files)
    verb, *given = words_of(command)[0][1:]
    context = COMMANDS[verb].make_context(f"minigrpo {verb}", given)
    if isinstance(COMMANDS[verb], RecipeCommand):
        named = context.params.get("recipe")
        load_recipe(named if named in recipe_names() else None, context.meta[OVERRIDES])


@pytest.fixture(scope="module")
def newcomer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that recipes may name; no model."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("mine.py", "letters.py", "planted.py"):
        (folder / name).write_text(TASK)
    return folder


def shown(part: str) -> list[str]:
    return sorted({command for block in every_block("bash") for command in commands_of(block) if part in command})


@pytest.mark.parametrize("command", shown("python -m benchmarks"))
def test_the_benchmarks_have_the_options_that_a_page_names(command: str) -> None:
    module = re.match(r"python -m (\S+)", command)
    assert module
    spec = find_spec(module[1] if module[1] != "benchmarks" else "benchmarks.__main__")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    for option in re.findall(r"--[a-z][\w-]*", command):
        assert option == "--help" or f'"{option}"' in source, option


@pytest.mark.parametrize("command", shown("make "))
def test_the_targets_that_a_page_makes_are_there(command: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("block", list(every_block("text", "console")), ids=lambda block: block.place)
def test_printed_text_on_a_page_is_in_the_words_of_the_package(block: Block) -> None:
    if any(block.is_listed_as(name) for name in PRINTED):
        assert share_of_known_words(block.text) > KNOWN_WORDS


# Troubles, planted as a newcomer meets them


@dataclass(frozen=True)
class Trouble:
    """`remedy`: words of the page's entry that mend it."""

    command: str
    entry: str
    remedy: str


TROUBLES = {
    "nothing earns anything": Trouble(
        "minigrpo train my.yaml --task.name mine.py:never --train.steps 5", "reward-stays-at-0", "--warmup.steps"
    ),
    "all answers are cut off": Trouble(
        "minigrpo train my.yaml --train.steps 5", "answers-are-cut-off", "--rollout.max_tokens"
    ),
    "the loss explodes": Trouble(
        "minigrpo train my.yaml --train.lr 1 --objective.kl 0.01 --train.steps 60", "training-exploded", "a lower rate"
    ),
    "too little memory": Trouble(
        "minigrpo plan my.yaml --gpu-memory 0.05GB", "it-does-not-fit-into-memory", "minigrpo plan"
    ),
    "a file without a chat template": Trouble(
        "minigrpo serve bare.gguf --once --question hello", "a-gguf-file-answers-nonsense", "minigrpo export"
    ),
}


@pytest.mark.extra("gguf")
@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=list(TROUBLES))
def test_what_is_printed_in_a_trouble_names_the_entry_that_mends_it(
    trouble: Trouble, newcomer: Newcomer, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    shutil.copytree(newcomer.folder, home)
    (home / "bare.gguf").write_bytes((home / "model.gguf").read_bytes().replace(b"chat_template", b"chat_mislaid_"))
    printed = Newcomer(newcomer.server, newcomer.whole, home).told(trouble.command)
    assert f"More: docs/troubleshooting.md#{trouble.entry}" in " ".join(printed.split())
    assert trouble.remedy in entries_of_troubleshooting()[trouble.entry]


def entries_of_troubleshooting() -> dict[str, str]:
    """Return the text of each entry by its anchor, as GitHub and the site make it of the heading."""
    parts = re.split(r"^### (.*)\n", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    anchors = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in parts[1::2]]
    return dict(zip(anchors, parts[2::2], strict=True))


def kinds_of_errors(kind: type[MinigrpoError] = MinigrpoError) -> Iterator[type[MinigrpoError]]:
    yield kind
    for one in kind.__subclasses__():
        yield from kinds_of_errors(one)


def test_every_error_of_the_package_names_an_entry_of_the_troubleshooting_page() -> None:
    """Each kind of error has one; where the package raises another kind or names another entry, that one is there."""
    entries = entries_of_troubleshooting()
    assert [kind for kind in kinds_of_errors() if kind.entry not in entries] == []
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    named = set(re.findall(r"""(?:entry=|more_at\(|NONSENSE = )["']([a-z0-9-]+)""", source))
    assert len(named) >= 10
    assert named <= entries.keys()


# Python


def defined(block: Block, **names: Any) -> dict[str, Any]:
    """Run a block and return its names. `names`: those that the page leaves to the reader."""
    exec(compile(block.text, block.place, "exec"), names)
    return names


@pytest.mark.parametrize("block", [b for b in every_block("python") if b.page == "python.md"], ids=lambda b: b.place)
def test_the_names_of_the_python_page_are_handed_out(block: Block) -> None:
    name = re.match(r"(?:class|def) (\w+)", block.text)
    assert name
    assert callable(getattr(minigrpo, name[1]))


def test_what_the_blocks_import_is_there_and_is_called_with_what_it_takes() -> None:
    for block in every_block("python"):
        if block.page == "python.md":
            continue
        tree = ast.parse(block.text)
        names: dict[str, Any] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = __import__(str(node.module), fromlist=["_"])
                names |= {each.asname or each.name: getattr(module, each.name) for each in node.names}
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Name) and inspect.isfunction(names.get(call.func.id)):
                options = {word.arg: None for word in call.keywords if word.arg}
                inspect.signature(names[call.func.id]).bind(*call.args, **options)


def test_the_python_of_the_readme_runs(newcomer: Newcomer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "letters.py").write_text(block_of("README.md", "# letters.py").text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIGRPO_CACHE", str(newcomer.folder.parent / "cache"))
    block = block_of("README.md", 'RunDir("runs/from-python")')
    brief = '"train.steps": "2", "rollout.max_tokens": "6", "eval.limit": "4"'
    text = block.text.replace('"train.steps": "20"', brief)
    assert text != block.text
    exec(compile(text, block.place, "exec"), {})
    assert (tmp_path / "runs/from-python/adapter").is_dir()


def test_the_reward_functions_of_the_page_grade_what_is_said_of_them(tmp_path: Path) -> None:
    from minigrpo.types import Completion

    names = defined(block_of("tasks.md", "both = [score, reward]"))
    task = minigrpo.reward_task(*names["both"], rows=[{"prompt": f"{i}?", "answer": str(i)} for i in range(20)])
    prompt = task.prompts("train")[0]
    assert task.grade_group is not None
    right = Completion(str(prompt.target["answer"]), tuple(range(50)), (0.0,) * 50, "stop")
    wrong = Completion("no", tuple(range(100)), (0.0,) * 100, "stop")
    assert [grade.reward for grade in task.grade_group(prompt, [right, wrong])] == [1.5, 1.0]


@pytest.mark.needs("linux")
def test_the_code_task_of_the_page_pays_its_right_answer() -> None:
    task = defined(block_of("tasks.md", "code_task([double, square]"))["task"](load_recipe())
    for prompt in (*task.prompts("train"), *task.prompts("test")):
        assert task.gold is not None
        assert task.grade(prompt, task.gold(prompt)).solved
        assert not task.grade(prompt, "```python\ndef double(n): return n\ndef square(n): return n\n```").solved


def test_the_weak_grader_of_the_attack_finds_the_number_anywhere() -> None:
    anywhere = defined(block_of("attack.md", "def anywhere"))["anywhere"]
    assert (anywhere("1, 5 or 7", "5"), anywhere("15", "5")) == (1.0, 0.0)


@pytest.mark.needs("linux")
def test_the_referee_of_the_sandbox_page_referees() -> None:
    names = {"legal": lambda board: board, "score": lambda board, move: move / len(board), "board": [1, 2, 3, 4]}
    block = block_of("sandbox.md", "def referee")
    best = defined(block, source="def strategy(board): return max(board)", **names)["outcome"]
    assert (best.verdict, best.result) == ("ok", 1.0)
    assert defined(block, source="def strategy(board): return 9", **names)["outcome"].verdict == "wrong"


def test_the_sudoku_page_shows_the_strategies_that_the_game_asks_for() -> None:
    from minigrpo.tasks.builtin import sudoku

    strategy = defined(block_of("sudoku.md", "def strategy"), row=0, col=8, number=9)["strategy"]
    assert strategy([[0] * 9] * 9, [[0] * 9] * 9) == (0, 8, 9)
    assert "strategy(board, initial)" in inspect.getsource(sudoku)


def test_the_script_of_the_sudoku_page_writes_answers_for_the_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minigrpo.tasks.registry import open_task
    from minigrpo.training.sft_warmup import read_answers

    monkeypatch.chdir(tmp_path)
    block = block_of("sudoku.md", "generate_strategies")
    exec(compile(block.text.replace("range(800)", "range(20)"), block.place, "exec"), {})
    task = open_task(recipe_of(block_of("sudoku.md", "# sudoku-coder.yaml"), tmp_path))
    found = list(read_answers(tmp_path / "demos.jsonl", task.prompts("train"), set()))
    assert len(found) == 20
    assert all(answer.known for answer in found)


# Settings


def recipe_of(block: Block, folder: Path) -> Any:
    file = folder / "page.yaml"
    file.write_text(block.text)
    return load_recipe(str(file))


def test_the_recipes_of_the_pages_load(tmp_path: Path) -> None:
    (tmp_path / "FOLDER").mkdir()
    assert recipe_of(block_of("sudoku.md", "# sudoku-coder.yaml"), tmp_path).task.fewest == 35
    assert recipe_of(block_of("warmup.md", "warmup:"), tmp_path).warmup.rows == 16


def test_the_judge_of_the_page_is_one(tmp_path: Path) -> None:
    from minigrpo.tasks.custom.judge import Judge
    from minigrpo.tasks.custom.judge_settings import read_judge_settings

    file = tmp_path / "quality.yaml"
    file.write_text(block_of("tasks.md", "# quality.yaml").text)
    assert read_judge_settings(file).placeholders == ("prompt", "answer", "completion")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", "key")
        patch.setenv("MINIGRPO_CACHE", str(tmp_path))
        assert Judge.read(file).read_reward("Good. Score: 7") == 0.7


def test_the_rows_of_the_page_are_read(tmp_path: Path) -> None:
    from minigrpo.tasks.common.dataset import read_data

    for number, row in enumerate(block_of("tasks.md", '"level": 1').text.splitlines()):  # a file has rows of one kind
        file = tmp_path / f"{number}.jsonl"
        file.write_text("".join(row.replace("2 + 2", f"{i} + 2") + "\n" for i in range(20)))
        assert sum(map(len, read_data(str(file)).values())) == 20


def test_the_written_answers_of_the_page_are_read(tmp_path: Path) -> None:
    from minigrpo.training.sft_warmup import read_answers
    from minigrpo.types import Prompt

    file = tmp_path / "answers.jsonl"
    file.write_text(block_of("warmup.md", '"prompt": "train-17"').text)
    known = Prompt("train-17", ({"role": "user", "content": "3 + 4?"},))
    assert [answer.known for answer in read_answers(file, [known], set())] == [True, False, False]
