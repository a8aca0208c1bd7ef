"""What is printed may be lost; what was computed may not, and exit codes tell of the work."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest
from rich.text import Text

from minigrpo.cli import main
from minigrpo.config.load import load_recipe
from minigrpo.runs.rundir import RunDir
from minigrpo.ui.screen import Lenient, Screen, encodable
from minigrpo.ui.tables import plain_table, titled

BRIEF = (
    *("--train.steps", "2", "--lora.rank", "2", "--task.size", "8", "--rollout.prompts", "2"),
    *("--rollout.completions", "2", "--rollout.max_tokens", "4", "--model.device", "cpu", "--warmup.steps", "0"),
)
FULL = Path("/dev/full")


class Gone(io.StringIO):
    """A terminal that went away."""

    def write(self, text: str) -> int:
        raise OSError(5, os.strerror(5))

    def flush(self) -> None:
        raise OSError(5, os.strerror(5))


def bytes_of(encoding: str, text: str) -> bytes:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    lenient = Lenient(stream)
    lenient.write(text)
    lenient.flush()
    return raw.getvalue()


@pytest.mark.parametrize(
    ("encoding", "text", "shown"),
    [
        ("ascii", "a → b ± 1 … 你", b"a -> b +- 1 ... \\u4f60"),
        ("cp1252", "é → 你", b"\xe9 -> \\u4f60"),
        ("utf-8", "é → 你", "é → 你".encode()),
        ("utf-8", "runs/\udcff", b"runs/\\udcff"),  # the name of a folder that is no text
    ],
)
def test_what_a_stream_cannot_encode_is_written_plainer(encoding: str, text: str, shown: bytes) -> None:
    assert bytes_of(encoding, text) == shown
    assert encodable("→", "ascii") == "->"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_tables_and_samples_are_printed_in_any_encoding(encoding: str) -> None:
    raw = io.BytesIO()
    table = plain_table("你", "→")
    table.add_row("é", "▁▂█")
    stream = io.TextIOWrapper(raw, encoding=encoding)
    Screen(file=stream, width=80).show(titled("déjà", table, Text("\ud800")))
    assert b"\\ud800" in raw.getvalue()


def test_a_terminal_that_is_gone_ends_nothing() -> None:
    stream = Lenient(Gone())
    assert stream.write("step 1") == 6
    stream.flush()
    assert isinstance(stream.fault, OSError)
    Screen(file=Gone()).print("step 1")


def test_a_command_in_a_table_of_results_is_not_broken() -> None:
    words = f"Export again: minigrpo export {'long/' * 40}run --force"
    stream = io.StringIO()
    Screen(file=stream, width=40).show(titled("verified", Text(words)))
    assert words in stream.getvalue()


@pytest.mark.parametrize("gone", ["stdout", "stderr"])
def test_a_training_goes_on_where_nothing_can_be_shown(
    gone: str, tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, model = RunDir(tmp_path / "run"), tiny_folder()
    monkeypatch.setattr(sys, gone, Gone())
    with pytest.raises(SystemExit) as ended:
        main.main(["train", "quickstart", *BRIEF, "--model.path", str(model), "--run", str(run.path)])
    assert not ended.value.code
    assert (run.adapter / "adapter_model.safetensors").is_file()
    assert len(run.metrics.read_text().splitlines()) == 2


def command(*words: str, **streams: Any) -> subprocess.CompletedProcess[bytes]:
    """Run a command in a process of its own; its standard streams are `streams`, in an encoding of `env`."""
    env = {**os.environ, **streams.pop("env", {})}
    return subprocess.run([sys.executable, "-m", "minigrpo", *words], env=env, timeout=60, **streams)


@pytest.fixture
def full() -> Any:
    with FULL.open("w") as stream:
        yield stream


@pytest.mark.needs("linux")
def test_a_table_that_a_full_disk_takes_not_is_named_and_the_exit_code_stays(full: IO[str]) -> None:
    ended = command("tasks", stdout=full, stderr=subprocess.PIPE)
    assert ended.returncode == 0
    assert b"No space left on device" in ended.stderr
    assert command("recipes", "none", stdout=full, stderr=full).returncode == 2
    assert command("train", "--help", stdout=full, stderr=full, env={"PYTHONIOENCODING": "ascii"}).returncode == 0


@pytest.mark.needs("linux")
@pytest.mark.parametrize("words", [("tasks", "--json"), ("recipes", "quickstart")])
def test_a_result_for_stdout_that_a_full_disk_takes_not_is_an_error(words: tuple[str, ...], full: IO[str]) -> None:
    ended = command(*words, stdout=full, stderr=subprocess.PIPE)
    assert ended.returncode == 2
    assert ended.stderr.startswith(b"error: The result could not be written to stdout: No space left on device.")
    assert [line.partition(b":")[0] for line in ended.stderr.splitlines()] == [b"error", b"More"]


@pytest.mark.needs("linux")
def test_a_closed_stream_is_no_fault() -> None:
    for handles in (">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"):
        line = f'"{sys.executable}" -m minigrpo tasks {handles}'
        assert subprocess.run(line, shell=True, capture_output=True, timeout=60).returncode == 0, handles


@pytest.mark.needs("linux")
def test_a_reader_that_wants_no_more_is_no_fault() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ended = command("recipes", "quickstart", stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_json_stays_json_in_ascii(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("about: 你好 → é\n", encoding="utf-8")
    env = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ended = command("recipes", str(own), "--json", stdout=subprocess.PIPE, env=env)
    assert json.loads(ended.stdout)["about"] == "你好 → é"
    listed = command("recipes", str(own), stdout=subprocess.PIPE, env=env)
    again = tmp_path / "again.yaml"
    again.write_bytes(listed.stdout)
    assert load_recipe(str(again)) == load_recipe(str(own))


def test_everything_is_printed_with_a_screen() -> None:
    """Of rich's own consoles there is one: it writes the summary's file, where a full disk must be noticed."""
    source = Path(__file__).parents[2] / "src" / "minigrpo"
    found = {
        path.relative_to(source).as_posix(): len(re.findall(r"\bConsole\(", path.read_text(encoding="utf-8")))
        for path in source.rglob("*.py")
    }
    assert {name: count for name, count in found.items() if count} == {"pipeline/deliver.py": 1}


@pytest.mark.parametrize(("columns", "is_taken"), [("0", False), ("5", False), ("60", True), ("many", False)])
def test_a_width_in_which_nothing_can_be_read_is_not_taken(
    columns: str, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert (Screen(file=io.StringIO()).width == 60) == is_taken
    assert Screen(file=io.StringIO()).width >= 60
