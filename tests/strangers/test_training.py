"""A step of training and a preflight on what strangers bring: every logged reward is what the function is worth."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.helpers.command_line import DONE, REFUSED, UNFIT, called
from tests.strangers import LIMIT_S, cases
from tests.strangers.test_rewards import HEAD, Gift, given_numbers, makes, nothing, raised
from tests.strangers.test_rows import Row, tables, values, whole_tables, words

pytestmark = [pytest.mark.long, pytest.mark.timeout(LIMIT_S)]

# The embedded model, and as little of it as teaches anything.
SMALL = (
    *("--train.steps", "1", "--rollout.prompts", "2", "--rollout.completions", "2", "--rollout.max_tokens", "4"),
    *("--lora.rank", "2", "--task.seconds", "5", "--model.device", "cpu"),
)
odd_columns = st.sampled_from(
    [
        "threading.Lock()",
        "10**5000",
        "float('nan')",
        "b'x'",
        "{1, 2}",
        "object()",
        "Shapeless()",
        "sys",
        "{None: [...]}",
    ]
)


def brought(folder: Path, source: str, rows: list[Row] | None = None) -> tuple[str, ...]:
    """Write the files of a stranger, and return the options that name them."""
    (folder / "mine.py").write_text(source, encoding="utf-8")
    task = ("--task.name", f"{folder}/mine.py:score")
    if rows is None:
        return task
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (*task, "--task.data", f"{folder}/rows.jsonl")


def logged(run: Path) -> Iterator[dict[str, Any]]:
    for line in (run / "groups.jsonl").read_text(encoding="ascii").splitlines():
        yield from json.loads(line)["completions"]


def seen_by(make: str, completion: dict[str, Any], rows: list[Row]) -> Any:
    """What a function of this make is handed: the text with what the prompt began of it, or as TRL hands it, where a
    conversation is answered by a message."""
    text: str = completion["text"]
    if "completions" not in make:
        return completion.get("opening", "") + text
    return text if isinstance(rows[0]["prompt"], str) else [{"role": "assistant", "content": text}]


@cases(10)
@given(whole_tables | tables(words, values), makes, given_numbers | nothing | raised)
def test_a_step_earns_what_the_function_is_worth(rows: list[Row], make: str, gift: Gift) -> None:
    assume("answer" not in make)  # a column that these rows need not have
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        task = brought(folder, HEAD + make.replace("CODE", gift.code), rows)
        ended = called("train", "quickstart", *task, *SMALL, "--run", folder / "run")
        if ended.code == REFUSED:
            assert "mine.py" in ended.refused or "rows.jsonl" in ended.refused or "could not score" in ended.refused
            return
        assert ended.code == DONE
        assert gift.worth is not None
        for completion in logged(folder / "run"):
            assert completion["reward"] == gift.worth(seen_by(make, completion, rows))


@cases(6)
@given(odd_columns, st.sampled_from(["preflight", "train", "evaluate"]))
def test_odd_columns_of_rows_disturb_nothing(code: str, verb: str) -> None:
    rows = f'rows = [{{"prompt": f"say {{i}}", "odd": {code}}} for i in range(4)]\n'
    score = "def score(completion, odd, log_extra=print):\n    return len(completion)\n"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        task = brought(folder, f"import threading\n{HEAD}{rows}{score}")
        where = {
            "preflight": ("quickstart", "--seconds", "1", "--run", folder / "run"),
            "train": ("quickstart", "--run", folder / "run"),
            "evaluate": ("seedling", "--limit", "2", "--out", folder / "found.json"),
        }
        ended = called(verb, *where[verb], *task, *SMALL)
    assert ended.code in (DONE, UNFIT), ended.err
