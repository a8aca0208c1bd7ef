"""One small class for each tracker: how a run is opened or continued there, and how figures and a table are logged.

All of them are called from one thread, and import their library there. What is sent is what they are given: the
libraries' own looks at the command line, the code, git and the console are switched off.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

COLUMNS = ("step", "prompt", "answer", "reward", "advantage", "right", "tokens", "finish")
"""Columns of the table of completions."""

Row = Sequence[Any]
"""One completion, in the order of COLUMNS."""


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker is told of a run. `first`: the first step that it has not got yet; `known`: the name by which the
    tracker knows the run from before, None for a new one; `folder`: where it may write."""

    name: str
    project: str
    knobs: Mapping[str, Any]
    folder: Path
    first: int
    offline: bool
    known: str | None = None


class Tracker(Protocol):
    """A tracker. Whatever a method raises ends it, and not the training."""

    def open(self, run: TrackedRun) -> str:
        """Begin the run or continue it; return the name by which it is known from now on."""
        ...

    def log(self, step: int, figures: Mapping[str, float], table: Sequence[Row]) -> None:
        """Log the figures of a step, and its completions; the table is empty in most steps."""
        ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tracking/tensorboard: tensorboard --logdir runs."""

    def open(self, run: TrackedRun) -> str:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what was logged of steps that a resumed run does again.
        purge = run.first if run.known else None
        self._writer: Any = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge)
        if not run.known:
            rows = [f"| {name} | {cell(value)} |" for name, value in run.knobs.items()]
            self._writer.add_text("recipe", "\n".join(["| knob | value |", "| --- | --- |", *rows]), 0)
        return "tensorboard"

    def log(self, step: int, figures: Mapping[str, float], table: Sequence[Row]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        if table:
            rows = [f"| {' | '.join(map(cell, row))} |" for row in table]
            head = [f"| {' | '.join(COLUMNS)} |", f"| {' | '.join(['---'] * len(COLUMNS))} |"]
            self._writer.add_text("completions", "\n".join([*head, *rows]), step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """A project of trackio's, in its own folder on this machine, or where its variables say: trackio show."""

    def open(self, run: TrackedRun) -> str:
        import trackio

        name = run.known or f"{run.name}-{uuid.uuid4().hex[:6]}"
        places = dict.fromkeys(("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"), "") if run.offline else {}
        kept = {name: os.environ.pop(name) for name in places if name in os.environ}
        try:
            self._run: Any = trackio.init(
                run.project,
                name=name,
                config=dict(run.knobs),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        finally:
            os.environ.update(kept)
        return name

    def log(self, step: int, figures: Mapping[str, float], table: Sequence[Row]) -> None:
        import pandas as pd
        import trackio

        logged: dict[str, Any] = dict(figures)
        if table:
            logged["completions"] = trackio.Table(dataframe=pd.DataFrame(list(table), columns=list(COLUMNS)))
        self._run.log(logged, step=step)

    def close(self) -> None:
        self._run.finish()


class WandB:
    """A run of Weights & Biases; offline ones lie in RUN/tracking/wandb: wandb sync FOLDER."""

    def open(self, run: TrackedRun) -> str:
        import wandb

        name = run.known or uuid.uuid4().hex[:12]
        self._run: Any = wandb.init(
            project=run.project,
            id=name,
            name=run.name,
            dir=str(run.folder),
            config=dict(run.knobs),
            mode="offline" if run.offline else None,
            resume=None if run.offline else "allow",
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, save_code=False, disable_code=True, x_disable_meta=True,
                x_disable_stats=True, x_disable_machine_info=True,
            ),
        )  # fmt: skip
        # Steps of our own: those that a resumed run does again would be refused as W&B's.
        self._run.define_metric("*", step_metric="step")
        return name

    def log(self, step: int, figures: Mapping[str, float], table: Sequence[Row]) -> None:
        import wandb

        logged: dict[str, Any] = {**figures, "step": step}
        if table:
            logged["completions"] = wandb.Table(columns=list(COLUMNS), data=[list(row) for row in table])
        self._run.log(logged)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI says; offline, and without one, in RUN/tracking/mlflow.db."""

    MOST_PARAMETER = 500
    """Characters of a parameter that MLflow takes."""

    def open(self, run: TrackedRun) -> str:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        database = run.folder / "mlflow.db"
        if not run.known:  # a kill while its tables were made leaves one that nothing can open
            database.unlink(missing_ok=True)
        own = f"sqlite:///{database.absolute()}"
        place = own if run.offline else os.environ.get("MLFLOW_TRACKING_URI", own)
        self._client: Any = MlflowClient(place)
        if run.known:
            self._id = run.known
            self._client.update_run(self._id, status="RUNNING")
            return self._id
        found = self._client.get_experiment_by_name(run.project)
        # Only the default place of artifacts is ours to choose: a server has its own.
        artifacts = (run.folder / "mlflow").absolute().as_uri() if place == own else None
        experiment = found.experiment_id if found else self._client.create_experiment(run.project, artifacts)
        self._id = str(self._client.create_run(experiment, run_name=run.name).info.run_id)
        knobs = [Param(name, str(value)[: self.MOST_PARAMETER]) for name, value in run.knobs.items()]
        for start in range(0, len(knobs), 100):  # as many as MLflow takes at a time
            self._client.log_batch(self._id, params=knobs[start : start + 100])
        return self._id

    def log(self, step: int, figures: Mapping[str, float], table: Sequence[Row]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # MLflow takes fewer characters in a name than a reward function may have in its own.
        metrics = [Metric(re.sub(r"[^\w./ -]", "_", name), value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)
        if table:
            columns = {name: [row[at] for row in table] for at, name in enumerate(COLUMNS)}
            self._client.log_table(self._id, columns, f"completions/{step:06d}.json")

    def close(self) -> None:
        self._client.set_terminated(self._id)


ADAPTERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
    "mlflow": MLflow,
}
"""Trackers by the names that `track.to` knows."""


def cell(value: Any) -> str:
    """Write a value as one cell of a Markdown table."""
    return " ".join(str(value).replace("|", "\\|").replace("<", "&lt;").split())
