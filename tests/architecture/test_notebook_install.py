"""The notebooks' first cell in an environment laid out like Colab's: what pip is asked for, and what it is not.

IPython turns the cell into Python; a stand-in for pip notes what it is asked, and lays down what pip would.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement

from tests.helpers.stubs import install_stub

pytestmark = pytest.mark.extra("notebook")
NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
COLAB = {"torch": "2.11.0+cu128", "torchao": "0.10.0", "transformers": "5.15.0", "numpy": "2.0.2"}
ADDRESS = "https://github.com/OWNER/minigrpo"
"""Where the notebooks come from, until somebody writes a real address in."""
EXTRAS = {
    "gsm8k_colab": {"notebook", "math"},
    "own_task": {"notebook", "gguf"},
    "quickstart": {"notebook", "gguf"},
    "sudoku_colab": {"notebook", "qlora", "gguf"},
}

PIP = """
import json, re, sys
from importlib.metadata import distributions
from pathlib import Path

if sys.argv[1] == "list":
    print("\\n".join(f"{found.name}=={found.version}" for found in distributions()))
else:
    constraints = Path(sys.argv[sys.argv.index("--constraint") + 1]).read_text().split()
    with open("asked.jsonl", "a") as asked:
        print(json.dumps([sys.argv[-1], sorted(constraints)]), file=asked)
    sys.path.insert(0, HELPERS)
    from stubs import install_stub
    install_stub(Path(SITE), "minigrpo", "0.1.0")
"""
RUN = """
import subprocess, sys, types

sys.path[:] = [".", SITE, *(place for place in sys.path if "packages" not in place and place)]

def magic(name, line):
    line = line.replace("{source}", globals()["source"])  # as IPython fills in names
    words = f'"{sys.executable}" -S -c "import sys; sys.path.insert(0, {SITE!r}); exec(open({PIP!r}).read())" {line}'
    subprocess.run(words, shell=True, check=True)

get_ipython = lambda: types.SimpleNamespace(run_line_magic=magic)
exec(CELL)
import minigrpo
print(minigrpo.__file__)
"""


class Colab:
    """A folder to work in beside a folder of installed packages; nothing else is on sys.path but Python's own."""

    def __init__(self, place: Path) -> None:
        self.site, self.home, self.pip = place / "site", place / "content", place / "pip.py"
        self.home.mkdir()
        for name, version in COLAB.items():
            install_stub(self.site, name, version)
        helpers = str(Path(__file__).parents[1] / "helpers")
        self.pip.write_text(f"SITE, HELPERS = {str(self.site)!r}, {helpers!r}\n{PIP}", encoding="utf-8")

    def run(self, cell: str) -> subprocess.CompletedProcess[str]:
        python = TransformerManager().transform_cell(cell)
        head = f"SITE, PIP, CELL = {str(self.site)!r}, {str(self.pip)!r}, {python!r}\n"
        command = [sys.executable, "-S", "-E", "-c", head + RUN]
        return subprocess.run(command, cwd=self.home, capture_output=True, text=True, timeout=60, check=False)

    @property
    def asked(self) -> list[Any]:
        file = self.home / "asked.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def colab(tmp_path: Path) -> Colab:
    return Colab(tmp_path)


def install_cell(path: Path, **constants: str) -> str:
    (cell,) = [cell for cell in nbformat.read(path, as_version=4).cells if cell.id == "install"]
    text = str(cell.source)
    for name, value in constants.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name} = ")]
        text = text.replace(line, f"{name} = {value!r}")
    return text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_folder_of_that_name_beside_the_notebook_is_installed_and_not_taken_for_the_package(
    path: Path, colab: Colab
) -> None:
    clone = colab.home / "minigrpo"
    (clone / "src/minigrpo").mkdir(parents=True)
    (clone / "pyproject.toml").touch()
    for _ in range(2):  # the second time the package is there
        ran = colab.run(install_cell(path))
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.split() == [str(colab.site / "minigrpo/__init__.py")]
    ((wanted, constraints),) = colab.asked
    assert Requirement(wanted).url == clone.as_uri()
    assert Requirement(wanted).extras == EXTRAS[path.stem]
    assert constraints == ["numpy==2.0.2", "torch==2.11.0+cu128"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_without_such_a_folder_it_comes_from_the_one_address_at_the_top(path: Path, colab: Colab) -> None:
    ran = colab.run(install_cell(path, REPOSITORY="https://example.org/me/minigrpo"))
    assert ran.returncode == 0, ran.stderr
    ((wanted, _),) = colab.asked
    assert Requirement(wanted).url == "git+https://example.org/me/minigrpo"
    assert Requirement(wanted).name == "minigrpo"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("address", [ADDRESS, "", "github.com/me/minigrpo", "https://github.com/OWNER/minigrpo.git"])
def test_an_address_that_nobody_has_written_in_is_refused_in_a_sentence(address: str, path: Path, colab: Colab) -> None:
    ran = colab.run(install_cell(path, REPOSITORY=address))
    assert ran.returncode == 1
    told = ran.stderr.splitlines()[-1]
    assert told.startswith("ValueError: Write the repository's address into REPOSITORY above: what you would give to")
    assert f"It says {address!r} now." in told
    assert not colab.asked


def test_all_notebooks_name_one_address() -> None:
    lines = {line for path in NOTEBOOKS for line in install_cell(path).splitlines() if line.startswith("REPOSITORY")}
    assert len(lines) == 1
    assert f'REPOSITORY = "{ADDRESS}"' in lines.pop()
