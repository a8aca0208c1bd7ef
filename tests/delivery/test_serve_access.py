"""Who may ask a served model: clients with the key, no foreign web page, and several at a time."""

from __future__ import annotations

import http.client
import json
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minigrpo.cli import main
from minigrpo.delivery.gguf.header import read_header
from minigrpo.delivery.serve.access import KEY_VARIABLES, OPEN, Access
from minigrpo.delivery.serve.commands import (
    ServerCommand,
    VllmModel,
    docker_command,
    llama_command,
    reserve_port,
    vllm_command,
)
from minigrpo.delivery.serve.resolve import ServeOptions
from minigrpo.delivery.serve.serve import plan_server
from minigrpo.delivery.serve.server import ServerClient, ServerProcess
from minigrpo.errors import MinigrpoError
from minigrpo.runs.rundir import RunDir
from tests.helpers.served import ASKED, after, exported_run, file_of

pytestmark = pytest.mark.extra("gguf")

KEY = "sk-not-to-be-seen-7"
PAGE = "https://page.example"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return exported_run(tmp_path_factory.mktemp("served"))


def started(run: RunDir, log: Path | None = None, **options: Any) -> ServerProcess:
    head, host = read_header(file_of(run)), options.pop("host", "127.0.0.1")
    return ServerProcess(llama_command(head, host=host, port=reserve_port(host, 0), **options), log=log)


@pytest.fixture(scope="module")
def pair(run: RunDir) -> Iterator[ServerCommand]:
    """Serve two requests at a time, without a key, and for the pages of one origin."""
    with (process := started(run, parallel=2, access=Access(cors=PAGE))):
        yield process.command


@pytest.fixture(scope="module")
def locked(run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with (process := started(run, tmp_path_factory.mktemp("log") / "serve.log", access=Access(KEY))):
        yield process


def send(command: ServerCommand, method: str, path: str, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", command.port, timeout=60)
    body = json.dumps({"messages": ASKED, "max_tokens": 2}) if method == "POST" else None
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    reply = connection.getresponse()
    reply.raw = reply.read()  # type: ignore[attr-defined]
    return reply


CHAT = "/v1/chat/completions"


# The key


@pytest.mark.parametrize("sent", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"X_Api_Key": KEY}])
@pytest.mark.parametrize(("method", "path"), [("POST", CHAT), ("GET", "/v1/models"), ("GET", "/props")])
def test_who_sends_no_key_is_refused_as_openai_refuses(
    locked: ServerProcess, method: str, path: str, sent: dict[str, str]
) -> None:
    reply = send(locked.command, method, path, **sent)
    error = json.loads(reply.raw)["error"]  # type: ignore[attr-defined]
    assert (reply.status, error["code"], error["type"]) == (401, "invalid_api_key", "invalid_request_error")


def test_who_sends_the_key_is_answered_and_health_is_open(locked: ServerProcess) -> None:
    assert send(locked.command, "POST", CHAT, Authorization=f"Bearer {KEY}").status == 200
    assert send(locked.command, "GET", "/health").status == 200
    assert locked.client.chat(ASKED, max_tokens=2) is not None


def test_verify_asks_a_locked_server_with_the_key_of_the_environment(
    locked: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIGRPO_API_KEY", KEY)
    assert ServerClient.at(locked.command.url).model == "mine-Q8_0"
    monkeypatch.setenv("MINIGRPO_API_KEY", "wrong")
    with pytest.raises(MinigrpoError, match=r"401\): Send the server's key"):
        ServerClient.at(locked.command.url)


def test_the_key_is_nowhere_to_be_read(
    locked: ServerProcess, run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    send(locked.command, "POST", CHAT, Authorization=f"Bearer {KEY}")
    assert KEY[-4:] not in locked.log.read_text()
    assert KEY not in repr(locked.command)
    assert KEY not in shlex.join(locked.command.program)
    with pytest.raises(MinigrpoError, match="without spaces and commas") as told:
        Access(f"{KEY} and more")
    assert KEY not in str(told.value)
    monkeypatch.setenv("MINIGRPO_API_KEY", KEY)
    for arguments in (
        ["--help"],
        [str(run.path), "--dry-run", "--json", "--port", "0"],
        [str(run.path), "--port", "x"],
    ):
        with pytest.raises(SystemExit):
            main.main(["serve", *arguments])
        said = capsys.readouterr()
        assert KEY not in said.out + said.err
        if "--json" in arguments:
            ready = json.loads(said.out)
            assert '-H "Authorization: Bearer $MINIGRPO_API_KEY"' in ready["curl"]
            assert 'api_key=os.environ["MINIGRPO_API_KEY"]' in ready["python"]
            assert " -e VLLM_API_KEY " in ready["docker"]


def test_every_program_gets_the_key_by_its_own_variable_or_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name: Access(KEY).environment()[name] for name in KEY_VARIABLES} == dict.fromkeys(KEY_VARIABLES, KEY)
    for name in KEY_VARIABLES:
        monkeypatch.setenv(name, "of the shell")
    assert not set(KEY_VARIABLES) & set(OPEN.environment())  # else our own client would be refused


# Pages


def test_a_foreign_page_is_refused_and_reads_nothing(locked: ServerProcess, pair: ServerCommand) -> None:
    keyed = {"Authorization": f"Bearer {KEY}"}
    for command, sent in ((locked.command, keyed), (pair, {})):
        for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("OPTIONS", CHAT)):
            for origin in ("https://evil.example", "null", "http://localhost:1"):
                reply = send(command, method, path, Origin=origin, **sent)
                assert (reply.status, reply.getheader("Access-Control-Allow-Origin")) == (403, None)
        assert send(command, "POST", CHAT, **sent).getheader("Access-Control-Allow-Origin") is None


def test_the_page_that_was_allowed_and_the_servers_own_may_ask(pair: ServerCommand) -> None:
    reply = send(pair, "POST", CHAT, Origin=PAGE)
    assert (reply.status, reply.getheader("Access-Control-Allow-Origin"), reply.getheader("Vary")) == (
        200,
        PAGE,
        "Origin",
    )
    asked = send(pair, "OPTIONS", CHAT, Origin=PAGE, Access_Control_Request_Headers="authorization,x-stainless-os")
    assert (asked.status, asked.getheader("Access-Control-Allow-Headers")) == (204, "authorization,x-stainless-os")
    assert send(pair, "GET", "/v1/models", Origin=pair.url).status == 200


def test_a_name_that_was_pointed_at_this_machine_is_refused(pair: ServerCommand) -> None:
    evil = f"evil.example:{pair.port}"
    assert send(pair, "POST", CHAT, Host=evil, Origin=f"http://{evil}").status == 403
    assert send(pair, "GET", "/v1/models", Host=evil).status == 403
    assert send(pair, "GET", "/v1/models", Host=f"localhost:{pair.port}").status == 200


@pytest.mark.parametrize("cors", ["evil.example", "http://a/b", "http://a,http://b", ""])
def test_what_is_no_origin_is_told(cors: str) -> None:
    with pytest.raises(MinigrpoError, match="is no origin"):
        Access(cors=cors)


@pytest.mark.parametrize(
    ("host", "key", "warned"),
    [
        *((host, None, True) for host in ("0.0.0.0", "::", "", "10.0.0.7", "my-box")),
        *((host, None, False) for host in ("127.0.0.1", "localhost", "::1")),
        ("0.0.0.0", KEY, False),
    ],
)
def test_who_opens_the_model_to_the_network_without_a_key_is_warned(host: str, key: str | None, warned: bool) -> None:
    assert bool(Access(key).warning(host)) == warned


def test_the_warning_is_seen_when_it_serves(run: RunDir, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main.main(["serve", str(run.path), "--once", "--port", "0", "--host", "0.0.0.0"])
    assert capsys.readouterr().err.splitlines()[-1].startswith("WARNING: no key is set, so whoever reaches 0.0.0.0")


# Several at a time


def test_two_requests_are_in_flight_at_once_each_with_the_whole_context(pair: ServerCommand) -> None:
    """Of two long answers the second begins before the first ends. The model is so quick that the second request may
    come too late; a server that answers one after the other never passes, however often it is tried."""
    assert any(second_begins < first_ends for first_ends, second_begins in (two_answers(pair) for _ in range(20)))


def two_answers(server: ServerCommand) -> tuple[float, float]:
    """Ask for two answers of 500 tokens; return when the first ends, and when the second begins."""
    begun, times = threading.Event(), dict[str, list[float]](first=[], second=[])

    def complete(name: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = {"prompt": [40], "n_predict": 500, "stream": True, "ignore_eos": True, "temperature": 0}
        connection.request("POST", "/completion", json.dumps(body))
        reply, text = connection.getresponse(), b""
        while line := reply.readline():
            if line.startswith(b"data: {"):
                text = line
                times[name].append(time.perf_counter())
                begun.set()
        assert json.loads(text[6:])["tokens_predicted"] == 500  # the model was made for 512 tokens

    first = threading.Thread(target=complete, args=("first",))
    first.start()
    assert begun.wait(60)
    complete("second")
    first.join()
    return times["first"][-1], times["second"][0]


def test_a_stream_comes_as_it_is_written(pair: ServerCommand) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", pair.port, timeout=60)
    body = {"messages": ASKED, "max_tokens": 400, "stream": True, "ignore_eos": True}
    connection.request("POST", CHAT, json.dumps(body))
    reply = connection.getresponse()
    first = reply.readline()
    assert first.startswith(b"data: {")
    connection.close()  # the client goes: its slot is free again for the next
    assert send(pair, "POST", CHAT).status == 200


def test_every_program_gets_its_own_options(run: RunDir, tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    options = {"host": "127.0.0.1", "port": 1, "context": 128, "parallel": 3}
    line = llama_command(read_header(file_of(run)), tools=tmp_path, access=Access(KEY, PAGE), **options).program
    assert (after("--parallel", line), after("--ctx-size", line)) == (["3"], ["384"])  # llama.cpp divides it
    model = VllmModel(str(run.merged))
    command = vllm_command(model, python=Path("python"), name="m", access=Access(KEY, PAGE), **options)
    for line in (command.program, shlex.split(docker_command(command, model, 1.0, 3))):
        assert (after("--max-num-seqs", line), after("--max-model-len", line)) == (["3"], ["128"])
        assert after("--allowed-origins", line) == [json.dumps([PAGE])]
        assert KEY not in " ".join(line)
    closed = vllm_command(model, python=Path("python"), name="m", host="127.0.0.1", port=1).program
    assert (after("--allowed-origins", closed), after("--max-num-seqs", closed)) == (["[]"], [])


def test_ctx_is_short_for_context_and_held_to_the_models_own(run: RunDir, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["serve", str(run.path), "--port", "0", "--ctx", "513"])
    assert ended.value.code == 2
    assert "--context 513 is more than the 512 tokens" in capsys.readouterr().err
    ready = plan_server(str(run.path), ServeOptions(engine="llama.cpp", port=0, context=128, parallel=4))
    assert json.loads(ready.command.program[-1]) | {"context": 128, "parallel": 4} == json.loads(
        ready.command.program[-1]
    )
    assert ready.command.program[0] == sys.executable
