"""Whatever a user's row or function holds can be written as JSON, and read again."""

import decimal
import json
import math
import threading

import pytest
import torch

from minigrpo.utils.json_values import json_ready


class Unspeakable:
    def __str__(self):
        raise ValueError

    def tolist(self):
        raise ValueError


ITSELF = []
ITSELF.append(ITSELF)


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ([None, True, 3, 0.5, "é\ud800"], [None, True, 3, 0.5, "é\ud800"]),
        ([math.nan, -math.inf], [None, None]),
        ({3: (1, 2), None: {}}, {"3": [1, 2], "None": {}}),
        (torch.tensor([[1.0, math.nan]]), [[1.0, None]]),
        (torch.tensor(3), 3),
        (decimal.Decimal("0.1"), "0.1"),
        (b"x", "b'x'"),
        (Unspeakable(), "a Unspeakable"),
        ({Unspeakable(): 1}, {"a Unspeakable": 1}),
    ],
)
def test_a_value_is_what_json_can_hold(value, read):
    assert json.loads(json.dumps(json_ready(value), allow_nan=False)) == read


def test_a_number_of_thousands_of_digits_is_told_by_its_size():
    # No parameter: pytest would write it into the test's name.
    assert json_ready([10**5000]) == ["a number of 16610 bits"]
    assert json.loads(json.dumps(json_ready(10**4000))) == 10**4000


def test_what_holds_itself_or_cannot_be_copied_is_written():
    assert json.dumps(json_ready(ITSELF)).count("[") == 50
    assert "lock" in json_ready({"answer": threading.Lock()})["answer"]
