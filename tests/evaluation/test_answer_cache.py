"""An evaluation that is killed resumes where it stopped."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from minigrpo.evaluation.answer_cache import AnswerCache
from minigrpo.evaluation.evaluate import evaluate
from minigrpo.rollouts.engines.scripted import Scripted
from minigrpo.types import Grade, Sampling

ASKED = {"model": "m", "n": 2, "temperature": 1.0}


class RecordingEngine(Scripted):
    """An engine that records its prompts; it stops in the middle of the `limit`-th prompt."""

    def __init__(self, tokenizer, limit=None):
        super().__init__(lambda prompt, sibling: prompt.target if sibling else "no", tokenizer)
        self.asked, self.limit = [], limit

    def generate(self, prompts, n, sampling, ready=None, *, progress=None):
        if self.limit is not None and len(self.asked) >= self.limit:
            raise KeyboardInterrupt
        self.asked += [asked.prompt.id for asked in prompts]
        return super().generate(prompts, n, sampling, ready)


@pytest.fixture
def run_evaluation(echo_task, tokenizer, tmp_path, monkeypatch):
    """Evaluate two prompts at a time, with two samples each."""
    from minigrpo.evaluation import evaluate as verb
    from minigrpo.evaluation.evaluate import grade_prompts

    monkeypatch.setattr(verb, "grade_prompts", lambda *args, **more: grade_prompts(*args, rows=4, **more))

    def run(engine, asked=ASKED, task=echo_task):
        prompts = task.prompts("test")[:10]
        answer_cache = AnswerCache(tmp_path / "journal.jsonl", asked)
        sampling = Sampling(1.0, 20)
        return evaluate(
            engine,
            task,
            name="m",
            prompts=prompts,
            sampling=sampling,
            tokenizer=tokenizer,
            n=2,
            answer_cache=answer_cache,
        )

    return run


def told(evaluation):
    return replace(evaluation, seconds=0.0)


def test_no_question_is_asked_twice_and_the_answers_equal_those_of_an_uninterrupted_evaluation(
    run_evaluation, tokenizer
):
    first, second, whole = RecordingEngine(tokenizer, limit=4), RecordingEngine(tokenizer), RecordingEngine(tokenizer)
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(first)
    resumed = run_evaluation(second)
    assert len(first.asked) == 4
    assert sorted(first.asked + second.asked) == sorted(a["prompt"] for a in resumed.scores.answers[::2])
    assert told(resumed) == told(run_evaluation(whole, asked={"model": "another"}))


def test_cached_answers_of_another_model_or_question_are_ignored(run_evaluation, tokenizer):
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(RecordingEngine(tokenizer, limit=4))
    again = RecordingEngine(tokenizer)
    run_evaluation(again, asked={**ASKED, "model": "retrained"})
    assert len(again.asked) == 10


@pytest.mark.parametrize("damage", [b'{"prompt": "test-0", "compl', b"\xff\xfe\n", b"[1, 2]\n", b'{"prompt": 3}\n'])
def test_a_line_that_a_kill_cut_short_is_asked_again(run_evaluation, tokenizer, tmp_path, damage):
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(RecordingEngine(tokenizer, limit=4))
    with (tmp_path / "journal.jsonl").open("ab") as stream:
        stream.write(damage)
    again = RecordingEngine(tokenizer)
    assert len(run_evaluation(again).scores.answers) == 20
    assert len(again.asked) == 6


def test_completions_that_could_not_be_scored_stay_unscored(run_evaluation, tokenizer, echo_task):
    task = replace(echo_task, grade=lambda p, t: Grade(1.0) if t == "no" else Grade(math.nan, notes={"grader": "slow"}))
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="Left out"):
        run_evaluation(RecordingEngine(tokenizer, limit=4), task=task)
    with pytest.warns(UserWarning, match="Left out"):
        resumed = run_evaluation(RecordingEngine(tokenizer), task=task)
    assert [answer["reward"] for answer in resumed.scores.answers] == [1.0, None] * 10


def test_the_command_killed_in_the_middle_goes_on_and_leaves_no_journal(tiny_folder, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import time\nfrom minigrpo import Grade, Prompt, Task\n"
        "asked = [Prompt(f'p{i}', ({'role': 'user', 'content': f'say {i}'},)) for i in range(40)]\n"
        "def grade(p, t):\n    open('calls', 'a').write(p.id + '\\n'); time.sleep(0.05); return Grade(1.0)\n"
        "mine = Task('mine', lambda split: asked, grade)\n"
    )
    options = ["--task.name", "mine.py:mine", "--rollout.max_tokens", "4", "-n", "4", "--out", "out.json"]
    command = [sys.executable, "-m", "minigrpo.cli.main", "evaluate", str(tiny_folder()), *options]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = None
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        found = [path for path in tmp_path.glob(".out-*.jsonl") if path.read_bytes().count(b"\n") > 8]
        if found:
            journal = found[0]
            break
        time.sleep(0.02)
    assert journal is not None
    os.kill(process.pid, 9)
    process.wait()
    answered = journal.read_bytes().count(b"\n") - 1
    before = (tmp_path / "calls").read_text().count("\n")
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=200)
    calls = (tmp_path / "calls").read_text().count("\n") - before
    assert calls == 4 * (40 - answered)
    assert len(json.loads((tmp_path / "out.json").read_text())["scores"]["answers"]) == 4 * 40
    assert not list(tmp_path.glob(".out-*.jsonl"))
