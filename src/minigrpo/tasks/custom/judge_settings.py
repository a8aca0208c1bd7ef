"""The settings of a judge, a YAML or JSON file:

url: https://api.openai.com/v1       # whatever speaks OpenAI's chat protocol
model: gpt-4o-mini
key: OPENAI_API_KEY                  # the environment variable that holds the key; none for a server of your own
template: |
  Question: {prompt}
  Right answer: {answer}
  Given: {completion}
  End with "Score: N", N from 0 to 10.
pattern: 'Score:\\s*([\\d.]+)'         # or field: score, where it answers {"score": 7}
high: 10
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from minigrpo.config.schema import Config
from minigrpo.config.schema import field as knob  # one of the settings is called field
from minigrpo.errors import TaskError

PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
"""A name in a template. JSON as an example in it, {"score": 1}, is none."""


class JudgeSettings(Config):
    url: str = knob(..., "base URL of the server, http://HOST:8000/v1", pattern="^https?://")
    model: str = knob(..., "name of the model", min_length=1)
    template: str = knob(..., "what it is asked, with {completion}, {prompt}, {answer} and other columns of the row")
    system: str | None = knob(None, "system message before it; null: none")
    pattern: str | None = knob(None, "regular expression; the group of its last match is the number")
    field: str | None = knob(None, "name in a JSON object of its answer that holds the number")
    low: float = knob(0.0, "number that becomes a reward of 0; smaller ones are unreadable")
    high: float = knob(1.0, "number that becomes a reward of 1; larger ones are unreadable")
    key: str | None = knob(None, "environment variable that holds the key; null: none is sent")
    max_tokens: int | None = knob(1024, "longest answer; null: the server's own limit", "tokens", ge=1)
    options: dict[str, Any] = knob({"temperature": 0}, "other fields of the request")
    retries: int = knob(5, "times that a call is repeated after no answer, status 408, 409, 429 or 5xx", ge=0, le=100)
    backoff: float = knob(1.0, "pause before the first repetition; it doubles each time", "seconds", ge=0, le=60)
    timeout: float = knob(60.0, "longest wait for one answer", "seconds", gt=0)
    parallel: int = knob(8, "calls at the same time", ge=1, le=1024)
    calls: int | None = knob(None, "calls of one process, repetitions too, before it stops; null: any number", ge=1)
    cache: str | None = knob("default", "file that keeps answers; default: in the package's cache; null: none")
    prices: tuple[float, float] | None = knob(None, "price of a million tokens read, and written; null: not told")

    @model_validator(mode="after")
    def _fits(self) -> JudgeSettings:
        if (self.pattern is None) == (self.field is None):
            raise ValueError("give either pattern or field: where the number stands in its answer")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as fault:
                raise ValueError(f"pattern {self.pattern!r} is no regular expression: {fault}") from None
        if "completion" not in self.placeholders:
            raise ValueError("the template has no {completion}, so every answer would be judged alike")
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        return self

    @property
    def placeholders(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(PLACEHOLDER.findall(self.template)))


def check_judge_settings(given: Any, where: str) -> JudgeSettings:
    """Check settings. Raise TaskError, naming `where` they stand and each mistake."""
    try:
        return JudgeSettings.model_validate(given)
    except ValidationError as fault:
        mistakes = "; ".join(
            f"{'.'.join(map(str, one['loc'])) or 'it'}: {one['msg'].removeprefix('Value error, ')}"
            for one in fault.errors()
        )
        raise TaskError(f"{where} describes no judge: {mistakes[:500]}. See docs/tasks.md") from None


def read_judge_settings(path: Path) -> JudgeSettings:
    """Read the file. Raise TaskError where it is missing or describes no judge."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as fault:
        raise TaskError(f"The judge's file {path} cannot be read: {fault.strerror or fault}.") from None
    # ValueError: other encodings, a date of a 13th month, a number of thousands of digits.
    except (yaml.YAMLError, ValueError, RecursionError) as fault:
        raise TaskError(f"{path} is no YAML: {' '.join(str(fault).split())[:200]}") from None
    return check_judge_settings(given, str(path))
