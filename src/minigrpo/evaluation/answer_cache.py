"""Cache the answers of an evaluation as they come, so that a killed one resumes where it stopped.

The first line holds everything that the answers depend on; if that has changed, the lines after it are ignored. A line
that a kill cut short is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minigrpo.rollouts.serialize import group_data, group_of
from minigrpo.runs.rundir import make_folder, writing
from minigrpo.types import Group, Prompt


class AnswerCache:
    """A file of graded groups. `asked`: everything that an answer depends on, as JSON-ready values."""

    def __init__(self, file: Path, asked: Mapping[str, Any]) -> None:
        self.file = file
        self.header = json.dumps({"asked": asked}, sort_keys=True, default=str)

    def load(self, prompts: Sequence[Prompt]) -> dict[str, Group]:
        """Return the cached groups by prompt, and rewrite the file so that it holds nothing else."""
        by_id = {prompt.id: prompt for prompt in prompts}
        rows = [row for row in self._rows() if row["prompt"] in by_id]
        with writing(self.file):
            make_folder(self.file.parent)
            lines = [self.header, *(json.dumps(row) for row in rows)]
            self.file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return {row["prompt"]: group_of(row, by_id) for row in rows}

    def add(self, groups: Sequence[Group]) -> None:
        """Append groups. Raise ArtifactError where the disk is full."""
        with writing(self.file), self.file.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(group_data(group), default=str) + "\n" for group in groups)

    def _rows(self) -> Iterator[dict[str, Any]]:
        if not self.file.is_file():
            return
        header, *lines = self.file.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        if header != self.header:
            return
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and {"prompt", "completions", "grades"} <= row.keys():
                yield row
