"""What the page may ask, each question a function of the library and the query: JSON in, nothing written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Any

from minigrpo.errors import ArtifactError
from minigrpo.view.group_index import CHEATS, CUT, RIGHT, Facts
from minigrpo.view.library import Library, OpenRun, describe
from minigrpo.view.metrics_log import finite
from minigrpo.view.search import Wanted, search_completions
from minigrpo.view.stages import read_answers, read_stages
from minigrpo.view.why import explain

Query = Mapping[str, str]

POLL = 1.0
"""Seconds between looks at the files of one run, or of all, while a page waits for news of them."""
LONGEST_WAIT = 50.0
"""Seconds after which a page that waits is answered that nothing happened."""
SEARCH_SECONDS = 0.4
"""Seconds after which a search answers with what it has found, and where it goes on."""
MOST_ROWS = 200
"""Rows of a list that are sent at a time."""


class QueryError(Exception):
    """A question that cannot be answered because it is not well put."""


def runs(library: Library, query: Query) -> Any:
    return {
        "folder": str(library.folder),
        "first": library.first,
        "runs": [describe(run) for run in library.runs()],
        "news": news_of(library.signature()),
    }


def run(library: Library, query: Query) -> Any:
    """Describe one run, with its recipe, and what changes when it does."""
    found = _run(library, query)
    return {**describe(found), "knobs": found.knobs(), "news": news_of(found.signature())}


def metrics(library: Library, query: Query) -> Any:
    """Return the figures from row `since` on; all of them where the log was begun anew (another `generation`).

    `charts`: those of all rows.
    """
    found = _run(library, query)
    log = found.metrics.refresh()
    since = _number(query, "since", 0) if query.get("generation") == str(log.generation) else 0
    planned = found.read(found.run.preflight).get("figures")
    plan = planned.get("planned_memory_gb") if isinstance(planned, dict) else None
    charts = [chart.to_dict() for chart in log.charts()]
    return {
        "generation": log.generation,
        "since": since,
        "planned_memory_gb": plan,
        "charts": charts,
        **log.since(since),
    }


def marks(library: Library, query: Query) -> Any:
    return {"marks": _run(library, query).marks()}


def why(library: Library, query: Query) -> Any:
    """Split the change between the windows `before` and `after`, each FIRST-LAST."""
    found = _run(library, query)
    return explain(found.groups.refresh(), _window(query, "before"), _window(query, "after"), query.get("by"))


def step(library: Library, query: Query) -> Any:
    """Return the facts of a step's groups, without their texts; of the nearest step where there is no such one."""
    index = _run(library, query).groups.refresh()
    steps = index.steps
    asked = _number(query, "step", steps[-1] if steps else 0)
    nearest = min(steps, key=lambda each: abs(each - asked), default=0)
    groups = [_brief(line, facts) for line, facts in index.all_facts(index.lines_of_step(nearest))]
    ends = {"first": steps[0] if steps else 0, "last": steps[-1] if steps else 0}
    return {"step": nearest, "asked": asked, **ends, "groups": groups}


def _brief(line: int, facts: Facts) -> dict[str, Any]:
    known = [reward for reward in facts.rewards if not isnan(reward)]
    return {
        "line": line,
        "prompt": facts.prompt,
        "step": facts.step,
        "rewards": [finite(reward) for reward in facts.rewards],
        "advantages": [finite(value) for value in facts.advantages],
        "right": [bool(flag & RIGHT) for flag in facts.flags],
        "cut": [bool(flag & CUT) for flag in facts.flags],
        "cheats": [bool(flag & CHEATS) for flag in facts.flags],
        "tied": not known or max(known) - min(known) <= 1e-6,
        "reward": fmean(known) if known else None,
        "tokens": fmean(facts.tokens) if facts.tokens else None,
    }


def group(library: Library, query: Query) -> Any:
    """Return one group with its texts: the `line` of groups.jsonl."""
    line = _number(query, "line", -1)
    index = _run(library, query).groups.refresh()
    found = index.group(line)
    if found is None:
        raise QueryError("This group is damaged, or no longer there.")
    return {"line": line, **found}


def inspection(library: Library, query: Query) -> tuple[tuple[str, int, int], Path]:
    """Return how `minigrpo inspect` knows the group at `line`: run, step and number; and the run's folder."""
    found = _run(library, query)
    line, index = _number(query, "line", -1), found.groups.refresh()
    if not 0 <= line < len(index):
        raise QueryError("There is no such group.")
    step = index.step_of(line)
    return (found.name, step, list(index.lines_of_step(step)).index(line) + 1), found.run.path


def find(library: Library, query: Query) -> Any:
    """Search completions from line `from` on, for a short time; `next` says where to go on, null at the end."""
    index = _run(library, query).groups.refresh()
    wanted = Wanted(query.get("text", ""), frozenset(filter(None, query.get("only", "").split(","))))
    hits, following = search_completions(
        index, wanted, _number(query, "from", 0), seconds=SEARCH_SECONDS, most=MOST_ROWS
    )
    return {"hits": hits, "next": following, "of": len(index)}


def prompts(library: Library, query: Query) -> Any:
    """List prompts, those that were drawn most often first; `text` must be in the name."""
    index = _run(library, query).groups.refresh()
    text = query.get("text", "").lower()
    named = [name for name in index.prompts if text in name.lower()]
    counted = sorted(((len(index.lines_of_prompt(name)), name) for name in named), key=lambda pair: -pair[0])
    listed = [{"prompt": name, "drawn": count} for count, name in counted[:MOST_ROWS]]
    return {"prompts": listed, "found": len(named), "of": len(index.prompts)}


def prompt(library: Library, query: Query) -> Any:
    """Return a prompt through time: each group that it ever got, oldest first, and whether it rests."""
    found = _run(library, query)
    index = found.groups.refresh()
    name = query.get("prompt", "")
    times = [_brief(line, facts) for line, facts in index.all_facts(index.lines_of_prompt(name))]
    knobs = found.knobs()
    rest = knobs.get("groups.rest")
    share = fmean(times[-1]["right"]) if times and times[-1]["right"] else 0.0
    rests = isinstance(rest, int | float) and bool(times) and share >= rest
    return {
        "prompt": name,
        "times": times,
        "rest": rest,
        "rest_epochs": knobs.get("groups.rest_epochs"),
        "rests": rests,
    }


def stage_results(library: Library, query: Query) -> Any:
    return read_stages(_run(library, query))


def evaluation(library: Library, query: Query) -> Any:
    """Return answers of an evaluation: `file`, beside those of `beside`; `only` flips, right or wrong ones."""
    start = max(0, _number(query, "from", 0))
    run = _run(library, query)
    return read_answers(run, query.get("file", ""), query.get("beside", ""), query.get("only", ""), start)


def wait(library: Library, query: Query) -> Any:
    """Answer when the files of a run (or of any run, without a name) are no longer what `news` says."""
    one = library.run(query["run"]) if query.get("run") else None
    end = time.monotonic() + LONGEST_WAIT
    while True:
        now = news_of((one or library).signature())
        if now != query.get("news") or time.monotonic() >= end:
            return {"news": now}
        time.sleep(POLL)


def news_of(signature: tuple[object, ...]) -> str:
    return f"{hash(signature) & (2**64 - 1):016x}"


QUESTIONS: dict[str, Callable[[Library, Query], Any]] = {
    "runs": runs,
    "run": run,
    "metrics": metrics,
    "marks": marks,
    "why": why,
    "step": step,
    "group": group,
    "find": find,
    "prompts": prompts,
    "prompt": prompt,
    "stages": stage_results,
    "evaluation": evaluation,
    "wait": wait,
}


def _run(library: Library, query: Query) -> OpenRun:
    try:
        return library.run(query.get("run", ""))
    except ArtifactError as fault:
        raise QueryError(str(fault)) from None


def _number(query: Query, name: str, missing: int) -> int:
    text = query.get(name, "")
    if not text:
        return missing
    if not text.removeprefix("-").isdecimal() or len(text) > 12:
        raise QueryError(f"{name} must be a whole number.")
    return int(text)


def _window(query: Query, name: str) -> tuple[int, int]:
    first, dash, last = query.get(name, "").partition("-")
    if not (dash and first.isdecimal() and last.isdecimal() and len(first) <= 9 and len(last) <= 9):
        raise QueryError(f"{name} must be two steps: 1-20.")
    return int(first), int(last)
