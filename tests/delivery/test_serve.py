"""The command `serve`: every artefact is found by its name, every fault is one sentence, and nothing is left
running."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from minigrpo.cli import main
from minigrpo.delivery.gguf.header import read_header
from minigrpo.delivery.serve.commands import VllmModel, fit_context, reserve_port, vllm_command
from minigrpo.delivery.serve.resolve import ServeOptions, resolve_servable
from minigrpo.delivery.serve.serve import ask_once, plan_server, ready_lines
from minigrpo.errors import ArtifactError, MinigrpoError
from minigrpo.runs.rundir import RunDir
from minigrpo.tasks.builtin.wordproblems import SYSTEM_PROMPT
from tests.helpers.delivered import edit_json, save_base
from tests.helpers.served import children, exported_run, file_of, gone

pytestmark = pytest.mark.extra("gguf")

ASKED = ({"role": "user", "content": "What is '12' + 7?"},)
IDS = (12, 40, 99, 7, 200, 31)
FILES = ("F32", "Q8_0")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return exported_run(tmp_path_factory.mktemp("served"))


def test_a_run_answers_a_problem_of_its_task_and_is_graded(run: RunDir) -> None:
    answer = ask_once(run, quiet=True)
    assert answer.question
    assert answer.engine == "llama.cpp"
    assert answer.solved is False  # the model is untrained
    assert answer.reward is not None
    assert "listening on" in (run.path / "serve.log").read_text()


# The command


def serve(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main.main(["serve", *arguments])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_a_question_of_ones_own_is_answered_and_the_server_stopped(run: RunDir, capsys: Any) -> None:
    before = children(os.getpid())
    code, out, _ = serve(capsys, str(run.path), "--once", "--json", "--port", "0", "--question", "it's $5")
    told = json.loads(out)
    assert code == 0
    assert told["answer"]["question"] == "it's $5"
    assert told["answer"]["reward"] is None  # the question is not the task's
    body = json.loads(shlex.split(told["curl"])[-1])
    asked = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "it's $5"}]
    assert body == {"model": "mine", "messages": asked}  # below what it was trained with
    assert children(os.getpid()) == before


def shown(lines: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(lines)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_dry_run_prints_both_lines_and_starts_nothing(run: RunDir, capsys: Any) -> None:
    code, out, _ = serve(capsys, str(run.path), "--dry-run", "--port", "0")
    ours, docker = out.splitlines()
    assert code == 0
    assert str(file_of(run)) in ours
    assert f"-v {run.merged.absolute()}:/model vllm/vllm-openai:latest --model /model" in docker


def test_every_kind_of_artefact_is_found_by_its_name(run: RunDir, tmp_path: Path) -> None:
    llama, vllm = ServeOptions(engine="llama.cpp"), ServeOptions(engine="vllm")
    assert resolve_servable(str(run.path), llama).gguf == file_of(run)
    assert resolve_servable(str(run.path), ServeOptions(format="f32")).gguf == file_of(run, "F32")
    assert resolve_servable(str(file_of(run)), llama).run == run
    assert resolve_servable(str(run.path), vllm).model == VllmModel(str(run.merged))
    base = Path(f"{run.path}-base")
    assert resolve_servable(str(run.path), ServeOptions(engine="vllm", adapter=True)).model == VllmModel(
        str(base), run.adapter
    )
    assert resolve_servable(str(base), vllm).model == VllmModel(str(base))
    alone = Path(shutil.copytree(run.adapter, tmp_path / "alone"))
    assert resolve_servable(str(alone), vllm).model == VllmModel(str(base), alone)


def test_vllm_is_told_the_temperature_of_the_training_and_the_rank_of_the_adapter(run: RunDir) -> None:
    ready = plan_server(
        str(run.path), ServeOptions(engine="vllm", adapter=True, port=0, vllm=Path(sys.executable)), "hi"
    )
    line = shlex.join(ready.command.program)
    assert "--generation-config vllm --override-generation-config '{\"temperature\": 1.0}'" in line
    assert f"--enable-lora --max-lora-rank 8 --lora-modules mine={run.adapter}" in line
    assert "--config-format" not in line
    assert ready.docker is not None
    assert "--lora-modules mine=/adapter" in ready.docker
    assert "docker" in shown(ready_lines(ready))
    assert "docker" not in shown(ready_lines(ready, stays=False))  # asked once, and it has ended


@pytest.fixture(autouse=True)
def _any_python_counts_as_vllm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept any python as one with vLLM, where only the command line is tested."""
    if "rank_of_the_adapter" in request.node.name:
        monkeypatch.setattr("minigrpo.delivery.serve.serve.find_vllm", lambda named: named)


# Bad input


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("nowhere", "nowhere is not there. Give a run's folder"),
        ("nowhere.gguf", "nowhere.gguf is not there"),
        ("words.gguf", "words.gguf is no GGUF file (5 bytes)"),
        ("cut.gguf", "cut.gguf is cut short: it has 9,000 bytes of"),
        ("head.gguf", "head.gguf is cut short or damaged (900 bytes)"),
        ("empty", "empty is neither a run's folder"),
    ],
)
def test_what_cannot_be_served_is_told_in_a_sentence(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, what: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = file_of(run).read_bytes()
    Path("words.gguf").write_text("hello")
    Path("cut.gguf").write_bytes(whole[:9000])
    Path("head.gguf").write_bytes(whole[:900])
    Path("empty").mkdir()
    code, out, err = serve(capsys, what, "--port", "0")
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_a_file_cut_anywhere_is_refused(run: RunDir, tmp_path: Path) -> None:
    whole, cut = file_of(run).read_bytes(), tmp_path / "cut.gguf"
    for size in range(0, len(whole), 1013):
        cut.write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match=r"cut short|no GGUF"):
            read_header(cut)
    assert read_header(file_of(run)).context == 512


def test_a_stale_or_changed_file_is_refused_with_the_command_that_makes_it_again(run: RunDir, tmp_path: Path) -> None:
    mine = RunDir(Path(shutil.copytree(run.path, tmp_path / "mine")))
    with pytest.raises(
        ArtifactError, match=r"There are: F32, Q8_0 \(--format\). Export first: minigrpo export .* Q4_K_M"
    ):
        resolve_servable(str(mine.path), ServeOptions(engine="llama.cpp", format="Q4_K_M"))
    data = bytearray(file_of(mine).read_bytes())
    data[-50] ^= 1
    file_of(mine).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"changed by somebody. Export again: minigrpo export .* --force"):
        resolve_servable(str(mine.path), ServeOptions(engine="llama.cpp"))
    shutil.copy(file_of(run), file_of(mine))
    edit_json(mine.adapter / "adapter_config.json", lora_alpha=9)
    with pytest.raises(ArtifactError, match=r"merged is stale: .* Merge again: minigrpo merge"):
        resolve_servable(str(mine.path), ServeOptions(engine="llama.cpp"))


def test_a_port_that_is_taken_is_named_with_its_owner_and_a_free_one(run: RunDir, capsys: Any) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, _, err = serve(capsys, str(run.path), "--port", str(port))
    assert code == 2
    assert f"Port {port} of 127.0.0.1 is taken" in err
    assert f"process {os.getpid()}" in err
    free = int(err.rpartition("--port ")[2].split()[0])
    assert reserve_port("127.0.0.1", free) == free


def test_a_host_where_nothing_can_listen_is_named() -> None:
    with pytest.raises(MinigrpoError, match=r"Nothing can listen at 203\.0\.113\.9 port 8000"):
        reserve_port("203.0.113.9", 8000)
    with pytest.raises(MinigrpoError, match=r"Nothing can listen at no\.such\.host\.invalid"):
        reserve_port("no.such.host.invalid", 8000)


def test_more_context_than_the_model_was_made_for_is_refused(run: RunDir, capsys: Any) -> None:
    code, _, err = serve(capsys, str(run.path), "--port", "0", "--context", "513")
    assert code == 2
    assert "--context 513 is more than the 512 tokens" in err
    assert fit_context(None, 262144, "it") == 4096  # the cache of a long context can be larger than the model


def test_a_missing_engine_is_reported_with_what_to_install(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv("MINIGRPO_VLLM", raising=False)
    code, _, err = serve(capsys, str(run.path), "--engine", "vllm", "--port", "0")
    assert code == 2
    assert "pip install vllm" in err
    assert f"minigrpo export {run.path}" in err
    assert "has no vLLM" in serve(capsys, str(run.path), "--vllm", sys.executable, "--port", "0")[2]
    assert "cannot be run" in serve(capsys, str(run.path), "--vllm", "/no/python", "--port", "0")[2]
    monkeypatch.setattr("minigrpo.delivery.serve.commands.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    assert "pip install 'minigrpo[gguf]'" in serve(capsys, str(run.path), "--port", "0")[2]


def test_an_adapter_that_vllm_cannot_serve_beside_its_base_is_refused_first(run: RunDir, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(run.adapter, tmp_path / "adapter"))
    edit_json(adapter / "adapter_config.json", use_dora=True)
    with pytest.raises(MinigrpoError, match="is a DoRA adapter, which vLLM cannot serve unmerged"):
        vllm_command(VllmModel("base/model", adapter, {}), python=Path("python"), host="127.0.0.1", port=1, name="m")


def test_an_adapter_of_another_base_is_refused_before_anything_starts(run: RunDir, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(run.adapter, tmp_path / "adapter"))
    save_base(tmp_path / "other", "qwen2", hidden_size=128)
    with pytest.raises(MinigrpoError, match=r"other is not the base of .*adapter"):
        resolve_servable(str(adapter), ServeOptions(engine="vllm", base=str(tmp_path / "other")))
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(MinigrpoError, match="was cut short"):
        resolve_servable(str(adapter), ServeOptions(engine="vllm"))


# Ends


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_running_however_the_command_ends(run: RunDir, number: signal.Signals) -> None:
    line = [sys.executable, "-m", "minigrpo.cli.main", "serve", str(run.path), "--port", "0", "--question", "hi"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        while b"Ctrl-C" not in (line := process.stdout.readline()):
            assert line or process.poll() is None
        left = children(process.pid)
        assert left
        process.send_signal(number)
        code = process.wait(60)
    assert gone(left)
    assert code == (0 if number is not signal.SIGKILL else -signal.SIGKILL)


def test_ctrl_c_while_it_starts_ends_it(run: RunDir, tmp_path: Path) -> None:
    """Use the real command, with a llama-server that never becomes healthy."""
    slow = tmp_path / "llama-server"
    slow.write_text(f"#!{sys.executable}\nimport time\nprint('loading', flush=True)\ntime.sleep(600)\n")
    slow.chmod(0o755)
    run = RunDir(Path(shutil.copytree(run.path, tmp_path / "mine")))
    log = run.path / "serve.log"
    log.unlink(missing_ok=True)  # a copy from another test
    line = [
        sys.executable,
        "-m",
        "minigrpo.cli.main",
        "serve",
        str(run.path),
        "--llama-cpp",
        str(tmp_path),
        "--port",
        "0",
    ]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not (log.exists() and "loading" in log.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        left = children(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.wait(60) == 130, process.stderr.read().decode()
    assert gone(left)
