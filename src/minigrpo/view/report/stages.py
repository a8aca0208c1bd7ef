"""What the stages before and after training proved, as sections of the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from minigrpo.ui.live import duration
from minigrpo.view.library import OpenRun
from minigrpo.view.report.markup import Markup, facts, figure, interval, joined, model_text, percent, table, tag
from minigrpo.view.stages import read_answers, read_stages

PAIRS = 3
"""Answers before and after that are shown of each kind."""


def stage_sections(run: OpenRun) -> Iterator[Markup]:
    """Yield a section for each stage that left something."""
    found = read_stages(run)
    if found["evaluations"]:
        yield _evaluation(run, found)
    if found["parity"]:
        yield _parity(found["parity"])
    if found["check"]:
        yield _check(found["check"])
    if found["preflight"]:
        yield _preflight(found["preflight"])


def section(title: str, *inside: Any, verdict: str = "", good: bool = True) -> Markup:
    badge = tag("span", verdict, class_=f"badge {'right' if good else 'malformed'}") if verdict else None
    return tag("section", tag("h2", title, " ", badge), *inside, class_="stage")


def _damaged(found: Mapping[str, Any]) -> Markup | None:
    return tag("p", found["damaged"], class_="note bad") if "damaged" in found else None


def _evaluation(run: OpenRun, found: Mapping[str, Any]) -> Markup:
    rows = [[_name_of(each), *_scores(each["scores"])] for each in found["evaluations"]]
    head = ["Of", "Prompts", "Right", "Well-formed", "Cut off", "Reward", "Tokens"]
    changes = [
        tag(
            "p", f"{name}: {_change(each['change'])} ", interval(each["change"]["low"], each["change"]["high"], _points)
        )
        for name, each in _mapping(found["comparison"].get("comparisons")).items()
        if isinstance(each, dict) and isinstance(each.get("change"), dict)
    ]
    return section(
        "Evaluation", table(head, rows, caption="Unseen prompts"), *changes, _flips(run, found["evaluations"])
    )


def _change(change: Mapping[str, Any]) -> str:
    won = f"{change['gained']} prompts gained, {change['lost']} lost"
    return f"{won}; by luck alone: p = {figure(change['p'])}; {_points(change['difference'])} points"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _name_of(each: Mapping[str, Any]) -> str:
    heat = _mapping(each.get("sampling")).get("temperature")
    how = f"temperature {heat:g}" if heat else "greedy"
    return f"{each.get('name') or each['file']}, {each.get('task')} {each.get('split')}, {how}"


def _scores(scores: Mapping[str, Any]) -> list[Any]:
    rates = [_rate(scores.get(name)) for name in ("accuracy", "formed", "truncated")]
    count = _mapping(scores.get("accuracy")).get("count")
    return [figure(count), *rates, figure(scores.get("mean_reward")), figure(scores.get("mean_tokens"))]


def _rate(found: Any) -> Markup | str:
    if not isinstance(found, dict) or not found.get("count"):
        return "–"
    return joined(
        percent(found["value"]), " ", interval(found["low"], found["high"], lambda share: f"{100 * share:.1f}")
    )


def _flips(run: OpenRun, evaluations: list[dict[str, Any]]) -> Markup | None:
    """Show answers that training turned, from wrong to right and from right to wrong."""
    files = [each["file"] for each in evaluations]
    tuned = sorted(
        (each for each in evaluations if each.get("name") == "tuned"),
        key=lambda each: _mapping(each.get("sampling")).get("temperature") or 0,
    )
    pairs = [(each["file"], f"base{each['file'].removeprefix('tuned')}") for each in tuned]
    file, beside = next(((own, other) for own, other in pairs if other in files), ("", ""))
    parts = []
    for kind, words in (("gained", "Wrong before, right after"), ("lost", "Right before, wrong after")):
        answers = read_answers(run, file, beside, kind, 0)
        if answers["rows"]:
            shown = [_pair(row["before"], row["answer"]) for row in answers["rows"][:PAIRS]]
            parts.append(joined(tag("h3", f"{words}: {answers['found']} of {answers['of']} prompts"), *shown))
    return joined(*parts)


def _pair(before: Mapping[str, Any], after: Mapping[str, Any]) -> Markup:
    question = _mapping((after.get("messages") or [{}])[-1]).get("content", after.get("prompt"))
    return tag(
        "div",
        model_text(question),
        tag("div", answer_box("before", before), answer_box("after", after), class_="pairs"),
        class_="example",
    )


def answer_box(title: str, answer: Mapping[str, Any]) -> Markup:
    """Show an answer with what became of it, and what each reward function gave."""
    kind = "right" if answer.get("solved") else "malformed" if answer.get("formed") is False else "wrong"
    parts = [
        tag("span", f"{name} {figure(part)}", class_="part") for name, part in _mapping(answer.get("parts")).items()
    ]
    if isinstance(answer.get("advantage"), int | float):
        parts.append(tag("span", f"advantage {figure(answer['advantage'])}"))
    if answer.get("finish") == "length":
        parts.append(tag("span", "cut off", class_="badge cut"))
    reward = tag("b", f"reward {figure(answer.get('reward'))}")
    head = tag(
        "div",
        tag("span", title, class_="soft"),
        tag("span", kind, class_=f"badge {kind}"),
        reward,
        *parts,
        class_="facts",
    )
    return tag("div", head, model_text(f"{answer.get('opening', '')}{answer.get('text', '')}"))


def _parity(found: Mapping[str, Any]) -> Markup:
    listed = [row for row in found.get("stages") or [] if isinstance(row, dict)]
    good = all(row.get("ok") is not False for row in listed)
    rows = [
        [
            row.get("name"),
            *(figure(row.get(name)) for name in ("mean_kl", "relative_kl", "max_kl")),
            percent(row.get("top1")),
            _verdict(row),
        ]
        for row in listed
    ]
    head = ["Stage", "KL, nats a token", "Of what training did", "Worst token", "Same likeliest token", "Verdict"]
    about = tag("p", "Distance from the policy that was trained, on the same texts.", class_="about")
    verdict = "" if "damaged" in found else "proved" if good else "not proved"
    return section("Parity", _damaged(found), about, table(head, rows, caption="Parity"), verdict=verdict, good=good)


def _verdict(row: Mapping[str, Any]) -> str:
    if row.get("limit") is None and row.get("ceiling") is None:
        return "what training did"
    return "proved" if row.get("ok") else "too far"


def _check(found: Mapping[str, Any]) -> Markup:
    effect = _mapping(found.get("effect"))
    kl, tokens = figure(effect.get("mean_kl")), figure(effect.get("tokens"))
    moved = f"It moves the base by {kl} nats a token, over {tokens} tokens."
    faults = [tag("p", str(fault), class_="note bad") for fault in found.get("faults") or []]
    good = bool(found.get("ok"))
    verdict = "" if "damaged" in found else "sound" if good else "faulty"
    return section("Adapter", _damaged(found), *faults, tag("p", moved) if effect else None, verdict=verdict, good=good)


def _preflight(found: Mapping[str, Any]) -> Markup:
    figures = _mapping(found.get("figures"))
    notes = [tag("p", text, class_="note") for text in [*(found.get("reasons") or []), *(found.get("warnings") or [])]]
    seconds = figures.get("training_seconds")
    told = facts(
        [
            ("groups sampled", figure(figures.get("groups"))),
            ("well-formed", percent(figures.get("formed"))),
            ("right", percent(figures.get("solved"))),
            ("groups that would teach", percent(figures.get("informative"))),
            ("cut off", percent(figures.get("truncated"))),
            ("mean reward", figure(figures.get("reward_mean"))),
            ("training would take", duration(seconds) if isinstance(seconds, int | float) else None),
        ]
    )
    good = bool(found.get("go"))
    verdict = "" if "damaged" in found else "go" if good else "no go"
    return section("Preflight", _damaged(found), *notes, told, verdict=verdict, good=good)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
