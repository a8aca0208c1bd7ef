"""Libraries of trackers that are not there: each records what it is asked, and keeps it in a file of text."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

Calls = list[tuple[str, Any]]


def _module(patch: pytest.MonkeyPatch, name: str, **contents: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    patch.setitem(sys.modules, name, module)
    return module


def fake_tensorboard(patch: pytest.MonkeyPatch, calls: Calls) -> None:
    class SummaryWriter:
        def __init__(self, log_dir: str, purge_step: int | None = None) -> None:
            calls.append(("open", {"purge": purge_step}))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append(("figure", (step, name, value)))

        def add_text(self, name: str, text: str, step: int) -> None:
            calls.append((name, (step, text)))

        def flush(self) -> None: ...

        def close(self) -> None:
            calls.append(("close", None))

    _module(patch, "torch.utils.tensorboard", SummaryWriter=SummaryWriter)


class _Run:
    """What trackio's and W&B's init return."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def define_metric(self, name: str, step_metric: str) -> None: ...

    def log(self, figures: Mapping[str, Any], step: int | None = None) -> None:
        step = figures["step"] if step is None else step
        for name, value in figures.items():
            self._calls.append(("completions" if name == "completions" else "figure", (step, name, value)))

    def finish(self) -> None:
        self._calls.append(("close", None))


def _open(calls: Calls, known: Any, options: Mapping[str, Any]) -> _Run:
    calls.append(("open", {"known": known, **options}))
    return _Run(calls)


def fake_trackio(patch: pytest.MonkeyPatch, calls: Calls) -> None:
    def init(project: str, **options: Any) -> _Run:
        return _open(calls, options.pop("name"), {"project": project, **options})

    _module(patch, "trackio", init=init, Table=lambda dataframe: dataframe.to_dict("records"))


def fake_wandb(patch: pytest.MonkeyPatch, calls: Calls) -> None:
    def init(**options: Any) -> _Run:
        return _open(calls, options.pop("id"), options)

    _module(patch, "wandb", init=init, Settings=dict, Table=lambda columns, data: {"columns": columns, "data": data})


def fake_mlflow(patch: pytest.MonkeyPatch, calls: Calls) -> None:
    class MlflowClient:
        def __init__(self, place: str) -> None:
            calls.append(("place", place))

        def get_experiment_by_name(self, name: str) -> None:
            return None

        def create_experiment(self, name: str, artifacts: str | None) -> str:
            return "1"

        def create_run(self, experiment: str, run_name: str) -> Any:
            calls.append(("open", {"known": None, "name": run_name}))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

        def update_run(self, run: str, status: str) -> None:
            calls.append(("open", {"known": run}))

        def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
            calls.extend(("figure", (step, name, value)) for name, value, _, step in metrics)
            calls.extend(("knob", each) for each in params)

        def log_table(self, run: str, data: Any, file: str) -> None:
            calls.append(("completions", (file, data)))

        def set_terminated(self, run: str) -> None:
            calls.append(("close", None))

    _module(patch, "mlflow")
    _module(patch, "mlflow.tracking", MlflowClient=MlflowClient)
    _module(patch, "mlflow.entities", Metric=lambda *each: each, Param=lambda *each: each)


FAKES = {"tensorboard": fake_tensorboard, "trackio": fake_trackio, "wandb": fake_wandb, "mlflow": fake_mlflow}


def everything_written(folder: Path) -> bytes:
    """Every byte of every file below a folder, names included."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return b"\n".join(str(path.relative_to(folder)).encode() + b"\n" + path.read_bytes() for path in files)


def as_text(calls: Calls) -> str:
    return json.dumps(calls, default=str)
