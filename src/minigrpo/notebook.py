"""The stages of a run for a notebook: the code that the command line runs, with a plot that redraws itself.

    from minigrpo.notebook import evaluate, plot, preflight, recipe, train
    mine = recipe("gsm8k-fast", {"train.steps": 50})
    preflight(mine, "runs/mine")
    train(mine, "runs/mine")  # run the cell again after a stop or a crash: it goes on from there
    evaluate("runs/mine")

A user's mistake shows as one sentence, without a traceback. Each stage frees its model when it ends: a notebook's
process lives on, and the next stage needs the memory.
"""

from __future__ import annotations

import gc
import io
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from minigrpo.config import load
from minigrpo.config.schema import Recipe
from minigrpo.errors import ArtifactError, MinigrpoError, install_hint, more_at
from minigrpo.runs.logger import read_groups, read_metrics
from minigrpo.runs.rundir import RunDir, read_json
from minigrpo.utils.memory import empty_cache
from minigrpo.utils.paths import user_path
from minigrpo.view.charts import CHARTS, Chart, sentence_of

if TYPE_CHECKING:
    from minigrpo.training.preflight import PreflightResult

__all__ = ["evaluate", "plot", "preflight", "recipe", "report", "show", "train"]

Place = str | Path | RunDir
P = ParamSpec("P")
R = TypeVar("R")

PANELS = ("reward", "right", "informative", "length", "entropy", "gradient")
"""The charts of the plot, by their id in view/charts.py, where titles, figures and sentences stand."""

WINDOW = 10  # steps that a bold line averages: one step of a few prompts says little
STOPPED = "Stopped. The same cell goes on from here."
REDRAW = 2.0  # seconds between looks at metrics.jsonl


def notebook_stage(stage: Callable[P, R]) -> Callable[P, R]:
    """Wrap a stage so that its refusals show as sentences, and that it keeps no memory when it is over.

    IPython prints what `_render_traceback_` returns. The frames of a refusal would keep the model alive for as long as
    IPython remembers the error, so they are dropped; a fault of ours keeps all of its traceback.
    """

    @wraps(stage)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return stage(*args, **kwargs)
        except (MinigrpoError, KeyboardInterrupt) as fault:
            words = f"error: {fault}\n{more_at(fault.entry)}" if isinstance(fault, MinigrpoError) else STOPPED
            vars(fault)["_render_traceback_"] = lambda: [words]
            fault.__context__ = None
            raise fault.with_traceback(None) from None
        finally:
            free_memory()

    return wrapped


def free_memory() -> None:
    """Free what is no longer referenced, on a GPU too, where torch keeps freed memory for its next tensor."""
    gc.collect()
    empty_cache()


@notebook_stage
def recipe(name_or_path: str, knobs: Mapping[str, Any] | None = None) -> Recipe:
    """Load a recipe by name, file or run folder, and change knobs: {"train.steps": 50, "lora.rank": 16}."""
    return load.load_recipe(name_or_path, knobs or {})


@notebook_stage
def preflight(recipe: Recipe, run: Place) -> PreflightResult:
    """Try the recipe: print what it would teach, and the time and memory it would take here."""
    from minigrpo.pipeline import stages

    return stages.preflight(recipe, run_dir(run))


@notebook_stage
def train(recipe: Recipe, run: Place, *, live: bool = True, despite_preflight: bool = False) -> None:
    """Train, or resume a run; `live` draws every step. Interrupting the cell finishes the step and saves.

    Raise MinigrpoError where preflight has found that this would teach nothing, unless `despite_preflight`.
    """
    from minigrpo.pipeline import stages

    folder = run_dir(run)
    if not despite_preflight:
        refuse_failed_preflight(recipe, folder)
    watching: AbstractContextManager[None] = watch(folder, recipe.train.last_step) if live else nullcontext()
    with watching:
        stages.train(recipe, folder, resume=True)


@notebook_stage
def evaluate(run: Place, *, limit: int | None = None, against_base: bool = True) -> dict[str, Any]:
    """Evaluate what a run trained on `limit` unseen prompts, greedily, beside the model that it began with.

    Return the figures: `before`, `after` and `change`, or `model` without a base; `file` has every answer.
    """
    from minigrpo.pipeline import stages

    folder = run_dir(run)
    if not folder.exists():
        raise ArtifactError(f"{folder.path} holds no run. Train first: train(recipe, {str(folder.path)!r})")
    own = load.load_recipe(str(folder.path))
    return stages.evaluate(str(folder.path), own, base=own.model.path if against_base else None, limit=limit)


@notebook_stage
def plot(run: Place) -> Any:
    """Return the curves of a run as an image, while it trains or afterwards."""
    require_extra()
    from IPython.display import Image

    folder = run_dir(run)
    if not (rows := read_steps(folder)):
        raise ArtifactError(f"{folder.path} has no step to draw. Train first: train(recipe, {str(folder.path)!r})")
    return Image(data=draw_png(rows, str(folder.path)), format="png")


@notebook_stage
def report(run: Place, *, height: int = 800) -> Any:
    """Show a run in the cell as `minigrpo report` tells it, with every chart; nothing is written."""
    from IPython.display import HTML

    from minigrpo.view.library import OpenRun
    from minigrpo.view.report.page import report_page

    folder = run_dir(run)
    if not read_steps(folder):
        raise ArtifactError(f"{folder.path} has no step to tell. Train first: train(recipe, {str(folder.path)!r})")
    page = escape(report_page(OpenRun(folder.path.absolute().name, folder.path)))
    # A page of its own, so that its styles and the notebook's leave one another alone; it may run no script.
    frame = f'<iframe sandbox srcdoc="{page}" style="width: 100%; height: {height}px; border: 0"></iframe>'
    return HTML(f"<div>{frame}</div>")


@notebook_stage
def show(run: Place, *, solved: bool | None = None, note: str | None = None, count: int = 3) -> None:
    """Print the newest different answers of the training: right or wrong ones, or those that have a note of this name.

    Each comes with its step, what it earned by part, and its notes.
    """
    folder = run_dir(run)
    if not folder.groups.exists():
        raise ArtifactError(f"{folder.path} has no answers. Train first: train(recipe, {str(folder.path)!r})")
    texts: set[str] = set()
    logged = read_groups(folder, newest_first=True)
    for step, answer in ((group["step"], answer) for group in logged for answer in reversed(group["completions"])):
        fits = solved in (None, answer["solved"]) and (note is None or note in answer.get("notes", {}))
        if fits and len(texts) < count and answer["text"] not in texts:
            texts.add(answer["text"])
            parts = "".join(f", {name} {value:g}" for name, value in answer["parts"].items())
            earned = "no reward could be told" if answer["reward"] is None else f"reward {answer['reward']:g}"
            print(f"--- step {step}: {earned}{parts}")
            for name, words in answer.get("notes", {}).items():
                print(f"    {name}: {words}")
            print(answer["text"], end="\n\n")
    if not texts:
        print("There is none among the answers of this training.")


def run_dir(run: Place) -> RunDir:
    return run if isinstance(run, RunDir) else RunDir(user_path(run))


def refuse_failed_preflight(recipe: Recipe, run: RunDir) -> None:
    """Raise MinigrpoError where preflight has failed for this recipe, unless a warm-up that mends it comes first."""
    from minigrpo.pipeline.prepare import verdict_stamp
    from minigrpo.runs.manifest import fits

    if not fits(run.preflight, verdict_stamp(recipe, run)):
        return
    verdict = read_json(run.preflight)
    if not verdict["go"] and not (verdict["warms"] and recipe.warmup.steps):
        raise MinigrpoError(
            f"Preflight found that this would teach nothing (see above, and {run.preflight}). Change what it names and "
            "run preflight again; to train all the same: train(..., despite_preflight=True)"
        )


def require_extra() -> None:
    missing = [name for name in ("matplotlib", "IPython") if find_spec(name) is None]
    if missing:
        raise MinigrpoError(
            f"A plot needs {' and '.join(missing)}: {install_hint('notebook')}. "
            "To train without one: train(..., live=False)"
        )


@contextmanager
def watch(run: RunDir, steps: int) -> Iterator[None]:
    """Show a plot under the cell that follows metrics.jsonl while the block runs.

    It is drawn in a thread: training keeps the main one, where an interrupt arrives.
    """
    require_extra()
    from IPython.display import Image, display

    def image() -> Any:
        return Image(data=draw_png(read_steps(run), str(run.path), steps), format="png")

    handle = display(image(), display_id=True)
    if handle is None:  # no notebook: IPython has said what it could
        yield
        return
    over = threading.Event()

    def follow() -> None:
        drawn = 0
        while not over.wait(REDRAW):
            size = run.metrics.stat().st_size if run.metrics.exists() else 0
            if size != drawn:
                handle.update(image())
                drawn = size

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        handle.update(image())


def read_steps(run: RunDir) -> list[dict[str, Any]]:
    return list(read_metrics(run))


def draw_png(rows: Sequence[Mapping[str, Any]], title: str, steps: int | None = None) -> bytes:
    """Draw the panels as a PNG, without pyplot, whose state belongs to the main thread and to the user's own plots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    done = rows[-1]["step"] if rows else 0
    figure.suptitle(f"{title}: step {done}" + (f" of {steps}" if steps else ""))
    charts = {chart.id: chart for chart in CHARTS}
    for axes, name in zip(figure.subplots(2, 3, sharex=True).flat, PANELS, strict=True):
        _draw_chart(axes, charts[name], rows)
        if steps:
            axes.set_xlim(0, steps)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=80)
    return stream.getvalue()


def _draw_chart(axes: Any, chart: Chart, rows: Sequence[Mapping[str, Any]]) -> None:
    for number, (figure_name, words) in enumerate(zip(chart.figures, chart.labels, strict=True)):
        known = [(row["step"], row[figure_name]) for row in rows if row.get(figure_name) is not None]
        x, y = [step for step, _ in known], [value for _, value in known]
        axes.plot(x, y, color=f"C{number}", alpha=0.3, linewidth=1)
        axes.plot(x, smooth(y), color=f"C{number}", linewidth=2, label=words)
    if chart.share:
        axes.set_ylim(-0.03, 1.03)
    axes.set_title(chart.title, fontsize="medium")
    axes.set_xlabel(
        textwrap.fill(sentence_of(chart.about), 58, break_on_hyphens=False), fontsize="x-small", color="0.4"
    )
    axes.grid(alpha=0.25)
    if len(chart.figures) > 1:
        axes.legend(loc="best", fontsize="small")


def smooth(values: Sequence[float]) -> list[float]:
    """Average each value with the WINDOW - 1 values before it."""
    windows = (values[max(0, end - WINDOW) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]
