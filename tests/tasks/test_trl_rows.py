"""Rows as TRL's data sets have them: contents in parts, empty tool calls, a column of messages."""

import json

import pytest

from minigrpo.errors import TaskError
from minigrpo.models.chat_template import render
from minigrpo.tasks.common.dataset import read_data
from minigrpo.tasks.custom.reward_task import reward_task

OTHER = {"prompt": [{"role": "user", "content": "another"}]}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def part(text):
    return {"type": "text", "text": text}


def first_prompt(row, **functions):
    task = reward_task(lambda completion: 1.0, rows=[row], test_rows=[OTHER], **functions)
    return task.prompts("train")[0]


def user(content):
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ([user([part("2 + 2?")])], [user("2 + 2?")]),
        ([user([part("2 + "), part("2?")])], [user("2 + 2?")]),
        ([user([{"type": "text", "text": "2?", "cache": None}])], [user("2?")]),
        ([{**user("2?"), "tool_calls": []}], [user("2?")]),
        ([{**user("2?"), "tool_calls": None, "name": None}], [user("2?")]),
        ([{**user("2?"), "weight": 0, "turn": None}], [{**user("2?"), "weight": 0}]),
        ([{**user("2?"), "timestamp": 1.5, "tags": ["a"]}], [{**user("2?"), "timestamp": 1.5, "tags": ["a"]}]),
        (
            [user("2?"), {"role": "assistant", "content": "It is", "prefix": True}],
            [user("2?"), {"role": "assistant", "content": "It is", "prefix": True}],
        ),
        (
            [user("2?"), {"role": "assistant", "content": [], "tool_calls": []}],
            [user("2?"), {"role": "assistant", "content": ""}],
        ),
        (
            [
                user("2?"),
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "4"},
            ],
            [user("2?"), {"role": "assistant", "tool_calls": [CALL], "content": ""}, {"role": "tool", "content": "4"}],
        ),
    ],
)
def test_messages_are_taken_as_trl_takes_them(given, taken):
    assert list(first_prompt({"prompt": given}).messages) == taken


def test_parts_are_rendered_as_their_text(tokenizer):
    parts, plain = ({"prompt": [user(content)]} for content in ([part("2 + "), part("2?")], "2 + 2?"))
    assert render(tokenizer, first_prompt(parts)).ids == render(tokenizer, first_prompt(plain)).ids


def test_calls_of_tools_reach_the_template(make_tokenizer):
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for call in m.tool_calls or [] %}"
        "[{{ call.function.name }}]{% endfor %};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    asked = [user("2?"), {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "4"}]
    tokenizer = make_tokenizer(template)
    assert (
        tokenizer.decode(render(tokenizer, first_prompt({"prompt": asked})).ids)
        == "user:2?;assistant:[add];tool:4;assistant:"
    )


def test_a_column_of_messages_is_the_prompt_where_there_is_no_other():
    found = first_prompt({"messages": [user("2?")], "answer": "4"})
    assert (list(found.messages), found.target) == ([user("2?")], {"answer": "4"})


def test_a_column_of_messages_beside_a_prompt_is_passed_on():
    found = first_prompt({"prompt": [user("2?")], "messages": [user("other")]})
    assert (list(found.messages), found.target) == ([user("2?")], {"messages": [user("other")]})


def test_messages_come_from_files_as_well(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"messages": [user([part(text)])]}) for text in ("a", "b")))
    assert {row.prompt[0]["content"] for rows in read_data(str(file)).values() for row in rows} == {"a", "b"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [user("2?"), {"role": "assistant", "content": "4"}]}, "would give the answer away"),
        ({"prompt": [user([{"type": "image", "image": "x.png"}])]}, "has a part that is 'image'"),
        ({"prompt": [user(["2?"])]}, "has a part that is '2\\?'"),
        ({"prompt": [user([part("a"), {"type": "text"}])]}, "has a part that is 'text'"),
        ({"prompt": [user([part(" ")])]}, "its prompt is empty"),
        ({"prompt": [user("2?"), {"role": "assistant", "content": "\ud800"}]}, "half a character"),
        ({"prompt": [{"role": "user", "tool_calls": []}]}, "is no message"),
        ({"prompt": [{**user("2?"), "when": {1, 2}}]}, "a message has 'when': .*, which JSON cannot hold"),
        ({"prompt": [{**user("2?"), "score": float("nan")}]}, "a message has 'score': nan, which JSON cannot hold"),
        ({"prompt": [{**user("2?"), "tags": ["\ud800"]}]}, "half a character"),
        ({"prompt": [{**user("2?"), 3: "x"}]}, "a message has 3: 'x', which JSON cannot hold"),
    ],
)
def test_what_is_no_text_is_named_with_its_row(row, said):
    with pytest.raises(TaskError, match=rf"rows\[0\].*{said}"):
        first_prompt(row)
