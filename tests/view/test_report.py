"""The report of a run is one file that tells all of it, holds every answer as text, and replaces nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minigrpo.errors import ArtifactError
from minigrpo.runs.rundir import RunDir
from minigrpo.view.charts import CHARTS, known_sentences, sentence_of
from minigrpo.view.library import OpenRun
from minigrpo.view.report.markup import LONGEST_TEXT, model_text, signed, tag
from minigrpo.view.report.page import windows_of, write_report
from minigrpo.view.why import SPLITS, explain
from tests.helpers.logged_runs import HOSTILE, append, completion, figures, group, hostile_run, logged_run

ALLOWED = {"html", "head", "meta", "title", "style", "body", "main", "section", "h1", "h2", "h3", "h4", "p", "b", "i"}
ALLOWED |= {"div", "span", "small", "code", "dl", "dt", "dd", "ol", "li", "figure", "figcaption", "details", "summary"}
ALLOWED |= {"table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td"}
ALLOWED |= {"svg", "line", "text", "rect", "polyline", "polygon", "circle", "g"}


class Parts(HTMLParser):
    """The tags, the addresses and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str | None] = []
        self.handlers: list[str] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(name)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "xlink:href", "action", "data")]
        self.handlers += [key for key, _ in attrs if key.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.words += data


def report_of(folder: Path) -> Parts:
    return Parts(write_report(RunDir(folder)).read_text(encoding="utf-8"))


def evaluated(folder: Path) -> None:
    """Leave evaluations of both sides, of which one answer was gained and one lost, and a parity table."""
    (folder / "evals").mkdir()
    rate = {"value": 0.5, "low": 0.2, "high": 0.8, "count": 2}
    for name, right in (("base", (False, True)), ("tuned", (True, False))):
        answers = [completion(f"{name} says {at}", float(won), prompt=f"p{at}") for at, won in enumerate(right)]
        scores = {"accuracy": rate, "formed": rate, "truncated": rate, "mean_reward": 0.5, "answers": answers}
        content = {"name": name, "task": "t", "split": "test", "sampling": {"temperature": 0.0}, "scores": scores}
        (folder / f"evals/{name}-t-test.json").write_text(json.dumps(content))
    row = {
        "name": "merged",
        "mean_kl": 2e-14,
        "relative_kl": 6e-14,
        "max_kl": 1e-12,
        "top1": 1.0,
        "limit": 1e-6,
        "ok": True,
    }
    (folder / "parity.json").write_text(json.dumps({"stages": [row]}))


def test_a_report_tells_the_run_in_one_file(tmp_path: Path) -> None:
    run = logged_run(tmp_path / "first")
    evaluated(run)
    parts = report_of(run)
    assert parts.tags <= ALLOWED
    assert not parts.addresses
    for title in ("Reward", "Each reward function", "Right and well-formed", "Length, tokens", "Entropy, nats"):
        assert title in parts.words
    for title, about in SPLITS.values():
        assert title in parts.words
        assert about in parts.words
    assert sentence_of("entropy") in parts.words
    assert "base says 0" in parts.words  # gained
    assert "tuned says 1" in parts.words  # lost
    assert "50.0 % [20.0, 80.0]" in parts.words
    assert "2.00e−14" in parts.words
    assert "rollout.completions4" in parts.words
    assert "Alarms, kills and resumes" in parts.words


def test_the_change_is_that_of_the_first_tenth_and_the_last(tmp_path: Path) -> None:
    run = logged_run(tmp_path / "first")
    assert windows_of(range(1, 21)) == ((1, 2), (19, 20))
    assert windows_of([7]) == ((7, 7), (7, 7))
    change = explain(OpenRun("first", run).groups.refresh(), (1, 2), (19, 20))["change"]
    words = report_of(run).words
    assert (
        f"mean reward went from {change['before']:.3g} to {change['after']:.3g}: {signed(change['total']['value'])}"
        in words
    )
    for split in change["splits"]:
        for term in (term for term in split["terms"] if abs(term["value"]) > 1e-3):
            assert f"{signed(term['value'])}" in words


def test_without_a_common_prompt_a_group_of_each_window_is_shown(tmp_path: Path) -> None:
    run = tmp_path / "first"
    run.mkdir()
    for step in (1, 2):
        pair = [completion(f"good {step}", 1.0), completion(f"bad {step}", 0.0)]
        append(run / "groups.jsonl", [{**group(step, f"p{step}", pair), "target": None}])
        append(run / "metrics.jsonl", [figures(step, 0.5)])
    words = report_of(run).words
    assert "No prompt was drawn in both windows" in words
    for step, window in ((1, "A"), (2, "B")):
        assert f"One group of {window}, steps {step} to {step}: p{step}" in words
        assert f"good {step}" in words
        assert f"bad {step}" in words


def test_hostile_answers_are_text_in_the_report(tmp_path: Path) -> None:
    parts = report_of(hostile_run(tmp_path / "third"))
    assert parts.tags <= ALLOWED
    assert not parts.addresses
    assert not parts.handlers


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_can_only_be_text(text: str) -> None:
    page = str(tag("div", text, model_text(text), title=text))
    parts = Parts(page)
    assert parts.tags <= {"div", "span", "i"}
    assert not parts.handlers
    page.encode("utf-8")
    assert not re.search("[\x00-\x08\u202a-\u202e\ud800-\udfff]", page)
    plain = re.sub("[\x00-\x1f\u202a-\u202e\ud800-\udfff]", "", text)[:100]
    assert plain[:20] in parts.words.replace("\t", "") or "U+" in parts.words


def test_of_an_endless_answer_the_beginning_is_shown() -> None:
    shown = model_text("w" * 1_000_000)
    assert len(shown) < LONGEST_TEXT + 300
    assert "996,000 more characters" in shown


def test_an_older_report_is_replaced_and_no_other_file(tmp_path: Path) -> None:
    run = RunDir(logged_run(tmp_path / "first", steps=4))
    assert write_report(run) == run.report
    assert write_report(run) == run.report
    mine = tmp_path / "mine.html"
    mine.write_text("<p>my own page</p>")
    with pytest.raises(ArtifactError, match="is no report of minigrpo"):
        write_report(run, mine)
    assert mine.read_text() == "<p>my own page</p>"
    write_report(run, mine, force=True)
    assert "my own page" not in mine.read_text()
    (run.path / "adapter").mkdir()
    (run.path / "made.json").write_text("{}")
    for place in (run.path / "adapter/report.html", run.path / "adapter"):
        with pytest.raises(ArtifactError, match=r"lies among the files of the run|is a folder"):
            write_report(run, place)


def test_a_folder_without_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no finished step"):
        write_report(RunDir(tmp_path), tmp_path / "report.html")
    assert not any(tmp_path.iterdir())


def test_a_report_names_no_folder_of_this_machine_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted_in_the_environment")
    knobs = f"model: {{path: {tmp_path}/hidden/model}}\ntask: {{system: 'say hf_planted_in_the_environment'}}\n"
    knobs += "rollout: {engine: vllm, server: 'http://me:pass@host:8000'}\n"
    page = write_report(RunDir(logged_run(tmp_path / "first", steps=4, knobs=knobs))).read_text()
    for secret in (str(tmp_path), "hf_planted", "me:pass"):
        assert secret not in page
    assert "http://host:8000" in page


def test_every_chart_has_its_sentence() -> None:
    assert {chart.about for chart in CHARTS} <= known_sentences().keys()
    assert len({chart.id for chart in CHARTS}) == len(CHARTS)
