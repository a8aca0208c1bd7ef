"""What stands around the sandbox: refusals, the doctor, the knobs, the benchmark."""

import json
import sys
from typing import Any

import pytest

from minigrpo.errors import SandboxError
from minigrpo.sandbox import Limits, Referee
from minigrpo.sandbox.pool import missing, open_worker
from minigrpo.tasks.common.code_task import open_sandbox

pytestmark = pytest.mark.needs("linux")  # the sandbox runs nowhere else


def ask(*arguments: Any) -> Referee[Any]:
    return (yield arguments)


def test_a_machine_where_a_forbidden_call_gets_through_is_refused() -> None:
    report = {"locks": {"filter": "", "limits": ""}, "selftest": {"open": "refused", "socket": "got through"}}
    assert missing(report) == ["socket got through"]
    assert missing({"locks": {"limits": ""}, "selftest": {}}) == ["filter: not tried"]


def test_another_system_is_refused_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match=r"seccomp.*container.*--sandbox\.unsafe"):
        open_worker(Limits())


def test_the_knobs_of_a_recipe_reach_the_sandbox() -> None:
    from minigrpo.config.schema import Recipe

    knobs = Recipe.model_validate({"sandbox": {"cpu_seconds": 0.1, "memory_mb": 8, "workers": 1}}).sandbox
    with open_sandbox(knobs) as sandbox:
        assert (sandbox.limits.cpu_s, sandbox.limits.memory_mb, sandbox.workers, sandbox.unsafe) == (0.1, 8, 1, False)
        assert sandbox.run("def f(x): return [0] * 10**7", "f", ask(1)).verdict == "memory"
    assert open_sandbox(knobs, cpu_s=3.0).limits.cpu_s == 3.0


def test_the_benchmark_measures_and_finds_nothing_left() -> None:
    from benchmarks.sandboxing import measure

    figures = measure(count=4, long=20, threads=2)
    assert figures.games_per_s > 0
    assert (figures.programs, figures.grown_descriptors, figures.grown_processes) == (20, 0, 0)


def test_the_doctor_tells_every_lock(capsys: pytest.CaptureFixture[str]) -> None:
    from minigrpo.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["sandbox", "--doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (ended.value.code, report["ok"]) == (0, True)
    names = {finding["name"]: finding for finding in report["findings"]}
    assert {"filter", "limits", "empty root", "landlock", "forbidden calls", "programs"} <= names.keys()
    assert all(finding["level"] == "ok" for name, finding in names.items() if name in ("filter", "limits"))
