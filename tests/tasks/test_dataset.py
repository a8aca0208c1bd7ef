"""Rows from files: what loads, and that any fault in a file ends as a message with its line."""

import csv
import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from minigrpo.cli import main
from minigrpo.errors import MinigrpoError, TaskError
from minigrpo.tasks.common.dataset import read_data
from minigrpo.tasks.custom.reward_task import reward_task

ROWS = [{"prompt": f"what is {i}?", "answer": str(i)} for i in range(30)]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            table = csv.DictWriter(stream, ["prompt", "answer"])
            table.writeheader()
            table.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def as_given(rows):
    return [{"prompt": row.prompt, **row.columns} for row in rows]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_its_rows(tmp_path, kind):
    table = read_data(str(write(tmp_path / f"rows{kind}", ROWS)))
    assert sorted(as_given(table["train"] + table["test"]), key=str) == sorted(ROWS, key=str)
    assert table["test"]


def test_a_folder_has_its_splits(tmp_path):
    write(tmp_path / "train.csv", ROWS[:20])
    write(tmp_path / "test.jsonl", ROWS[20:])
    table = read_data(str(tmp_path))
    assert as_given(table["train"]) == ROWS[:20]
    assert as_given(table["test"]) == ROWS[20:]


def test_one_question_in_ten_is_unseen_and_never_stands_on_both_sides(tmp_path):
    many = [{"prompt": f"what is {i % 300}?", "answer": str(i)} for i in range(900)]
    table = read_data(str(write(tmp_path / "rows.jsonl", many)))
    sides = [{row.prompt for row in table[split]} for split in ("train", "test")]
    assert not sides[0] & sides[1]
    assert 15 <= len(sides[1]) <= 45
    for few in (2, 3, 5):
        small = reward_task(lambda completion: 1.0, rows=ROWS[:few])
        assert small.prompts("train")
        assert small.prompts("test")


def test_conversations_and_byte_order_marks_and_empty_lines_are_read(tmp_path):
    chat = {"prompt": [{"role": "system", "content": "Be."}, {"role": "user", "content": "é?", "name": None}]}
    other = {"prompt": [{"role": "user", "content": "b"}]}
    text = "\ufeff" + json.dumps(chat) + "\n\n  \r\n" + json.dumps(other) + "\n"
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    table = read_data(str(tmp_path / "rows.jsonl"))
    prompts = [row.prompt for row in table["train"] + table["test"]]
    assert ({"role": "system", "content": "Be."}, {"role": "user", "content": "é?"}) in prompts


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.jsonl", "", "holds no rows"),
        ("a.jsonl", "\n\n", "holds no rows"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": ', r"a\.jsonl:2 is no JSON"),
        ("a.jsonl", '{"prompt": "x"}\n[1]', r"a\.jsonl:2 is \[1\], not a row"),
        ("a.jsonl", '{"prompt": "x"}\n{"question": "x"}', r"a\.jsonl:2 has no 'prompt', but 'question'"),
        ("a.jsonl", '{"prompt": 3}', "its prompt is 3"),
        ("a.jsonl", '{"prompt": " "}', "its prompt is empty"),
        ("a.jsonl", '{"prompt": []}', r"its prompt is \[\]"),
        ("a.jsonl", '{"prompt": [{"role": "user"}]}', "is no message"),
        ("a.jsonl", '{"prompt": [{"role": "user", "content": 3}]}', "is no message"),
        ("a.jsonl", '{"prompt": "\\ud800"}', "half a character"),
        ("a.jsonl", '{"prompt": "x", "answer": NaN}', "NaN is not JSON"),
        ("a.jsonl", '{"prompt": "x", "answer": ' + "9" * 5000 + "}", "cannot be read"),
        ("a.jsonl", '{"prompt": ' + "[" * 100_000, "nested without end"),
        ("a.jsonl", '{"prompt": "x"}', "asks one question alone"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": [{"role": "user", "content": "x"}]}', r"mixes.*a\.jsonl:2"),
        ("a.json", '{"prompt": "x"}', "not a list of rows"),
        ("a.json", "[1]", r"row 1 is 1, not a row"),
        ("a.csv", "", "holds no rows"),
        ("a.csv", "prompt,answer\n", "holds no rows"),
        ("a.csv", "prompt,answer\nx,1\ny\n", r"a\.csv:3 has not the 2 fields"),
        ("a.csv", "prompt,answer\nx,1,2\n", r"a\.csv:2 has not the 2 fields"),
        ("a.csv", "prompt,prompt\nx,1\n", "names a column twice"),
        ("a.csv", 'prompt,answer\n"x,1\n', "is no CSV"),
        ("a.csv", "prompt\n" + "x" * 200_000 + "\n", "is no CSV"),
        ("a.parquet", "PAR1", "is no Parquet file"),
        ("a.txt", "x", r"a \.txt file"),
    ],
)
def test_a_fault_in_a_file_is_reported_with_its_line(tmp_path, name, text, told):
    (tmp_path / name).write_text(text)
    with pytest.raises(TaskError, match=told):
        read_data(str(tmp_path / name))


def test_text_in_another_encoding_is_reported_with_its_line(tmp_path):
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / name).write_bytes(b'{"prompt": "x"}\n{"prompt": "\xe9"}\n')
        with pytest.raises(TaskError, match=rf"{name}:2 is not UTF-8"):
            read_data(str(tmp_path / name))


def test_missing_files_are_reported(tmp_path):
    for source in (f"{tmp_path}/none.jsonl", "./none", "none.csv"):
        with pytest.raises(TaskError, match="is missing"):
            read_data(source)
    with pytest.raises(TaskError, match="has no train file"):
        read_data(str(tmp_path))
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "train.json", ROWS)
    with pytest.raises(TaskError, match="Leave one of them"):
        read_data(str(tmp_path))


def test_a_data_set_missing_on_the_hub_is_reported():
    with pytest.raises(TaskError, match="could not be loaded as a Hub data set"):
        read_data("nobody/nothing-of-this-name")


def test_malformed_rows_are_reported():
    with pytest.raises(TaskError, match="neither a list of rows nor a function"):
        reward_task(lambda completion: 1.0, rows=3)
    with pytest.raises(TaskError, match="rows holds no rows"):
        reward_task(lambda completion: 1.0, rows=list)
    with pytest.raises(TaskError, match=r"test_rows\[0\] is 3"):
        reward_task(lambda completion: 1.0, rows=ROWS, test_rows=[3])


def test_repeated_rows_stay_and_have_different_ids():
    task = reward_task(lambda completion: 1.0, rows=ROWS[:5] * 3)
    ids = [prompt.id for split in ("train", "test") for prompt in task.prompts(split)]
    assert len(ids) == len(set(ids)) == 15


ODD = [
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b'"',
    b"{",
    b"[" * 5000,
    b",",
    b"\n\n",
    b"9" * 6000,
    b"1e999",
    b"null",
    b"\r",
]


def mutated(raw, rng):
    """Damage the bytes: cut them short, flip bits, insert odd pieces, double a part."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) or 1)
        kind = rng.randrange(4)
        if kind == 0:
            del data[at:]
        elif kind == 1 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at:at] = rng.choice(ODD)
        else:
            data += data[at : at + 40]
    return bytes(data)


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".json", ".parquet"])
def test_no_damage_to_a_file_ends_in_a_traceback(tmp_path, kind):
    raw = write(tmp_path / f"whole{kind}", ROWS).read_bytes()
    rng, file = random.Random(kind), tmp_path / f"damaged{kind}"
    refused = []
    for _ in range(200):
        file.write_bytes(mutated(raw, rng))
        try:
            table = read_data(str(file))
        except MinigrpoError as fault:
            refused.append(str(fault))
        else:
            assert table["train"]
            assert table["test"]
    assert len(refused) > 50
    assert all(str(file) in told and len(told) < 1000 for told in refused)


def test_the_command_line_exits_with_two_and_names_the_line(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def score(completion, answer):\n    return completion == answer\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x", "answer": "1"}\n{"prompt": "y"}\n')
    name, data = f"{tmp_path}/mine.py:score", f"{tmp_path}/rows.jsonl"
    with pytest.raises(SystemExit) as ended:
        main.main(["check-task", "--task.name", name, "--task.data", data])
    told = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2
    assert "'answer', which" in told
    assert "rows.jsonl:2" in told
