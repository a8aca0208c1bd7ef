"""Folders laid out as on the Hub, or by `save_to_disk`, are read as `load_dataset` reads them."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from minigrpo.config.load import load_recipe
from minigrpo.errors import TaskError
from minigrpo.tasks.common.dataset import read_data

ROWS = [{"prompt": f"what is {i}?", "answer": str(i)} for i in range(30)]
OTHERS = [{"prompt": f"who is {i}?", "answer": str(i)} for i in range(10)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def put(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def rows_of(source, split):
    return [{"prompt": row.prompt, **row.columns} for row in read_data(str(source))[split]]


def splits(folder, train, test):
    put(folder / train, ROWS[:20])
    put(folder / test, ROWS[20:])
    return folder


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("main/train-00000-of-00001.parquet", "main/test-00000-of-00001.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("data/train.jsonl", "data/test.jsonl"),
        ("train/part.jsonl", "test/part.jsonl"),
    ],
)
def test_the_layouts_of_the_hub_are_read_as_load_dataset_reads_them(tmp_path, train, test):
    folder = splits(tmp_path / "mine", train, test)
    assert rows_of(folder, "train") == ROWS[:20] == list(datasets.load_dataset(str(folder), split="train"))
    assert rows_of(folder, "test") == ROWS[20:]


def test_several_shards_are_one_split_and_without_a_test_split_one_in_ten_is_kept_aside(tmp_path):
    for number in range(3):
        put(tmp_path / f"mine/data/train-0000{number}-of-00003.parquet", ROWS[10 * number : 10 * number + 10])
    table = read_data(str(tmp_path / "mine"))
    assert len(table["train"]) + len(table["test"]) == 30
    assert table["test"]
    assert "mine train, row " in table["train"][0].where


CARD = """---
license: mit
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: other
  data_files:
  - split: train
    path: more/train-*
---
# A data set
"""


def test_the_configs_of_a_card_are_followed(tmp_path):
    folder = splits(tmp_path / "mine", "main/train-00000-of-00001.parquet", "main/test-00000-of-00001.parquet")
    put(folder / "more/train-00000-of-00001.parquet", OTHERS)
    put(folder / "train.jsonl", OTHERS)
    plain = rows_of(folder, "train") + rows_of(folder, "test")
    assert sorted(plain, key=str) == OTHERS  # without a card, train.jsonl is the data
    (folder / "README.md").write_text(CARD)
    assert rows_of(folder, "train") == rows_of(f"{folder}:main", "train") == ROWS[:20]
    assert len(rows_of(f"{folder}:other", "train") + rows_of(f"{folder}:other", "test")) == 10
    (folder / "README.md").write_text(CARD.replace("  default: true\n", ""))
    with pytest.raises(TaskError, match=r"could not be read as a data set: .*'main', 'other'.*--task\.data .*:CONFIG"):
        read_data(str(folder))
    with pytest.raises(TaskError, match=r"mine:third could not be read.*third"):
        read_data(f"{folder}:third")


def test_what_save_to_disk_wrote_is_read(tmp_path):
    whole = datasets.Dataset.from_list(ROWS)
    parts = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[:20]), "test": whole.select(range(20, 30))})
    parts.save_to_disk(str(tmp_path / "parts"))
    whole.save_to_disk(str(tmp_path / "whole"))
    assert (rows_of(tmp_path / "parts", "train"), rows_of(tmp_path / "parts", "test")) == (ROWS[:20], ROWS[20:])
    table = read_data(str(tmp_path / "whole"))
    assert len(table["train"]) + len(table["test"]) == 30


def test_a_damaged_or_foreign_folder_ends_in_a_sentence(tmp_path):
    (tmp_path / "mine/data").mkdir(parents=True)
    (tmp_path / "mine/data/train-00000-of-00001.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(TaskError, match="mine could not be read as a data set"):
        read_data(str(tmp_path / "mine"))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(TaskError, match="saved could not be read as a data set"):
        read_data(str(tmp_path / "saved"))
    put(tmp_path / "odd/data/validation-00000-of-00001.parquet", ROWS)
    with pytest.raises(TaskError, match="has no train split, but validation"):
        read_data(str(tmp_path / "odd"))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/notes.md").write_text("nothing")
    with pytest.raises(TaskError, match="has no train file"):
        read_data(str(tmp_path / "pictures"))


def test_a_recipe_keeps_the_folder_and_its_config_as_an_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe(None, {"task.data": "mine:main"}).task.data == f"{tmp_path}/mine:main"
    assert load_recipe(None, {"task.data": "mine"}).task.data == f"{tmp_path}/mine"
    assert load_recipe(None, {"task.data": "mine:"}).task.data == "mine:"
    assert load_recipe(None, {"task.data": "owner/mine:main"}).task.data == "owner/mine:main"
