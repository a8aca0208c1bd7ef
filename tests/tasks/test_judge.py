"""A model behind OpenAI's protocol as a reward, against a server of this machine."""

import json
import math
import re
import time

import pytest
import yaml

from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe, TaskConfig
from minigrpo.errors import TaskError
from minigrpo.rollouts.async_grader import Grader
from minigrpo.tasks.custom.judge import Judge
from minigrpo.tasks.custom.reward_task import reward_task
from minigrpo.tasks.registry import open_task
from minigrpo.types import Completion
from tests.helpers.judge_server import judge_server

ROWS = [{"prompt": f"say {i}", "answer": str(i)} for i in range(20)]
TEMPLATE = 'Asked {prompt}, right is {answer}, said {completion}. Answer as {"score": 5}.'


def length(words):
    """Give the length of what was said, as a model that chats: the last number counts."""
    return (
        f"<think>Score: 9</think>I would not say Score: 1, but Score: {len(re.search('said (.*)[.] Answer', words)[1])}"
    )


def graded(functions, texts=("a", "bbb"), groups=1, workers=4, rows=ROWS, **options):
    said = []
    task = reward_task(*functions, rows=rows, **options)
    with Grader(task, workers=workers, say=said.append) as grader:
        pending = grader.open_batch(task.prompts("train")[:groups])
        grades = pending.collect([tuple(Completion(text, (1,), (0.0,), "stop") for text in texts)] * groups)
    return grades, said


def rewards(*functions, **options):
    return [[grade.reward for grade in group] for group in graded(functions, **options)[0]]


def make(server, **settings):
    given = {"model": "m", "template": TEMPLATE, "pattern": r"Score: (\d+)", "high": 10, "cache": None, "backoff": 0.01}
    return Judge(**{"url": server.url, **given, **settings})


def test_the_number_in_its_answer_becomes_the_reward():
    with judge_server(length) as server:
        assert rewards(make(server, system="Be strict.", options={"temperature": 0.5})) == [[0.1, 0.3]]
    body = server.asked[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.5, 1024)
    assert body["messages"][0] == {"role": "system", "content": "Be strict."}
    asked = {one["messages"][1]["content"] for one in server.asked}
    assert 'Answer as {"score": 5}.' in asked.pop()
    assert server.keys == [None, None]


@pytest.mark.parametrize(
    ("said", "reward"),
    [
        ('{"score": 7}', 0.7),
        ('Well.\n```json\n{"why": "{x}", "score": "2.5"}\n```', 0.25),
        ('First {"score": 1}, no: {"score": 4}', 0.4),
        ('{"score": true}', 0.1),
        ('\ud800 {"score": 3}', 0.3),
        ('{"score": 11}', None),
        ('{"score": NaN}', None),
        ('{"mark": 3}', None),
        ('{"score": [3]}', None),
        ("no number", None),
        ("", None),
    ],
)
def test_a_json_field_gives_the_number_and_none_where_there_is_none(said, reward):
    with judge_server(lambda words: said) as server:
        grades, told = graded([make(server, pattern=None, field="score")])
    assert [None if math.isnan(grade.reward) else grade.reward for grade in grades[0]] == [reward] * 2
    assert ("2 without a number" in told[-1]) == (reward is None)
    assert grades[0][0].metrics == {"judge/unreadable": float(reward is None)}


def test_what_a_completion_says_is_never_taken_for_the_template():
    with judge_server(length) as server:
        rewards(make(server), texts=("{answer} {prompt} {{x}}", r"\1 \g<0> %s"))
    asked = "\n".join(one["messages"][-1]["content"] for one in server.asked)
    assert "said {answer} {prompt} {{x}}." in asked
    assert r"said \1 \g<0> %s." in asked


def test_conversations_are_written_out():
    rows = [
        {"prompt": [{"role": "system", "content": "Be."}, {"role": "user", "content": f"{i}?"}], "answer": "7"}
        for i in range(5)
    ]
    with judge_server(length) as server:
        assert rewards(make(server), rows=rows) == [[0.1, 0.3]]
    assert re.search(r"Asked system: Be\.\nuser: \d\?, right is 7, said", server.asked[0]["messages"][-1]["content"])


def test_a_template_asks_for_columns_as_a_function_does():
    bare = [{"prompt": f"say {i}"} for i in range(5)]
    with judge_server(length) as server:
        with pytest.raises(TaskError, match=r"judge asks for 'answer', which rows\[\d\] does not have"):
            rewards(make(server), rows=bare)
        missing = [{**row, "answer": None} for row in ROWS]
        assert all(math.isnan(reward) for reward in rewards(make(server), rows=missing)[0])
        assert not server.asked


def faults(codes, headers=()):
    left = list(codes)
    return lambda words: (left.pop(0), dict(headers)) if left else "Score: 5"


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_a_busy_server_is_asked_again_after_growing_pauses(code):
    with judge_server(faults([code] * 3)) as server:
        assert rewards(make(server, backoff=0.05), texts=("a",)) == [[0.5]]
    pauses = [after - before for before, after in zip(server.at, server.at[1:], strict=False)]
    assert len(pauses) == 3
    assert all(pause >= least for pause, least in zip(pauses, (0.05, 0.1, 0.2), strict=True))


def test_the_pause_that_a_server_asks_for_is_kept():
    with judge_server(faults([429], {"Retry-After": "1"})) as server:
        assert rewards(make(server), texts=("a",)) == [[0.5]]
    assert server.at[1] - server.at[0] >= 1.0


@pytest.mark.parametrize("code", [400, 401, 404])
def test_a_refusal_ends_in_a_sentence_at_once(code):
    with judge_server(lambda words: (code, {})) as server:
        with pytest.raises(
            TaskError, match=rf"judge judge \(m at http.*cannot be asked: it refused with status {code}: not now"
        ):
            rewards(make(server), texts=("a",))
        assert len(server.asked) == 1


def test_a_server_that_stays_away_or_talks_nonsense_ends_in_a_sentence():
    with judge_server(lambda words: (503, {})) as server:
        with pytest.raises(
            TaskError, match=r"no answer in 3 calls; at last it refused with status 503.*--resume.*Its row: rows"
        ):
            rewards(make(server, retries=2), texts=("a",))
        with pytest.raises(TaskError, match=r"no answer in 1 calls"):
            rewards(make(server, retries=0), texts=("b",))
    with pytest.raises(TaskError, match="no answer in 2 calls; at last URLError"):
        rewards(make(server, retries=1), texts=("a",))
    with judge_server(lambda words: "Score: 5", seconds=2) as slow, pytest.raises(TaskError, match=r"(?i)time"):
        rewards(make(slow, retries=0, timeout=0.2), texts=("a",))


def test_the_key_comes_from_the_environment_and_is_missed_by_name(monkeypatch):
    with judge_server(length) as server:
        with pytest.raises(TaskError, match="set the environment variable MY_JUDGE_KEY"):
            rewards(make(server, key="MY_JUDGE_KEY"))
        monkeypatch.setenv("MY_JUDGE_KEY", "hush\nhush")
        with pytest.raises(TaskError, match="what stands in MY_JUDGE_KEY is no key") as told:
            rewards(make(server, key="MY_JUDGE_KEY"))
        assert "hush" not in str(told.value)
        monkeypatch.setenv("MY_JUDGE_KEY", "hush\n")
        rewards(make(server, key="MY_JUDGE_KEY"))
    assert set(server.keys) == {"Bearer hush"}


def test_answers_are_kept_on_the_disk_by_model_and_prompt(tmp_path):
    kept = {"cache": str(tmp_path / "deep/judge.sqlite")}
    with judge_server(length) as server:
        first = rewards(make(server, **kept), groups=3)
        grades, told = graded([make(server, **kept)], groups=3)
        assert [[grade.reward for grade in group] for group in grades] == first
        assert len(server.asked) == 6
        assert "0 calls, 0 tokens read and 0 written; 6 answers from the cache" in told[-1]
        for other in ({"model": "n"}, {"template": TEMPLATE + "!"}, {"options": {"temperature": 1}}):
            rewards(make(server, **kept, **other), groups=3)
        assert len(server.asked) == 24
    assert rewards(make(server, **kept), groups=3) == first  # the server has gone
    (tmp_path / "other.sqlite").write_text("no data base at all, but a text that is long enough to be looked at" * 20)
    with pytest.raises(TaskError, match=r"cache .*other.sqlite cannot be used"):
        rewards(make(server, cache=str(tmp_path / "other.sqlite")))


def test_siblings_that_say_the_same_share_a_call():
    with judge_server(length, seconds=0.1) as server:
        assert rewards(make(server), texts=("same",) * 6) == [[0.4] * 6]
        assert len(server.asked) == 1


@pytest.mark.parametrize("parallel", [1, 3])
def test_calls_at_the_same_time_are_limited_over_all_groups(parallel):
    with judge_server(length, seconds=0.03) as server:
        rewards(make(server, parallel=parallel), texts=("a", "bb", "ccc"), groups=4)
    assert server.most == parallel
    assert len(server.asked) == 12


def test_calls_of_a_process_are_limited():
    with judge_server(length) as server:
        with pytest.raises(TaskError, match=r"was called 5 times, its limit\. Raise `calls`"):
            rewards(make(server, calls=5), groups=4, workers=1)
        end = time.monotonic() + 5  # the last call may still be on its way
        while len(server.asked) < 5 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(server.asked) == 5


def test_tokens_and_their_price_are_told_at_the_end_and_once():
    with judge_server(length) as server:
        judge = make(server, prices=[1000.0, 2000.0])
        _, told = graded([judge], groups=3)
        assert told == [
            "The judge judge: 6 calls, 60 tokens read and 18 written, 0.096 to pay; 0 answers from the cache; "
            "0 without a number."
        ]
        assert judge.closing_words() is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"pattern": None}, "either pattern or field"),
        ({"field": "score"}, "either pattern or field"),
        ({"pattern": "("}, "no regular expression"),
        ({"template": "Was it right? {prompt}"}, r"no \{completion\}"),
        ({"low": 10}, "low 10 is not below high 10"),
        ({"url": "127.0.0.1:8000"}, "url: "),
        ({"parallel": 0}, "parallel: "),
        ({"modell": "m"}, "modell: "),
        ({"model": None}, "model: "),
    ],
)
def test_a_file_that_describes_no_judge_is_refused_with_what_is_wrong(tmp_path, change, told):
    good = {"url": "http://x/v1", "model": "m", "template": TEMPLATE, "pattern": r"(\d+)", "high": 10}
    file = tmp_path / "quality.yaml"
    file.write_text(yaml.safe_dump(good))
    assert Judge.read(file).settings.high == 10
    file.write_text(yaml.safe_dump({**good, **change}))
    with pytest.raises(TaskError, match=rf"quality.yaml describes no judge.*{told}"):
        Judge.read(file)


FILE = """
def right(completion, answer):
    return completion == answer

both = [right, "judge:quality.yaml"]
alone = "judge:quality.yaml"
"""


def test_a_recipe_and_a_file_of_functions_name_a_judge(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    monkeypatch.chdir(tmp_path)
    with judge_server(length) as server:
        given = {
            "url": server.url,
            "model": "m",
            "template": TEMPLATE,
            "pattern": r"Score: (\d+)",
            "high": 10,
            "cache": None,
        }
        (tmp_path / "quality.yaml").write_text(yaml.safe_dump(given))
        named = load_recipe(None, {"task.name": "judge:quality.yaml", "task.data": "rows.json"})
        assert named.task.name == f"judge:{tmp_path}/quality.yaml"
        knobs = {"data": f"{tmp_path}/rows.json", "weights": {"quality": 0.5}}
        monkeypatch.chdir("/")
        for name, parts in (
            (named.task.name, {"quality": 0.4}),
            (f"{tmp_path}/mine.py:alone", {"quality": 0.4}),
            (f"{tmp_path}/mine.py:both", {"right": 0.0, "quality": 0.4}),
        ):
            task = open_task(Recipe(task=TaskConfig(name=name, **knobs)))
            grade = task.grade(task.prompts("train")[0], "four")
            assert (dict(grade.parts), grade.reward) == (parts, 0.2)
    for name, told in (("judge:none.yaml", "cannot be read"), ("judge:", "names nothing")):
        with pytest.raises(TaskError, match=told):
            open_task(Recipe(task=TaskConfig(name=name, **knobs)))
    with pytest.raises(TaskError, match=r"Give --task\.data"):
        open_task(Recipe(task=TaskConfig(name="judge:quality.yaml")))
