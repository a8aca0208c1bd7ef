"""The report of a run as one file: curves, why the reward moved, answers before and after, proofs, recipe, alarms."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from minigrpo.config.fields import field_table
from minigrpo.config.portable import portable_knobs
from minigrpo.errors import ArtifactError, command_line
from minigrpo.runs.rundir import RunDir, enclosing_run, write_whole
from minigrpo.utils.paths import user_path
from minigrpo.versions import this_version
from minigrpo.view.library import OpenRun
from minigrpo.view.report.curves import chart_figure
from minigrpo.view.report.examples import moved_examples
from minigrpo.view.report.markup import Markup, facts, figure, joined, percent, signed, table, tag
from minigrpo.view.report.splits import split_section
from minigrpo.view.report.stages import section, stage_sections
from minigrpo.view.why import explain

STYLE = Path(__file__).parents[1] / "page" / "style.css"
"""The style sheet of the page: the report has its colours and its shapes."""
OWN_STYLE = """
main > section { margin-top: 16px } main > h2 { margin-top: 32px }
figure svg { width: 100%; height: auto; display: block }
svg text { fill: var(--soft); font-size: 12px } .grid { stroke: var(--rule) } .key i { border: 0 }
.example { border-top: 1px solid var(--rule); padding: 10px 0 } .example h4 { margin: 0 0 6px }
.scroll { margin-bottom: 10px }
"""
OFFLINE = "default-src 'none'; style-src 'unsafe-inline'"
"""What a browser may load for the file: nothing but the styles in it."""
MARK = "minigrpo report"
"""Name of the program in a report's head, by which an older one is known that may be replaced."""
MOST_MARKS = 40


def write_report(run: RunDir, out: Path | None = None, *, force: bool = False) -> Path:
    """Write the report of a run, to RUN/report.html where no place is named, and return its path.

    Raise ArtifactError where the folder holds no run, and for a file that is no report, unless `force`.
    """
    path = user_path(out) if out else run.report
    require_own(path, force=force)
    opened = OpenRun(run.path.absolute().name, run.path)
    if not len(opened.metrics.refresh()):
        raise ArtifactError(
            f"{run.path} holds no finished step, so there is nothing to report. Name a run's folder, or train first: "
            f"{command_line('minigrpo', 'train', 'quickstart')}"
        )
    write_whole(path, report_page(opened))
    return path


def require_own(path: Path, *, force: bool = False) -> None:
    """Raise ArtifactError where a report may not be written: in place of another file, or among a run's artefacts."""
    found = enclosing_run(path)
    if found and user_path(path).resolve().parent != found.path.resolve():
        raise ArtifactError(
            f"{path} lies among the files of the run {found.path}, whose hashes another file would break. Name another "
            f"place: {command_line('--out', found.report)}"
        )
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder. Name a file: {command_line('--out', path / 'report.html')}")
    if force or not os.path.lexists(path):
        return
    with path.open("rb") as stream:
        head = stream.read(1000)
    if f'content="{MARK}'.encode() not in head:
        raise ArtifactError(f"{path} is no report of minigrpo, so it is not replaced. Name another, or add --force.")


def report_page(run: OpenRun) -> str:
    """Return the whole file."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{OFFLINE}">'),
        tag("meta", name="generator", content=f"{MARK} {this_version()}"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{run.name} · minigrpo report"),
        tag("style", Markup(STYLE.read_text(encoding="utf-8") + OWN_STYLE)),
    )
    return f'<!doctype html>\n<html lang="en">{head}<body>{tag("main", *_sections(run))}</body></html>\n'


def _sections(run: OpenRun) -> Iterator[Markup]:
    marks = run.marks()
    before, after = windows_of(run.metrics.steps)
    found = explain(run.groups.refresh(), before, after)
    yield joined(tag("h1", run.name), _about(run))
    if found["change"]:
        yield _headline(found)
    yield joined(tag("h2", "What moved"), _charts(run, marks))
    if found["change"]:
        yield joined(tag("h2", "Why the reward moved"), split_section(found), *moved_examples(run, found))
    yield tag("h2", "What the stages found")
    yield from stage_sections(run)
    yield _marks(marks)
    yield _recipe(run)
    yield _versions(run)


def windows_of(steps: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the first and the last tenth of the steps, one step at least."""
    tenth = max(1, len(steps) // 10)
    return (steps[0], steps[tenth - 1]), (steps[-tenth], steps[-1])


def _about(run: OpenRun) -> Markup:
    knobs = portable_knobs(run.knobs())
    done, planned = run.metrics.steps[-1], knobs.get("train.steps")
    states = {"running": "still running", "killed": "its process was killed"}
    unfinished = None if planned == done else "stopped before its last step"
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    return facts(
        [
            ("model", knobs.get("model.path")),
            ("task", knobs.get("task.name")),
            ("steps", f"{done} of {planned}" if planned else f"{done}"),
            ("state", states.get(run.state(), unfinished)),
            ("written", f"{now}, minigrpo {this_version()}"),
        ]
    )


def _headline(found: Mapping[str, Any]) -> Markup:
    change, (a, b) = found["change"], found["windows"]
    total, half = change["total"]["value"], change["total"]["half"]
    spread = (
        None if half is None else tag("span", f" [{signed(total - half)}, {signed(total + half)}]", class_="interval")
    )
    words = (
        f"From steps {a['first']}–{a['last']} to steps {b['first']}–{b['last']} the mean reward went from "
        f"{figure(change['before'])} to {figure(change['after'])}: "
    )
    moved = tag("b", signed(total), class_="down" if total < 0 else "up")
    pairs = (("right", percent), ("formed", percent), ("cut", percent), ("tokens", figure))
    right, formed, cut, tokens = (f"{show(a[name])} → {show(b[name])}" for name, show in pairs)
    soft = f"Right {right}; well-formed {formed}; cut off {cut}; length {tokens} tokens. {_counted(a, b)}"
    headline = tag("p", words, moved, spread, class_="headline")
    return tag("section", headline, tag("p", soft, class_="soft"), class_="verdict", aria_label="The change")


def _counted(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    told = f"{a['completions']} and {b['completions']} completions of {a['groups']} and {b['groups']} groups."
    if a["of"] > a["groups"] or b["of"] > b["groups"]:
        told += f" These were drawn at random from {a['of']} and {b['of']} groups."
    unscored = a["unscored"] + b["unscored"]
    return told + (f" {unscored} completions could not be scored and are left out." if unscored else "")


def _charts(run: OpenRun, marks: Sequence[Mapping[str, Any]]) -> Markup:
    log = run.metrics
    window = max(5, len(log) // 50)
    figures = run.read(run.run.preflight).get("figures")
    planned = figures.get("planned_memory_gb") if isinstance(figures, dict) else None
    drawn = [chart_figure(log, chart, marks, window, planned) for chart in log.charts()]
    about = f"Lines are means of {window} steps, with the steps themselves faint behind them. Around the reward: one "
    about += "standard deviation among siblings. Upright lines are alarms and resumes."
    return joined(tag("p", about, class_="soft"), tag("div", *drawn, class_="charts"))


def _marks(marks: Sequence[Mapping[str, Any]]) -> Markup:
    told = [mark for mark in marks if mark["kind"] != "began"]
    rows = [tag("li", f"step {mark['step']}: {mark['text']}", class_=mark["kind"]) for mark in told[:MOST_MARKS]]
    more = tag("p", f"and {len(told) - MOST_MARKS} more", class_="soft") if len(told) > MOST_MARKS else None
    inside = tag("ol", *rows) if rows else tag("p", "None.")
    return section("Alarms, kills and resumes", tag("div", inside, more, class_="marks"))


def _recipe(run: OpenRun) -> Markup:
    knobs = portable_knobs(run.knobs())
    known = {knob.name: knob for knob in field_table()}
    rows = [[tag("code", name), _value(value)] for name, value in knobs.items()]
    own = [row for row, name in zip(rows, knobs, strict=True) if name in known and knobs[name] != known[name].default]
    whole = tag(
        "details", tag("summary", f"All {len(rows)} knobs"), table(["Knob", "Value"], rows, caption="All knobs")
    )
    return section("Recipe", table(["Knob", "Value"], own, caption="Other than the default"), whole)


def _value(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _versions(run: OpenRun) -> Markup:
    machine = run.read(run.run.machine)
    began = run.read(run.run.made).get("minigrpo")
    left_out = ("seal", "format", "minigrpo")
    pairs = [("minigrpo", began), *((name, _value(each)) for name, each in machine.items() if name not in left_out)]
    return section("Versions and machine", facts(pairs))
