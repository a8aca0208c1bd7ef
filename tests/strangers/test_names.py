"""Names that strangers give: of files, folders, runs and caches that are no such thing, or nothing at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st

from minigrpo.config.parse import NULLS
from tests.helpers.command_line import DONE, UNFIT, called, started
from tests.strangers import LIMIT_S, cases

pytestmark = [pytest.mark.long, pytest.mark.timeout(LIMIT_S)]

# Text that may be given for a file's name. No NUL: no argument of a process can hold it.

letters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
names = st.text(letters, min_size=1, max_size=12) | st.sampled_from(
    [
        *("~", "~nobody-here/x", ".", "..", "/", "//", "./", " ", "-", "--", "*", "?", "%s", "{}", ":", "x:", "a/b/c"),
        *("x" * 300, "a/" * 3000, "a\nb", "[red]x[/]", "\x1b[2J", "é.jsonl", "x.jsonl", "x.py:score", "me/model"),
        # Bytes of an argument that are no UTF-8 come as halves of characters.
        *("\udcff", "\udcff.jsonl", "full", "full/x", "file", "file/x", "loop"),
        *("/dev/null", "/proc/self/mem", "http://nowhere.invalid/x"),
    ]
)
endings = st.sampled_from(["", "", ".jsonl", ".yaml", ".py:score", ".gguf", "/", "/adapter"])


def furnish(place: Path) -> None:
    """Put a file, a folder with a file, and a link to itself into the place."""
    (place / "file").write_text("x")
    (place / "full").mkdir()
    (place / "full" / "x").write_text("x")
    os.symlink("loop", place / "loop")


COMMANDS: Mapping[str, tuple[str, ...]] = {
    "recipes": ("recipes", "NAME"),
    "check-task": ("check-task", "NAME"),
    "task.name": ("check-task", "--task.name=NAME"),
    "task.data": ("check-task", "--task.name=full/mine.py:score", "--task.data=NAME"),
    "task.rates": ("check-task", "--task.rates=NAME"),
    "judge": ("check-task", "--task.name=judge:NAME", "--task.data=file"),
    "classifier": ("check-task", "--task.name=classifier:NAME", "--task.data=file"),
    "plan": ("plan", "quickstart", "--model.path=NAME", "--model.device=cpu"),
    "train": ("train", "NAME"),
    "run": ("train", "quickstart", "--run=NAME", "--model.path=nowhere", "--resume"),
    "warmup": ("warmup", "quickstart", "--warmup.steps=1", "--warmup.data=NAME", "--model.path=nowhere", "--run=new"),
    "evaluate": ("evaluate", "--limit=1", "--", "NAME"),
    "base": ("evaluate", "--limit=1", "--base=NAME", "nowhere"),
    "check": ("check", "--", "NAME"),
    "merge": ("merge", "--", "NAME"),
    "adopt": ("adopt", "--task.name=wordproblems", "--run=new", "--", "NAME"),
    "export": ("export", "--", "NAME"),
    "verify": ("verify", "--", "NAME"),
    "serve": ("serve", "--dry-run", "--", "NAME"),
    "publish": ("publish", "--folder=NAME", "--repo=me/x", "--dry-run"),
}


@cases(150)
@given(st.sampled_from(sorted(COMMANDS)), st.builds(str.__add__, names, endings))
def test_a_name_of_nothing_is_refused(command: str, name: str) -> None:
    assume(name not in (*NULLS, "--"))  # an option that is left out, and the end of options
    if command in ("run", "publish"):  # the one would write there, the other read all of it
        assume(not name.startswith(("/", "~", "..")))
    with tempfile.TemporaryDirectory() as place, chdir(place):
        furnish(Path(place))
        (Path(place) / "full" / "mine.py").write_text("def score(completion):\n    return 1.0\n")
        ended = called(*(word.replace("NAME", name) for word in COMMANDS[command]))
        published = command == "publish" and os.path.isdir(name)  # any folder may be
    event(command)
    assert published or ended.refused


# Settings of the environment, all of which `doctor` looks at.

places = st.sampled_from(
    ["", "nowhere", "file", "file/x", "full", "~nobody-here/x", "x" * 300, "\udcff", " ", "/dev/null"]
)
variables = st.dictionaries(
    st.sampled_from(["MINIGRPO_CACHE", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "HOME", "TMPDIR", "LLAMA_CPP_DIR"]),
    places,
    min_size=1,
    max_size=3,
)
terminals = st.dictionaries(
    st.sampled_from(["COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR", "LANG", "OMP_NUM_THREADS", "HF_TOKEN"]),
    st.sampled_from(["", "0", "-1", "many", "1e9", "dumb", "C", "martian", "1"]),
    max_size=2,
)


@cases(60)
@given(variables, terminals)
def test_doctor_tells_of_any_environment(variables: dict[str, str], terminals: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as place, chdir(place), mock.patch.dict(os.environ, {**variables, **terminals}):
        furnish(Path(place))
        ended = called("doctor")
    assert ended.code in (DONE, UNFIT) or "cannot be looked at" in ended.refused
    assert "error" in ended.err or "system" in ended.out


@cases(4)
@given(variables, terminals)
def test_doctor_says_so_in_a_process_of_its_own(variables: dict[str, str], terminals: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        furnish(Path(place))
        started("doctor", cwd=Path(place), **variables, **{**terminals, "PYTHONIOENCODING": "ascii"})
