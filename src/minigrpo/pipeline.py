"""The stages in order: preflight, warm-up, train, evaluate. Each leaves an artefact in the run's folder, stamped with
what it was made from; a resumed run skips what is there and still fits, and makes the rest.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from minigrpo import beginning, tables
from minigrpo.config import Recipe
from minigrpo.lock import hold
from minigrpo.recipefile import load_recipe
from minigrpo.rollout import prompts_of
from minigrpo.rundir import RunDir, complete_folder, read_json, tidy, write_json
from minigrpo.stamps import begin, check_folder, finished, fits, seconds_of, slug, stamp, timed, trained
from minigrpo.track import Track, stage
from minigrpo.types import Engine, Sampling, Task

if TYPE_CHECKING:
    from minigrpo.evaluate import Comparison, Evaluation
    from minigrpo.policy import Policy
    from minigrpo.preflight import Verdict

TEMPERATURES = (0.0, 1.0)
"""What a run is judged by at its end: its likeliest answers, and the policy as it samples in training."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A recipe's machinery, loaded once and handed from stage to stage."""

    recipe: Recipe
    task: Task
    policy: Policy
    engine: Engine


def open_all(recipe: Recipe) -> Opened:
    from minigrpo.engines import open_engine
    from minigrpo.policy import open_policy
    from minigrpo.tasks import open_task

    task = open_task(recipe)
    with stage(f"model {recipe.model.path}", 0) as report:
        policy = open_policy(recipe, report)
    return Opened(recipe, task, policy, open_engine(policy, recipe))


def preflight(recipe: Recipe, run: RunDir | None = None) -> Verdict:
    """Sample the real task, print what was seen and the verdict; keep it in the run's folder, where there is one."""
    return beginning.preflight(open_all(recipe), run, Console())


def warmup(recipe: Recipe, run: RunDir, *, resume: bool = False) -> dict[str, Any]:
    """Let the model imitate right answers, and leave its adapter in RUN/warmup, for `train` to begin with.

    Returns how many answers were taught, and what was measured before and after.
    """
    from minigrpo.warmup import refuse_idle

    console = Console()
    refuse_idle(recipe)
    with taken(recipe, run, resume):
        if beginning.is_warm(recipe, run):
            console.print(Text(f"{run.warmup} is there already."))
        else:
            opened = open_all(recipe)
            beginning.check_lessons(opened)
            begin(recipe, run)
            beginning.warm_up(opened, run, console)
        console.print(Text(f"Warmed up: {run.warmup}\nNext: minigrpo train {run.path} --resume"))
        figures: dict[str, Any] = read_json(run.warmup / "made.json")
    return {name: value for name, value in figures.items() if name != "made"} | {"run": str(run.path)}


def train(recipe: Recipe, run: RunDir, *, resume: bool = False, show_samples: bool = False) -> None:
    """Train, and leave the adapter (or the model) in the run's folder."""
    console = Console()
    with taken(recipe, run, resume):
        if trained(run, recipe).exists():
            console.print(Text(f"{trained(run, recipe)} is there already: nothing left to train."))
            return
        opened = open_all(recipe)
        beginning.check_lessons(opened)
        begin(recipe, run)
        beginning.warm_up(opened, run, console)
        with timed(run, "train"):
            _train(opened, run, show_samples)
    console.print(Text(f"Trained: {trained(run, recipe)}\nNext: minigrpo evaluate {run.path}"))


@contextmanager
def taken(recipe: Recipe, run: RunDir, resume: bool) -> Iterator[None]:
    """The run's folder for this process alone, fit to begin in or to go on in, rid of what killed processes left."""
    with hold(run, lambda remark: Console(stderr=True).print(Text(remark), soft_wrap=True)):
        check_folder(recipe, run, resume)
        tidy(run)
        yield


def evaluate(
    model: str,
    recipe: Recipe | None = None,
    *,
    base: str | None = None,
    limit: int | None = None,
    n: int = 1,
    temperature: float = 0.0,
    out: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Grade a model, and a base beside it on the same prompts; every answer goes to `out` as JSON.

    `model`: a folder, a Hub id, an adapter, or a run (or what it trained), whose own recipe holds where none is given.
    Returns the figures without the answers, and `file`.
    """
    from minigrpo.evaluate import compare, examples
    from minigrpo.tasks import open_task

    console = Console(quiet=quiet)
    run = run_of(model)
    recipe = recipe or (load_recipe(str(run.path)) if run else Recipe())
    task = open_task(recipe)
    ask = Questions(recipe, task, limit or recipe.eval.limit, n, temperature, console)
    before = judge_model(base, ask) if base else None
    after = judge_model(model, ask)
    content: dict[str, Any] = after.to_dict()
    figures = {"model": after.summary()}
    if before:
        comparison = compare(before, after)
        figures = comparison.summary()
        content |= {"base": before.to_dict(), "change": figures["change"]}
        console.print(tables.comparison_table([comparison]))
    else:
        console.print(tables.evaluation_table(after))
    for answer in examples(after):
        console.print(tables.answer_panel(answer, "right" if answer["solved"] else "wrong"))
    folder = run.evals if run else Path("evals")
    file = out or folder / f"{slug(after.name)}-{slug(task.name)}-test{ask.suffix}.json"
    write_json(file, content | {"made": stamp("evaluate", recipe)})
    console.print(Text(f"Every answer: {file}"))
    return figures | {"file": str(file)}


def run_all(recipe: Recipe, run: RunDir, *, resume: bool = False, show_samples: bool = False) -> dict[str, Any]:
    """Preflight, train, evaluate before and after. Returns the figures, which also stand in evals/comparison.json."""
    with taken(recipe, run, resume):
        return _finish(run, _run_all(recipe, run, Console(), show_samples))


def quickstart(recipe: Recipe, run: RunDir, *, resume: bool = False, show_samples: bool = False) -> dict[str, Any]:
    """`run_all`, and what a newcomer wants to see at its end: answers before and after, and what to try next."""
    from minigrpo.evaluate import example_pairs

    console = Console()
    with taken(recipe, run, resume):
        comparisons = _run_all(recipe, run, console, show_samples)
        figures = _finish(run, comparisons)
    for before, after in example_pairs(comparisons[0]):
        console.print(tables.answer_panel(before, "before"))
        console.print(tables.answer_panel(after, "after"))
    console.print(
        Text(
            "What next:\n"
            f"  minigrpo evaluate {run.path} -n 8  # eight samples of each problem\n"
            "  minigrpo recipes quickstart > mine.yaml      # a recipe of your own to change\n"
            "  minigrpo run mine.yaml                       # the same road with it\n"
            "  minigrpo tasks                               # what else can be learned"
        ),
        soft_wrap=True,  # commands are to be copied
    )
    return figures


def _run_all(recipe: Recipe, run: RunDir, console: Console, show_samples: bool) -> list[Comparison]:
    console.print(Text(f"run {run.path}: preflight, train, evaluate", style="bold"))
    with timed(run, "model"):
        opened = open_all(recipe)
        beginning.check_lessons(opened)
        begin(recipe, run)
    if trained(run, recipe).exists():
        opened.policy.restore(trained(run, recipe))
        opened.engine.update(opened.policy)
        console.print(Text(f"{trained(run, recipe)} is there already."))
    else:
        beginning.prepare(opened, run, console)
        with timed(run, "train"):
            _train(opened, run, show_samples)
    with timed(run, "evaluate"):
        comparisons = _before_and_after(opened, run, console)
    console.print(tables.comparison_table(comparisons))
    console.print(tables.times_table(seconds_of(run)))
    return comparisons


def _train(opened: Opened, run: RunDir, show_samples: bool) -> None:
    from minigrpo import checkpoint
    from minigrpo.grpo import grpo

    recipe = opened.recipe
    track = Track(run, recipe.train.steps, show_samples=show_samples)
    grpo(recipe, opened.task, opened.policy, opened.engine, track)
    last, _ = checkpoint.latest(run)
    done = last.step if last else 0
    if done < recipe.train.steps:
        track.say(f"Stopped after step {done} of {recipe.train.steps}. The same command with --resume goes on.")
        raise KeyboardInterrupt  # the signal waited until the step was saved; now it does what it came for
    with complete_folder(trained(run, recipe)) as draft:
        opened.policy.save(draft)
        write_json(draft / "made.json", stamp("train", recipe))


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison, ready to answer. `made`: what it is made from, so that a kept answer is known."""

    name: str
    policy: Policy
    engine: Engine
    made: dict[str, Any]


def _before_and_after(opened: Opened, run: RunDir, console: Console) -> list[Comparison]:
    """The same unseen prompts, before and after, at each temperature."""
    from minigrpo.evaluate import compare

    recipe = opened.recipe
    asks = [Questions(recipe, opened.task, recipe.eval.limit, 1, t, console) for t in TEMPERATURES]
    tuned = Side("tuned", opened.policy, opened.engine, stamp("evaluate", recipe, trained(run, recipe)))
    after = [kept(run, tuned, ask) for ask in asks]
    with base_of(opened) as base:
        before = [kept(run, base, ask) for ask in asks]
    return [compare(*pair) for pair in zip(before, after, strict=True)]


@contextmanager
def base_of(opened: Opened) -> Iterator[Side]:
    """The model before training: the policy with its adapter off, or, where all was trained, the model once more."""
    from minigrpo.engines import open_engine
    from minigrpo.policy import open_trained

    made = stamp("evaluate", opened.recipe)
    if not opened.policy.is_lora:
        policy = open_trained(opened.recipe.model.path, opened.recipe)
        yield Side("base", policy, open_engine(policy, opened.recipe), made)
        return
    with opened.policy.adapter_off():
        opened.engine.update(opened.policy)
        yield Side("base", opened.policy, opened.engine, made)
    opened.engine.update(opened.policy)


@dataclass(frozen=True, slots=True)
class Questions:
    """What a model is asked, and how: the same for every model that is to be compared."""

    recipe: Recipe
    task: Task
    limit: int
    n: int
    temperature: float
    console: Console

    @property
    def suffix(self) -> str:
        """In file names, what is not greedy."""
        return f"-t{self.temperature:g}" + (f"-n{self.n}" if self.n > 1 else "") if self.temperature else ""

    def put_to(self, name: str, policy: Policy, engine: Engine) -> Evaluation:
        from minigrpo.evaluate import evaluate
        from minigrpo.grader import Grader

        prompts = prompts_of(self.task, "test", self.limit)
        sampling = Sampling(self.temperature, self.recipe.rollout.max_tokens, self.recipe.seed)
        console = Console(stderr=True, quiet=self.console.quiet)
        grading = Grader.of(self.task, self.recipe.task, console.print)
        with stage(f"evaluate {name}", len(prompts), console) as report, grading as grader:
            return evaluate(
                engine,
                self.task,
                name=name,
                prompts=prompts,
                sampling=sampling,
                tokenizer=policy.tokenizer,
                n=self.n,
                grader=grader,
                report=report,
            )


def judge_model(model: str, ask: Questions) -> Evaluation:
    """Open a model of any kind, ask it, and let it go again: two may not fit side by side."""
    from minigrpo.engines import open_engine
    from minigrpo.policy import open_trained

    run, path = run_of(model), Path(model).expanduser()
    policy = open_trained(str(finished(run)) if run and run.path == path else model, ask.recipe)
    # Short, and telling: a Hub id as it is, of a path its end, of what a run trained the run.
    name = run.path.resolve().name if run else path.resolve().name if path.exists() else model
    evaluation = ask.put_to(name, policy, open_engine(policy, ask.recipe))
    del policy
    gc.collect()
    return evaluation


def run_of(model: str) -> RunDir | None:
    """The run that a path means: its folder, or what it trained."""
    path = Path(model).expanduser()
    for run in (RunDir(path), RunDir(path.parent)):
        if run.exists() and path in (run.path, run.adapter, run.model):
            return run
    return None


def kept(run: RunDir, side: Side, ask: Questions) -> Evaluation:
    """The evaluation that the run's folder holds, if it was made from the same; else a new one, which is kept."""
    from minigrpo.evaluate import Evaluation

    file = run.evals / f"{side.name}-{slug(ask.task.name)}-test{ask.suffix}.json"
    if fits(file, side.made):
        return Evaluation.from_dict(read_json(file))
    evaluation = ask.put_to(side.name, side.policy, side.engine)
    write_json(file, evaluation.to_dict() | {"made": side.made})
    return evaluation


def _finish(run: RunDir, comparisons: list[Comparison]) -> dict[str, Any]:
    figures = {
        "run": str(run.path),
        "comparisons": {comparison.after.decoding: comparison.summary() for comparison in comparisons},
        "seconds": seconds_of(run),
    }
    write_json(run.evals / "comparison.json", figures)
    return figures
