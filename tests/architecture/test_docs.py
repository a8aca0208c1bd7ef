"""The documents say what is true: what they name is there, and the quickstart does what README promises."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_make_target_that_the_documents_name_exists() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", README + contributing))
    assert {"quickstart", "test", "setup", "bench", "prove"} <= targets
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_every_link_and_file_that_the_readme_names_is_there() -> None:
    named = re.findall(r"\]\((?!http)([^)]+)\)", README) + re.findall(r"`(docs/[\w.]+|constraints\.txt)`", README)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.long
def test_quickstart_as_the_readme_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MINIGRPO_CACHE", str(tmp_path / "cache"))
    run_dir = tmp_path / "run"
    subprocess.run(
        [sys.executable, "-m", "minigrpo.cli.main", "quickstart", "--run", str(run_dir)], check=True, timeout=900
    )
    greedy = json.loads((run_dir / "evals/comparison.json").read_text())["comparisons"]["greedy"]
    before, after = greedy["before"]["scores"], greedy["after"]["scores"]
    assert 0.15 <= before["accuracy"]["value"] <= 0.40
    assert after["accuracy"]["value"] > 0.80
    assert after["accuracy_formed"]["value"] >= before["accuracy_formed"]["value"] + 0.20


HISTORY = ("LOG.md", "CHANGELOG.md")
"""They tell of the past, deleted files included."""
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "src" / "minigrpo").rglob("*.py")])
PAGES = [page for page in PAGES if page.name not in HISTORY]
OTHERS_FILES = {
    "mine.py",
    "letters.py",
    "train.py",
    "FILE.py",
    "convert_hf_to_gguf.py",
    "convert_lora_to_gguf.py",
    "setup.py",
    "conftest.py",
}
"""Files that users write, or that other projects have."""


# Not all of the folder: an environment in it has tens of thousands of files.
SOURCES = [
    path for folder in ("src", "tests", "benchmarks", "examples", "docs") for path in (ROOT / folder).rglob("*.py")
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_page_names_a_module_that_is_not_there(page: Path) -> None:
    """A module may be named by the last parts of its path: packing.py, algorithms/packing.py."""
    named = set(re.findall(r"(?<![\w/.\-])(?:[A-Za-z_]\w*/)*[A-Za-z_]\w*\.py\b", page.read_text(encoding="utf-8")))
    missing = {name for name in named if not any(path.as_posix().endswith(f"/{name}") for path in SOURCES)}
    assert not missing - OTHERS_FILES


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".md"], ids=lambda page: page.name)
def test_no_page_names_a_module_path_that_is_not_there(page: Path) -> None:
    from importlib.util import find_spec

    named = set(re.findall(r"\bminigrpo(?:\.[a-z_]\w*)+", page.read_text(encoding="utf-8")))
    for name in sorted(named - {"minigrpo.git", "minigrpo.json"}):
        parts = name.split(".")
        found = next(n for n in range(len(parts), 0, -1) if importable(find_spec, ".".join(parts[:n])))
        rest = parts[found:]
        module = __import__(".".join(parts[:found]), fromlist=["_"])
        assert not rest or hasattr(module, rest[0]), name


def importable(find_spec: Any, name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_every_message_that_the_troubleshooting_page_quotes_is_one_of_the_package() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    code = [" ".join(text.split()) for text in re.findall(r"`([^`]*)`", page)]
    others = ("minigrpo ", "--", "this type", "More: ", "llama-cli", "vllm serve")
    quoted = [text for text in code if " " in text and not text.startswith(others)]
    assert len(quoted) >= 12
    source = [path for path in SOURCES if path.is_relative_to(ROOT / "src")]
    pieces = [
        node.value
        for path in source
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    for text in quoted:
        for part in re.split(r"\.\.\.|\bN%?", text):
            assert any(part.strip() in piece for piece in pieces), text


def shown_commands(page: Path) -> list[list[str]]:
    """Return the words of each minigrpo command on the page: of lines that begin with it, and of code in the text."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^ *(?:\$ |.*-m -- )?minigrpo ([a-z][^\n]*)", text, re.MULTILINE)
    inline = [re.sub(r"\s+", " ", found) for found in re.findall(r"`(?:torchrun )?minigrpo ([a-z][^`]*)`", text)]
    cut = [re.split(r"\s+#|\s*[>|]\s|\.\.\.", line.replace("`", ""))[0] for line in lines] + inline
    return [shlex.split(line) for line in cut if line.strip()]


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".md"], ids=lambda page: page.name)
def test_every_command_of_a_page_has_the_recipe_and_the_options_that_it_names(page: Path) -> None:
    import typer

    from minigrpo.cli.main import app
    from minigrpo.cli.options import QuietRecipeCommand, RecipeCommand
    from minigrpo.config.fields import fields_by_name
    from minigrpo.config.load import recipe_names

    known: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for verb, *words in shown_commands(page):
        assert verb in known, f"minigrpo {verb}"
        options = {name for param in known[verb].params for name in (*param.opts, *param.secondary_opts)}
        takes_knobs = isinstance(known[verb], (RecipeCommand, QuietRecipeCommand))
        for option in (word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)):
            knob = option[2:] in fields_by_name() or option.startswith(FREE)
            assert option in options or (takes_knobs and knob) or option in ("--help", "-h"), (
                f"minigrpo {verb} {option}"
            )
        named = words[1:2] if verb == "launch" else words[:1]
        if takes_knobs and verb != "adopt" and named and named[0].islower() and not named[0].startswith("-"):
            assert re.search(r"[./]", named[0]) or named[0] in recipe_names(), f"minigrpo {verb} {named[0]}"


FREE = ("--model.template.", "--task.weights.", "--groups.factor.")
