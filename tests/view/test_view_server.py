"""The server tells a run to whoever has the token, and nothing to anybody else."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from minigrpo.errors import ArtifactError, MinigrpoError
from minigrpo.runs.logger import RunLogger
from minigrpo.runs.rundir import RunDir
from minigrpo.view.library import Library
from minigrpo.view.server import ViewServer, page_files
from tests.helpers.logged_runs import HOSTILE, KNOBS, append, figures, hostile_run, log_step, logged_run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    logged_run(tmp_path / "runs/first")
    logged_run(tmp_path / "runs/sweep/second", steps=4, knobs=KNOBS + "seed: 1\n")
    hostile_run(tmp_path / "runs/hostile")
    (tmp_path / "runs/no-run").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def server(runs: Path) -> Iterator[ViewServer]:
    with ViewServer(Library(runs)).running() as server:
        yield server


class Asker:
    """Asks over one connection, as a page does."""

    def __init__(self, server: ViewServer) -> None:
        self.server = server
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)

    def get(self, path: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request("GET", path, headers={"Authorization": f"Bearer {self.server.token}", **named})
        answer = self.connection.getresponse()
        return answer.status, answer.read(), dict(answer.headers)

    def ask(self, question: str, **query: Any) -> Any:
        status, body, _ = self.get(f"/api/{question}?{urlencode(query)}")
        assert status == 200, body
        return json.loads(body)


@pytest.fixture
def asker(server: ViewServer) -> Asker:
    return Asker(server)


def test_it_listens_on_this_machine_alone(server: ViewServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert f"#token={server.token}" in server.url
    assert len(server.token) >= 32


@pytest.mark.parametrize("headers", [{"Authorization": ""}, {"Authorization": "Bearer wrong"}, {"Authorization": "ü"}])
def test_without_the_token_nothing_is_told(asker: Asker, headers: dict[str, str]) -> None:
    for question in ("runs", "metrics?run=first", "nonsense"):
        status, body, _ = asker.get(f"/api/{question}", **headers)
        assert status == 401
        assert b"first" not in body


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1"},
        {"Host": "evil.example:80"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_what_another_page_may_have_sent_is_refused(asker: Asker, headers: dict[str, str]) -> None:
    for path in ("/api/runs", "/"):
        assert asker.get(path, **headers)[0] == 403


def test_a_link_on_another_page_opens_the_page_and_asks_nothing(asker: Asker) -> None:
    clicked = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    assert asker.get("/", **clicked)[0] == 200
    assert asker.get("/api/runs", **clicked)[0] == 403
    assert asker.get("/", **{**clicked, "Sec_Fetch_Dest": "iframe"})[0] == 403


def test_the_page_itself_may_ask(asker: Asker) -> None:
    for host in asker.server.hosts:
        headers = {"Host": host, "Origin": f"http://{host}", "Sec_Fetch_Site": "same-origin"}
        assert asker.get("/api/runs", **headers)[0] == 200


@pytest.mark.parametrize("path", ["/", "/app.js", "/api/runs", "/api/none", "/missing"])
def test_every_answer_forbids_whatever_the_page_does_not_need(asker: Asker, path: str) -> None:
    status, _, headers = asker.get(path)
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "require-trusted-types-for 'script'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert "Set-Cookie" not in headers
    assert (status == 200) == (path in ("/", "/app.js", "/api/runs"))


@pytest.mark.parametrize(("method", "status"), [("POST", 405), ("PUT", 501), ("DELETE", 501), ("OPTIONS", 501)])
def test_nothing_can_be_changed(asker: Asker, method: str, status: int) -> None:
    asker.connection.request(method, "/api/runs", headers={"Authorization": f"Bearer {asker.server.token}"})
    assert asker.connection.getresponse().status == status


def test_no_file_but_the_pages_own_is_served(asker: Asker, runs: Path) -> None:
    assert "index.html" in page_files()
    for path in (
        "/../server.py",
        "/%2e%2e/server.py",
        f"/{runs}/first/recipe.yaml",
        "/vendor/../../server.py",
        "//etc/passwd",
    ):
        assert asker.get(path)[0] == 404
    for name in ("../no-run", "no-run", "/etc", "first/../first", ".", ""):
        assert asker.get(f"/api/run?{urlencode({'run': name})}")[0] == 400


def test_runs_are_found_and_told_apart(asker: Asker) -> None:
    found = asker.ask("runs")
    assert [run["name"] for run in found["runs"]] == ["first", "hostile", "sweep/second"]
    first = found["runs"][0]
    assert (first["steps"], first["of"], first["state"], first["task"]) == (20, 40, "idle", "wordproblems")
    assert asker.ask("run", run="sweep/second")["knobs"]["seed"] == 1


def test_a_run_that_is_named_itself_is_the_first_to_be_shown(runs: Path) -> None:
    library = Library(runs / "first")
    assert library.first == "first"
    assert len(library.runs()) == 3
    with pytest.raises(ArtifactError, match="minigrpo view runs"):
        Library(runs / "nowhere")


def test_a_runs_forks_are_listed_beside_it(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "first", tmp_path / "mine" / "first")
    shutil.copytree(runs / "first", tmp_path / "mine" / "first" / "forks" / "at5-to10")
    assert [run.name for run in Library(tmp_path / "mine").runs()] == ["first", "first/forks/at5-to10"]


def test_new_figures_alone_are_sent_and_all_of_them_after_a_rewind(asker: Asker, runs: Path) -> None:
    whole = asker.ask("metrics", run="first")
    assert len(whole["steps"]) == len(whole["columns"]["reward"]) == 20
    append(runs / "first/metrics.jsonl", [{"step": 21, "reward": None, "new/figure": 1.5}])
    more = asker.ask("metrics", run="first", since=20, generation=whole["generation"])
    assert more["steps"] == [21]
    assert more["columns"]["reward"] == [None]
    assert more["columns"]["new/figure"] == [1.5]
    assert asker.ask("metrics", run="first")["columns"]["new/figure"][:20] == [None] * 20
    (runs / "first/metrics.jsonl").write_text("")
    append(runs / "first/metrics.jsonl", [figures(1, 0.25)])
    anew = asker.ask("metrics", run="first", since=21, generation=whole["generation"])
    assert (anew["steps"], anew["since"]) == ([1], 0)
    assert anew["generation"] != whole["generation"]


def test_whoever_waits_is_told_of_a_new_step_within_two_seconds(asker: Asker, runs: Path) -> None:
    for query in ({"run": "first"}, {}):
        news = asker.ask("run", run="first")["news"] if query else asker.ask("runs")["news"]
        threading.Timer(0.2, log_step, (runs / "first", 21)).start()
        start = time.monotonic()
        assert asker.ask("wait", news=news, **query)["news"] != news
        assert 0.15 < time.monotonic() - start < 2


def test_a_step_of_groups_comes_without_texts_and_a_group_with_them(asker: Asker) -> None:
    step = asker.ask("step", run="first", step=10)
    assert (step["step"], step["first"], step["last"]) == (10, 1, 20)
    assert [group["prompt"] for group in step["groups"]] == ["a1", "z1"]
    assert step["groups"][0]["rewards"] == [1.2, 1.2, 0.2, 0.2]
    assert "text" not in json.dumps(step)
    group = asker.ask("group", run="first", line=step["groups"][1]["line"])
    assert group["prompt"] == "z1"
    assert group["completions"][0]["text"] == "say 0"
    assert asker.ask("step", run="first", step=999)["step"] == 20
    assert asker.get("/api/group?run=first&line=999")[0] == 400


def test_hostile_texts_come_through_as_they_are(asker: Asker) -> None:
    group = asker.ask("group", run="hostile", line=0)
    assert tuple(each["text"] for each in group["completions"]) == HOSTILE
    assert asker.get("/api/group?run=hostile&line=1")[0] == 400
    assert asker.ask("find", run="hostile", text="JAVASCRIPT:")["hits"][0]["sibling"] == 2


def test_the_change_between_two_windows_is_split_exactly(asker: Asker) -> None:
    why = asker.ask("why", run="first", before="1-6", after="15-20")
    change = why["change"]
    assert change["after"] - change["before"] == pytest.approx(change["total"]["value"], abs=1e-12)
    for split in change["splits"]:
        assert sum(term["value"] for term in split["terms"]) == pytest.approx(change["total"]["value"], abs=1e-9)
    assert why["by"] == "prompt"
    assert why["fields"] == ["prompt", "kind"]
    assert len(why["up"]) == 6
    assert why["up"][0]["moved"] >= why["up"][-1]["moved"] > 0
    assert asker.ask("why", run="first", before="1-6", after="15-20", by="kind")["up"][0]["name"] in ("sum", "product")
    assert asker.ask("why", run="first", before="90-99", after="15-20")["change"] is None
    assert asker.get("/api/why?run=first&before=1&after=2-3")[0] == 400


def test_of_a_window_with_too_many_groups_a_sample_is_split(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minigrpo.view.why.MOST_GROUPS", 5)
    why = asker.ask("why", run="first", before="1-6", after="15-16")
    assert [(window["groups"], window["of"]) for window in why["windows"]] == [(5, 12), (4, 4)]
    assert why == asker.ask("why", run="first", before="1-6", after="15-16")
    for split in why["change"]["splits"]:
        assert sum(term["value"] for term in split["terms"]) == pytest.approx(why["change"]["total"]["value"])


def test_counter_examples_are_found(asker: Asker, runs: Path) -> None:
    from tests.helpers.logged_runs import completion, group

    folder = logged_run(runs / "hacked", steps=0)
    before = [completion("a b", 1.0, solved=True), completion("a b c", 0.0)]
    after = [completion("w o r d s", 1.5, solved=False), completion("w o r d s", 1.2, solved=True)]
    longer = [completion("1 2 3 4", 0.0), completion("one two three four", 0.0)]
    short = [completion("1", 0.1), completion("2", 0.1)]
    rows = [
        group(1, "hacked", before),
        group(1, "longer", short),
        group(2, "hacked", after),
        group(2, "longer", longer),
    ]
    append(folder / "groups.jsonl", rows)
    asker.server.library._looked = -9.0
    why = asker.ask("why", run="hacked", before="1-1", after="2-2")
    assert [pool["name"] for pool in why["longer without reward"]] == ["longer"]
    assert [(row["prompt"], row["sibling"]) for row in why["wrong but well paid"]] == [("hacked", 0)]
    assert [(row["prompt"], row["same"]) for row in why["near-duplicates"]] == [("hacked", 2)]
    after[1]["solved"] = False
    append(folder / "groups.jsonl", [group(3, "hacked", after)])
    worse = asker.ask("why", run="hacked", before="1-1", after="3-3")
    assert [pool["name"] for pool in worse["reward up, right down"]] == ["hacked"]


def test_a_prompt_is_followed_through_time(asker: Asker, runs: Path) -> None:
    assert asker.ask("prompts", run="first", text="A")["prompts"][0] == {"prompt": "a1", "drawn": 7}
    told = asker.ask("prompt", run="first", prompt="a1")
    assert [time["step"] for time in told["times"]] == [1, 4, 7, 10, 13, 16, 19]
    assert told["times"][-1]["reward"] > told["times"][0]["reward"]
    assert told["rests"] is False
    logged_run(runs / "resting", knobs=KNOBS + "groups: {rest: 0.9}\n")
    asker.server.library._looked = -9.0
    assert asker.ask("prompt", run="resting", prompt="a2")["rests"] is True


def test_alarms_kills_and_resumes_are_marks(asker: Asker, runs: Path) -> None:
    run = RunDir(runs / "first")
    with RunLogger(run, 40) as logger:
        logger.note("began", 0)
        logger.note("resumed", 8)  # no end before it: it was killed
        logger.note("failed", 20, "The gradient was not finite.")
    append(run.metrics, [{**figures(step, 0.0), "completions/clipped_ratio": 1.0} for step in range(21, 27)])
    marks = asker.ask("marks", run="first")["marks"]
    assert [(mark["step"], mark["kind"]) for mark in marks if mark["kind"] != "alarm"] == [
        (0, "began"),
        (8, "killed"),
        (8, "resumed"),
        (20, "failed"),
    ]
    assert "not finite" in next(mark["text"] for mark in marks if mark["kind"] == "failed")
    alarms = [mark for mark in marks if mark["kind"] == "alarm"]
    assert any("max_tokens" in mark["text"] for mark in alarms)
    assert asker.ask("marks", run="first")["marks"] == marks  # told once, however often it is asked for


def test_a_run_whose_process_is_gone_was_killed(asker: Asker, runs: Path) -> None:
    import os
    import socket

    lock = runs / "first/.lock"
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": "now", "command": "train"}
    lock.write_text(json.dumps(holder))
    assert asker.ask("run", run="first")["state"] == "running"
    lock.write_text(json.dumps({**holder, "pid": 2**22 + 1}))
    assert asker.ask("run", run="first")["state"] == "killed"


def test_stages_tell_what_is_there_and_what_is_damaged(asker: Asker, runs: Path) -> None:
    folder = runs / "first"
    (folder / "preflight.json").write_text('{"go": true, "figures": {"planned_memory_gb": 1.5}}')
    (folder / "parity.json").write_text("{")
    (folder / "evals").mkdir()
    for name, rights in (("base", "001"), ("tuned", "011")):
        rows = [{"prompt": f"p{i}", "text": f"{name} {i}", "solved": right == "1"} for i, right in enumerate(rights)]
        scores = {"accuracy": {"value": 0.5}, "answers": rows}
        (folder / f"evals/{name}-x-test.json").write_text(json.dumps({"name": name, "scores": scores}))
    stages = asker.ask("stages", run="first")
    assert stages["preflight"]["go"] is True
    assert "damaged" in stages["parity"]["damaged"]
    assert [each["file"] for each in stages["evaluations"]] == ["base-x-test.json", "tuned-x-test.json"]
    assert "answers" not in stages["evaluations"][0]["scores"]
    assert "recipe.yaml" in [file["name"] for file in stages["files"]]
    assert asker.ask("metrics", run="first")["planned_memory_gb"] == 1.5
    query = {"run": "first", "file": "tuned-x-test.json", "beside": "base-x-test.json"}
    flips = asker.ask("evaluation", **query, only="gained")
    assert flips["counts"] == {"gained": 1, "lost": 0, "right": 2, "wrong": 1}
    assert [(row["answer"]["text"], row["before"]["text"]) for row in flips["rows"]] == [("tuned 1", "base 1")]
    assert asker.ask("evaluation", run="first", file="../recipe.yaml")["rows"] == []


def test_a_port_that_is_taken_is_named(server: ViewServer, runs: Path) -> None:
    with pytest.raises(MinigrpoError, match=f"Port {server.port} cannot be used.*--port 0"):
        ViewServer(Library(runs), server.port)


def test_nothing_in_a_run_is_written(asker: Asker, runs: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    for question in ("run", "metrics", "marks", "step", "prompts", "stages", "find"):
        asker.ask(question, run="first")
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before
