"""Every command, whatever its standard streams are: exit codes tell of the work, and the work lies on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main

from minigrpo.cli.main import app
from minigrpo.cli.options import as_typed
from minigrpo.runs.rundir import digest
from tests.helpers.command_server import FULL, GONE, HUNG_UP, CommandServer, command_server
from tests.helpers.exported import model_folder
from tests.helpers.hub_server import standing
from tests.helpers.hub_storage import TOKEN, StandIn

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
KNOBS = (
    *("--model.device", "cpu", "--task.name", "even.py:task", "--lora.rank", "2", "--train.steps", "2"),
    *("--rollout.prompts", "2", "--rollout.completions", "4", "--rollout.max_tokens", "6", "--eval.limit", "2"),
    *("--export.formats", "", "--model.path", "model", "--task.system", "Sois brève →"),
)
WORDS: dict[str, tuple[str, ...]] = {
    "preflight": ("quickstart", *KNOBS, "--seconds", "1", "--run", "new"),
    "plan": ("quickstart", *KNOBS),
    "warmup": ("quickstart", *KNOBS, "--warmup.steps", "2", "--run", "new"),
    "train": ("quickstart", *KNOBS, "--samples", "--run", "new"),
    "evaluate": ("ready", "--limit", "2", "--base", "model"),
    "adopt": ("theirs", "--run", "new", "--task.name", "even.py:task"),
    "check": ("ready",),
    "merge": ("ready", "--out", "new"),
    "export": ("ready", "--format", "Q8_0", "--force"),
    "verify": ("ready",),
    "replay": ("ready", "--step", "2"),
    "audit": ("ready", "--steps", "0", "--answers", "0"),
    "fork": ("ready", "--at", "0", "--set", "train.lr=1e-5", "--steps", "1"),
    "publish": ("ready", "--repo", "me/tiny", "--what", "adapter", "--what", "merged", "--message", "déjà → vu"),
    "serve": ("ready/gguf/ready-Q8_0.gguf", "--port", "0", "--once", "--question", "7 → 8?"),
    "run": ("quickstart", *KNOBS, "--run", "new"),
    "quickstart": (*KNOBS, "--run", "new"),
    "check-task": ("quickstart", *KNOBS),
    "doctor": (),
    "sandbox": (),
    "report": ("ready", "--out", "new.html"),
    "watch": ("ready",),
    "inspect": ("ready", "--step", "2", "--group", "1"),
    "launch": ("slurm", "quickstart"),
    "tasks": (),
    "recipes": (),
}
"""Each command on tiny inputs, in a folder that `inputs` describes."""

KEPT = "kept"


class Streams(NamedTuple):
    """Where stdout and stderr go, in which environment, and whether --json is asked for."""

    out: str | None = KEPT
    err: str | None = KEPT
    environment: str = "utf-8"
    json: bool = False


STREAMS = {
    "stdout full": Streams(FULL),
    "stdout full, JSON": Streams(FULL, json=True),
    "stderr full": Streams(err=FULL, json=True),
    "both full": Streams(FULL, FULL),
    "stdout closed": Streams(None),
    "stderr closed": Streams(err=None, json=True),
    "both closed": Streams(None, None),
    "ASCII": Streams(environment="ascii"),
    "ASCII, JSON": Streams(environment="ascii", json=True),
    "POSIX": Streams(environment="posix"),
    "the reader leaves": Streams(GONE, GONE),
    "the terminal hangs up": Streams(HUNG_UP, HUNG_UP),
}
ENVIRONMENTS = {
    "utf-8": {"PYTHONIOENCODING": "utf-8", "TERM": "xterm"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "posix": {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""},
}
TASK = """
from minigrpo.types import Grade, Prompt, Task

def prompts(split):
    return [Prompt(f"{split} {i}", ({"role": "user", "content": f"{split} → {i}"},), str(i)) for i in range(8)]

def grade(prompt, text):
    share = sum(ord(c) % 2 == 0 for c in text) / max(1, len(text))
    return Grade(share, {"even": share}, formed=len(text) > 1, solved=share > 0.5)

task = Task("even", prompts, grade, gold=lambda prompt: "2468")
"""


def takes_json(verb: str) -> bool:
    return any("--json" in param.opts for param in COMMANDS[verb].params)


def test_every_command_has_a_case() -> None:
    assert WORDS.keys() == COMMANDS.keys() - {"view"}  # which stays until it is stopped


HALVES = [("\ud800", "\ufffd"), ("7\udfff8", "7\ufffd8")]
"""Halves of characters that Python reads on Windows only, or from a program of its own."""


@pytest.mark.parametrize(
    ("read", "typed"),
    [("7 → 8", "7 → 8"), ("caf\udcc3\udca9", "café"), ("é \udce2\udc86\udc92", "é →"), ("\udcff", "\ufffd"), *HALVES],
)
def test_a_text_of_the_command_line_is_what_was_typed(read: str, typed: str) -> None:
    """Python reads bytes that the locale has not as halves of characters, which nobody else takes."""
    assert as_typed(read) == typed


@dataclass(frozen=True)
class Result:
    """`made`: the files afterwards, with the hash of those whose every byte is known, and what the Hub holds."""

    code: int
    left: bool
    made: dict[str, str]
    out: str
    err: str


@pytest.fixture(scope="module")
def hub() -> Iterator[StandIn]:
    with standing() as server:
        yield server


@pytest.fixture(scope="module")
def server(hub: StandIn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], CommandServer]]:
    """One for each environment, started when it is needed; what they publish goes to the stand-in Hub."""
    place = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path_factory.mktemp("home"))}
    place |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    with ExitStack() as running:
        yield cache(lambda name: running.enter_context(command_server(**place, **ENVIRONMENTS[name])))


@pytest.fixture(scope="module")
def inputs(server: Callable[[str], CommandServer], tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """A folder with a model and a task; where asked for also a run `ready` with all its artefacts, and its adapter
    alone as `theirs`."""

    @cache
    def inputs(with_run: bool) -> Path:
        folder = tmp_path_factory.mktemp("inputs")
        if not with_run:
            model_folder(folder / "model", "qwen2")
            (folder / "even.py").write_text(TASK, encoding="utf-8")
            return folder
        shutil.copytree(inputs(False), folder, dirs_exist_ok=True)
        for words in (("run", *WORDS["run"][:-1], "ready"), ("export", "ready")):
            ended = server("utf-8").run(*words, out="../out", err="../err", folder=folder)
            assert ended.code == 0, (folder.parent / "err").read_text(encoding="utf-8")
        shutil.copytree(folder / "ready" / "adapter", folder / "theirs")
        (folder / "theirs" / "made.json").unlink()
        return folder

    return inputs


@pytest.fixture(scope="module")
def ask(server: Any, hub: StandIn, inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run a command in a copy of the inputs, in a folder whose name is not ASCII."""

    def ask(verb: str, streams: Streams) -> Result:
        place = tmp_path_factory.mktemp("case")
        folder = place / "café → 你"
        shutil.copytree(inputs("".join(WORDS[verb][:1]).startswith(("ready", "theirs"))), folder)
        hub.repos.clear()
        hub.objects.clear()
        out, err = (f"../{name}" if way is KEPT else way for name, way in (("out", streams.out), ("err", streams.err)))
        words = (verb, *WORDS[verb], *(["--json"] if streams.json and takes_json(verb) else []))
        ended = server(streams.environment).run(*words, out=out, err=err, folder=folder)
        told = [(place / name).read_text("utf-8") if (place / name).exists() else "" for name in ("out", "err")]
        made = {str(file.relative_to(folder)): known_bytes(file) for file in folder.rglob("*") if file.is_file()}
        published = {f"{name}: {file}": "" for name, repo in hub.repos.items() for file in repo.files}
        shutil.rmtree(place)
        return Result(ended.code, ended.left, made | published, *told)

    return ask


def known_bytes(file: Path) -> str:
    """Return the hash of a file of weights, which the same command writes byte by byte; "" of others."""
    return digest(file) if file.suffix in (".safetensors", ".gguf") else ""


@pytest.fixture(scope="module")
def plain(ask: Any) -> Any:
    """What a command does where both streams are files in UTF-8."""
    known: dict[str, Result] = {}

    def plain(verb: str) -> Result:
        if verb not in known:
            known[verb] = ask(verb, Streams())
        return known[verb]

    return plain


@pytest.mark.long
@pytest.mark.needs("linux")
@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("verb", WORDS)
def test_the_exit_code_tells_of_the_work_which_is_on_disk(verb: str, streams: str, ask: Any, plain: Any) -> None:
    way, expected = STREAMS[streams], plain(verb)
    assert (expected.code, expected.left) == (0, False), expected.err
    assert expected.out.strip()
    found = ask(verb, way)
    for_stdout = verb == "launch" or (way.json and takes_json(verb))
    lost = for_stdout and way.out is FULL  # a result for stdout that is lost there is an error
    assert (found.code, found.left) == (2 if lost else 0, False), found.out + found.err
    assert found.made == expected.made
    assert "Traceback" not in found.out + found.err
    if lost and way.err is KEPT:
        assert "error: The result could not be written to stdout: No space left on device." in found.err
    elif way.out is FULL and way.err is KEPT:
        assert "Not everything could be printed to stdout: No space left on device." in found.err
    if way.environment == "ascii":  # POSIX passes the bytes of names on as they are
        assert (found.out + found.err).isascii()
    if way.out is KEPT:
        assert json.loads(found.out) if way.json and takes_json(verb) else found.out.strip()
