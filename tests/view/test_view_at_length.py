"""A log of half a gigabyte opens at once, and a server on which nobody asks costs nothing."""

from __future__ import annotations

import http.client
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.helpers.logged_runs import KNOBS, append, completion, figures, group, logged_run

STEPS, GROUPS, SIBLINGS, WORDS = 5000, 8, 8, 256
MOST_BYTES = 150e6


class Served:
    """A server in a process of its own, as the command starts it."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "minigrpo", "view", str(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdout is not None
        lines = iter(self.process.stdout)
        address = next(line.strip() for line in lines if "http://" in line)
        self.place, _, self.token = address.removeprefix("http://").partition("/#token=")

    def ask(self, question: str, **query: Any) -> tuple[Any, float]:
        """Return the answer and the seconds that it took."""
        start = time.monotonic()
        connection = http.client.HTTPConnection(self.place, timeout=60)
        connection.request(
            "GET", f"/api/{question}?{urlencode(query)}", headers={"Authorization": f"Bearer {self.token}"}
        )
        answer = connection.getresponse()
        body = json.loads(answer.read())
        assert answer.status == 200, body
        return body, time.monotonic() - start

    def wait_for_news(self, run: str, news: str) -> None:
        """Wait as a page does, until there are some or the server ends."""
        with suppress(http.client.HTTPException, OSError):
            self.ask("wait", run=run, news=news)

    def peak_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])

    def cpu_seconds(self) -> float:
        stats = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(stat.read_text().split()[0]) for stat in stats) / 1e9


@contextmanager
def served(folder: Path) -> Iterator[Served]:
    server = Served(folder)
    try:
        yield server
    finally:
        server.process.terminate()
        server.process.wait(20)


def test_the_command_serves_until_ctrl_c_and_loads_nothing_heavy(tmp_path: Path) -> None:
    import signal

    logged_run(tmp_path / "runs/first", steps=3)
    server = Served(tmp_path / "runs")
    assert [run["name"] for run in server.ask("runs")[0]["runs"]] == ["first"]
    maps = Path(f"/proc/{server.process.pid}/maps")
    if maps.exists():
        assert "torch" not in maps.read_text()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(20) == 0


def long_run(folder: Path) -> Path:
    """Log half a gigabyte: every step has the same texts, of which the step and the rewards are others."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(KNOBS)
    draw = random.Random(0)
    words = [
        " ".join(draw.choice(("so", "then", "three", "adds", "carry", "numbers")) for _ in range(WORDS))
        for _ in range(8)
    ]
    lines = [
        json.dumps(group(0, f"PROMPT{at}", [completion(text, at / 10, tokens=WORDS) for text in words]))
        for at in range(GROUPS)
    ]
    with (folder / "groups.jsonl").open("w") as stream:
        for step in range(1, STEPS + 1):
            for line in lines:
                own = line.replace('"step": 0', f'"step": {step}', 1)
                stream.write(own.replace("PROMPT", f"prompt-{step % 250}-", 1) + "\n")
    append(folder / "metrics.jsonl", [figures(step, step / STEPS) for step in range(1, STEPS + 1)])
    return folder


@pytest.mark.long
@pytest.mark.needs("procfs")
def test_half_a_gigabyte_opens_at_once_and_costs_little(tmp_path: Path) -> None:
    folder = long_run(tmp_path / "runs/long")
    assert 0.45e9 < (folder / "groups.jsonl").stat().st_size < 0.65e9
    with served(tmp_path / "runs") as server:
        opened = server.ask("runs")[1] + server.ask("metrics", run="long")[1]
        first, seconds = server.ask("step", run="long")
        assert first["step"] == STEPS
        assert opened + seconds <= 2.0
        taken = []
        for step in (1, 2500, 4999, 17, 3333):
            found, seconds = server.ask("step", run="long", step=step)
            for each in found["groups"][:2]:
                seconds += server.ask("group", run="long", line=each["line"])[1]
            taken.append(seconds)
        assert max(taken) <= 0.2
        assert server.ask("why", run="long", before="1-2500", after="2501-5000")[1] < 8
        hits, seconds = server.ask("find", run="long", text="prompt nobody wrote")
        assert hits["hits"] == []
        assert seconds < 1
        assert server.ask("marks", run="long")[1] < 8
        assert server.peak_bytes() <= MOST_BYTES
        news = server.ask("run", run="long")[0]["news"]
        Thread(target=server.wait_for_news, args=("long", news), daemon=True).start()
        time.sleep(1)
        before = server.cpu_seconds()
        time.sleep(20)
        assert (server.cpu_seconds() - before) * 3600 / 20 <= 1.5  # a second an hour, and the noise of a busy machine
