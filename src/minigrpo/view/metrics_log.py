"""The figures of a run by name, read from metrics.jsonl as it grows."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator, Mapping
from math import isfinite, nan
from pathlib import Path
from typing import Any

from minigrpo.config.schema import Recipe
from minigrpo.runs.logger import metrics_of_line
from minigrpo.training.monitor.alarms import Alarms
from minigrpo.view.charts import Chart, charts_of
from minigrpo.view.group_index import number
from minigrpo.view.growing_file import GrowingFile

Mark = Mapping[str, Any]
"""Something that happened at a step: {"step", "kind", "text"}."""


class MetricsLog:
    """Every figure as a column of floats, NaN where a step lacks it, and the alarms that the figures raise.

    Safe to use from several threads. `recipe`: by which the alarms judge; None raises none.
    """

    def __init__(self, path: Path, recipe: Recipe | None, sixteen_bit: bool | None = None) -> None:
        self._lock = threading.RLock()
        self._file = GrowingFile(path)
        self._recipe, self._sixteen_bit = recipe, sixteen_bit
        self.generation = 0
        self._forget()

    def _forget(self) -> None:
        self.steps = array("q")
        self.columns: dict[str, array[float]] = {}
        self._alarms = Alarms(self._recipe, sixteen_bit=self._sixteen_bit) if self._recipe else None
        self._judged = 0
        self._marks: list[Mark] = []
        self.generation += 1

    def refresh(self) -> MetricsLog:
        with self._lock:
            for _, line in self._file.appended(self._forget):
                row = metrics_of_line(line)
                if row is not None and isinstance(row["step"], int) and abs(row["step"]) < 2**62:
                    self._add(row)
        return self

    def _add(self, row: Mapping[str, Any]) -> None:
        known = {name: number(value) for name, value in row.items() if name != "step"}
        for name in (name for name in known if name not in self.columns):
            self.columns[name] = array("d", [nan]) * len(self.steps)
        for name, column in self.columns.items():
            column.append(known.get(name, nan))
        self.steps.append(row["step"])

    def __len__(self) -> int:
        return len(self.steps)

    def since(self, start: int) -> dict[str, Any]:
        """Return steps and columns from row `start` on, as JSON can hold them."""
        with self._lock:
            columns = {name: [finite(value) for value in column[start:]] for name, column in self.columns.items()}
            return {"steps": self.steps[start:].tolist(), "columns": columns}

    def charts(self) -> list[Chart]:
        """Return the charts for which there are figures."""
        with self._lock:
            return charts_of(self.columns)

    def last(self, name: str) -> float | None:
        with self._lock:
            column = self.columns.get(name)
            return finite(column[-1]) if column else None

    def alarms(self) -> list[Mark]:
        """Return the alarms of the whole run as marks, each as it was said while the run went on."""
        with self._lock:
            if self._alarms is not None:
                for at in range(self._judged, len(self.steps)):
                    said = self._alarms.after(self.steps[at], dict(self._row(at)))
                    self._marks += [{"step": self.steps[at], "kind": "alarm", "text": text} for text in said]
                self._judged = len(self.steps)
            return list(self._marks)

    def _row(self, at: int) -> Iterator[tuple[str, float]]:
        for name, column in self.columns.items():
            if isfinite(column[at]):
                yield name, column[at]


def finite(value: float) -> float | None:
    """Return a number that JSON can hold, or None."""
    return value if isfinite(value) else None
