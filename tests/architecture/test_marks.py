"""What a test needs is said by a mark, and one hook skips it where that is missing, with a reason that helps."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.marks import NETWORK, SYSTEM, VARIABLES, Need, extras_of, module_of, reasons_to_skip

TESTS = Path(__file__).parents[1]
PYPROJECT = TESTS.parent / "pyproject.toml"
SKIPS = {"skip", "skipif", "importorskip", "SkipTest", "skipTest", "skipIf", "skipUnless"}
ALLOWED = {"conftest.py": "the hook"}

TINY = """
import pytest

@pytest.mark.gpu
def test_gpu(): pass

@pytest.mark.network
def test_network(): pass

@pytest.mark.extra("here")
def test_extra_that_is_here(): pass

@pytest.mark.extra("some")
def test_extra_of_which_a_part_is_missing(): pass

@pytest.mark.env("MINIGRPO_GSM8K")
def test_env(): pass

@pytest.mark.needs("llama-quantize")
def test_system(): pass

def test_plain(): pass
"""
TORCH = """
import os

class cuda:
    def is_available():
        return "HAS_GPU" in os.environ and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
"""
EXTRAS = 'here = ["pytest>=8"]\nsome = ["pytest", "no-such-package==1"]\n'


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Return a project with our hook and marks, extras of its own, and a torch that finds a GPU where it is told to."""
    marks = PYPROJECT.read_text(encoding="utf-8").partition("[tool.pytest.ini_options]")
    (tmp_path / "pyproject.toml").write_text(f"[project.optional-dependencies]\n{EXTRAS}\n{marks[1]}{marks[2]}")
    shutil.copy(TESTS / "conftest.py", tmp_path)
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "test_tiny.py").write_text(TINY)
    return tmp_path


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    left_out = (NETWORK, *VARIABLES, "PYTEST_ADDOPTS", "CUDA_VISIBLE_DEVICES")
    own = {name: value for name, value in os.environ.items() if name not in left_out}
    own |= {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path]), **variables}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *arguments, "test_tiny.py"]
    return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=120, check=False)


def test_what_is_missing_is_skipped_with_the_way_to_get_it(tiny: Path) -> None:
    ended = run(tiny, PATH="")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 passed, 5 skipped" in ended.stdout
    for reason in (
        "torch finds no CUDA GPU: run it on a machine that has one",
        "reaches for the network: allow it with MINIGRPO_NETWORK=1",
        "no_such_package not installed: pip install 'minigrpo[some]'",
        "MINIGRPO_GSM8K is not set: let it name a folder with GSM8K's train.jsonl and test.jsonl",
        "no llama-quantize on the PATH: it comes with llama.cpp",
    ):
        assert ended.stdout.count(reason) == 1


def test_what_is_there_runs(tiny: Path) -> None:
    (tiny / "no_such_package.py").touch()
    (tiny / "llama-quantize").touch(0o755)
    there = {"PATH": str(tiny), "HAS_GPU": "1", "MINIGRPO_NETWORK": "1", "MINIGRPO_GSM8K": "folder"}
    ended = run(tiny, "-m", "gpu or not gpu", **there)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "7 passed" in ended.stdout
    assert "skipped" not in ended.stdout


@pytest.mark.parametrize(("marks", "told"), [("", "2 passed, 5 skipped"), ("gpu", "1 passed, 6 deselected")])
def test_a_gpu_is_hidden_from_a_session_that_does_not_ask_for_it(tiny: Path, marks: str, told: str) -> None:
    assert told in run(tiny, "-m", marks, PATH="", HAS_GPU="1", CUDA_VISIBLE_DEVICES="0").stdout


def test_torch_is_loaded_only_where_a_test_needs_a_gpu(tiny: Path) -> None:
    (tiny / "torch.py").write_text("raise RuntimeError('torch was loaded')")
    assert "2 passed, 4 skipped, 1 deselected" in run(tiny, "-m", "not gpu", PATH="").stdout
    assert "torch was loaded" in run(tiny, PATH="").stdout


@pytest.mark.parametrize(
    ("mark", "told"),
    [
        ('extra("nothing")', "The mark extra('nothing') must name one of here, some."),
        ("extra", "The mark extra() must name one of here, some."),
        ('env("HOME")', "The mark env('HOME') must name one of MINIGRPO_AXE, "),
        ('needs("luck")', "The mark needs('luck') must name one of bfloat16, chromium, "),
        ("gpus", "'gpus' not found in `markers` configuration option"),
    ],
)
def test_a_mark_that_names_nothing_known_is_an_error(tiny: Path, mark: str, told: str) -> None:
    (tiny / "test_tiny.py").write_text(f"import pytest\n\n@pytest.mark.{mark}\ndef test_it(): pass\n")
    ended = run(tiny)
    assert ended.returncode not in (0, 5)
    assert told in ended.stdout + ended.stderr


def test_the_modules_of_an_extra_follow_from_its_packages() -> None:
    extras = extras_of(PYPROJECT)
    assert extras["bench"] == ("trl", "matplotlib")
    assert extras["notebook"] == ("matplotlib", "IPython")
    assert extras["reasoning-gym"] == ("reasoning_gym",)
    assert "dev" not in extras
    assert [module_of(text) for text in ("a-b[c]>=1", "a.b~=2", "a; sys_platform == 'linux'")] == ["a_b", "a.b", "a"]


def installed(package: str) -> bool:
    try:
        return bool(distribution(package))
    except PackageNotFoundError:
        return False


def test_a_package_that_is_installed_is_found_by_its_modules_name() -> None:
    modules = {module for modules in extras_of(PYPROJECT).values() for module in modules}
    assert not [module for module in modules if installed(module.replace("_", "-")) and find_spec(module) is None]


def test_a_need_of_the_system_that_is_not_met_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SYSTEM:
        mark = pytest.mark.needs(name).mark
        monkeypatch.setitem(SYSTEM, name, Need(lambda: False, f"no {name}"))
        assert list(reasons_to_skip([mark], {})) == [f"no {name}"]
        monkeypatch.setitem(SYSTEM, name, Need(lambda: True, f"no {name}"))
        assert not list(reasons_to_skip([mark], {}))


def marked(tree: ast.AST) -> set[tuple[str, str]]:
    """Return (mark, what it names) for each mark that is written with one name."""
    return {
        (node.func.attr, node.args[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if len(node.args) == 1 and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
    }


TREES = {
    path.relative_to(TESTS).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(TESTS.rglob("*.py"))
}


def test_no_test_skips_itself() -> None:
    skipping = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in SKIPS)
        or (isinstance(node, ast.ImportFrom) and any(alias.name in SKIPS for alias in node.names))
    }
    assert skipping == set(ALLOWED)


def test_every_known_need_is_some_tests_need() -> None:
    used = set().union(*(marked(tree) for tree in TREES.values()))
    assert used >= {("needs", name) for name in SYSTEM} | {("env", name) for name in VARIABLES}
