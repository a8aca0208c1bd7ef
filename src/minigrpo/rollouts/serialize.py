"""Graded groups as JSON and back: what a checkpoint keeps of recent groups, and an evaluation of its answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from minigrpo.types import Completion, Grade, Group, Prompt
from minigrpo.utils.json_values import json_ready


def group_data(group: Group) -> dict[str, Any]:
    """Write a group as JSON can hold it; its prompt by id alone."""
    return {
        "prompt": group.prompt.id,
        "prompt_ids": group.prompt_ids,
        "completions": [_completion_data(completion) for completion in group.completions],
        "grades": [asdict(replace(grade, notes=json_ready(grade.notes))) for grade in group.grades],
    }


def _completion_data(completion: Completion) -> dict[str, Any]:
    """Write a completion; the server that sampled it only where there are several."""
    data = asdict(completion)
    return data if completion.sampler else {name: value for name, value in data.items() if name != "sampler"}


def group_of(row: Mapping[str, Any], known: Mapping[str, Prompt]) -> Group:
    """Read back what `group_data` gave, with the prompt that has its id, or of which it was a copy."""
    name = row["prompt"]
    prompt = known[name] if name in known else replace(known[name.rpartition("#")[0]], id=name)
    completions = [
        Completion(**{**data, "token_ids": tuple(data["token_ids"]), "logprobs": tuple(data["logprobs"])})
        for data in row["completions"]
    ]
    return Group(prompt, tuple(row["prompt_ids"]), tuple(completions), tuple(Grade(**data) for data in row["grades"]))
