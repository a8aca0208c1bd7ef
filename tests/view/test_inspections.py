"""The page may start one thing: the measurement of a group, guarded like every question, one at a time."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from minigrpo.errors import more_at
from minigrpo.view.inspections import Inspections, inspect_command
from minigrpo.view.library import Library
from minigrpo.view.server import MOST_ASKED, ViewServer
from tests.helpers.logged_runs import logged_run

TELLS = "import json, sys; print(json.dumps({'asked': sys.argv[1:]}))"


def fake(path: Path, step: int, group: int) -> list[str]:
    return [sys.executable, "-c", TELLS, path.name, str(step), str(group)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ViewServer]:
    logged_run(tmp_path / "first", steps=3)
    with ViewServer(Library(tmp_path)).running() as server:
        server.inspections = Inspections(fake)
        yield server


def ask(server: ViewServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    known = {"Authorization": f"Bearer {server.token}", "Content-Type": "application/json"}
    known |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body if isinstance(body, str | None) else json.dumps(body), known)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def until_done(server: ViewServer, line: int) -> dict[str, Any]:
    end = time.monotonic() + 20
    while (state := ask(server, "GET", f"/api/inspected?run=first&line={line}")[1])["state"] == "running":
        assert time.monotonic() < end
        time.sleep(0.02)
    return dict(state)


def test_a_group_is_measured_and_kept(server: ViewServer) -> None:
    assert ask(server, "GET", "/api/inspected?run=first&line=3") == (200, {"state": "none"})
    status, state = ask(server, "POST", "/api/inspect", {"run": "first", "line": 3})
    assert (status, state["state"]) == (200, "running")
    done = {"state": "done", "found": {"asked": ["first", "2", "2"]}}
    assert until_done(server, 3) == done
    assert ask(server, "POST", "/api/inspect", {"run": "first", "line": 3})[1] == done


def test_one_group_is_measured_at_a_time(server: ViewServer) -> None:
    server.inspections = Inspections(lambda *asked: [sys.executable, "-c", "import time; time.sleep(60)"])
    ask(server, "POST", "/api/inspect", {"run": "first", "line": 0})
    _, second = ask(server, "POST", "/api/inspect", {"run": "first", "line": 1})
    assert second["state"] == "busy"
    assert "group 1 of step 1 of first" in second["error"]
    server.inspections.close()
    assert until_done(server, 0)["state"] == "failed"


def test_what_keeps_a_group_from_being_measured_is_told(server: ViewServer) -> None:
    words = f"import sys; print('error: the base is another\\n{more_at('x')}', file=sys.stderr); sys.exit(2)"
    server.inspections = Inspections(lambda *asked: [sys.executable, "-c", words])
    ask(server, "POST", "/api/inspect", {"run": "first", "line": 0})
    assert until_done(server, 0) == {"state": "failed", "error": "error: the base is another"}


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ({"run": "first", "line": 0}, {"Authorization": "Bearer wrong"}, 401),
        ({"run": "first", "line": 0}, {"Origin": "http://evil.example"}, 403),
        ({"run": "first", "line": 0}, {"Host": "evil.example"}, 403),
        ({"run": "first", "line": 0}, {"Sec_Fetch_Site": "cross-site"}, 403),
        ({"run": "first", "line": 0}, {"Content_Type": "text/plain"}, 400),
        ({"run": "first", "line": "0 " * MOST_ASKED}, {}, 400),
        ({"run": "first", "line": 6}, {}, 400),
        ({"run": "first", "line": "0; ls"}, {}, 400),
        ({"run": "../first", "line": 0}, {}, 400),
        ("[1", {}, 400),
        ([1], {}, 400),
    ],
)
def test_nothing_is_started_for_who_may_not_ask_or_asks_badly(
    server: ViewServer, body: Any, headers: dict[str, str], status: int
) -> None:
    assert ask(server, "POST", "/api/inspect", body, **headers)[0] == status
    assert server.inspections._process is None
    assert not server.inspections._found


def test_the_command_is_that_of_the_command_line(tmp_path: Path) -> None:
    command = inspect_command(tmp_path, 3, 2)
    assert command[1:4] == ["-m", "minigrpo", "inspect"]
    assert command[4:] == [str(tmp_path), "--step", "3", "--group", "2", "--json"]
