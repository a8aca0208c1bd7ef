"""Models judged on unseen prompts: any one of them, a model and its base side by side, a run's policy before and after.

An evaluation that is killed loses nothing: what was answered stands in a journal beside its file, and the same command
asks only what is left.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe
from minigrpo.pipeline import tables
from minigrpo.pipeline.context import OpenedRun
from minigrpo.rollouts.groups import prompts_of
from minigrpo.runs.manifest import existing_result, fits, result_path, slug, stamp
from minigrpo.runs.rundir import RunDir, find_run, read_json, write_json
from minigrpo.types import Engine, Sampling, Split, Task
from minigrpo.ui.progress import stage

if TYPE_CHECKING:
    from minigrpo.delivery.serve.gguf_engine import GgufEngine
    from minigrpo.evaluation.evaluate import Comparison, Evaluation
    from minigrpo.models.policy import Policy

GGUF = ".gguf"
TEMPERATURES = (0.0, 1.0)
"""What a run is judged by at its end: its likeliest answers, and the policy as it samples in training."""


def evaluate(
    model: str,
    recipe: Recipe | None = None,
    *,
    base: str | None = None,
    limit: int | None = None,
    n: int = 1,
    temperature: float = 0.0,
    split: Split = "test",
    out: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Grade a model, and a base beside it on the same prompts; every answer goes to `out` as JSON.

    `model`: a folder, a Hub id, an adapter, a GGUF file, or a run. Of what lies in a run, that one's recipe holds where
    none is given. Returns the figures without the answers, and `file`.
    """
    from minigrpo.evaluation.evaluate import compare, pick_examples
    from minigrpo.tasks.registry import open_task
    from minigrpo.utils.process import process_settings

    console = Console(quiet=quiet)
    found = find_run(model)
    recipe = recipe or (load_recipe(str(found.run.path)) if found else Recipe())
    task = open_task(recipe)
    ask = EvalRequest(recipe, task, limit or recipe.eval.limit, n, temperature, console, split)
    folder = found.run.evals if found else Path("evals")
    file = out or folder / f"{slug(name_of(model))}-{ask.about}.json"
    with process_settings(recipe.train.threads):
        before = judge_model(base, ask, file) if base else None
        after = judge_model(model, ask, file)
    content: dict[str, Any] = after.to_dict()
    figures = {"model": after.summary()}
    if before:
        comparison = compare(before, after)
        figures = comparison.summary()
        content |= {"base": before.to_dict(), "change": figures["change"]}
        console.print(tables.comparison_table([comparison]))
    else:
        console.print(tables.evaluation_table(after))
    for answer in pick_examples(after):
        console.print(tables.answer_panel(answer, "right" if answer["solved"] else "wrong"))
    write_json(file, content | {"made": stamp("evaluate", recipe)})
    for name in (model, base):
        journal_beside(file, name or "").unlink(missing_ok=True)
    console.print(Text(f"Every answer: {file}"))
    return figures | {"file": str(file)}


@dataclass(frozen=True, slots=True)
class EvalSide:
    """One side of a comparison, ready to answer. `made`: what it is made from, so that a kept answer is known."""

    name: str
    policy: Policy | GgufEngine
    engine: Engine
    made: dict[str, Any]


def before_and_after(opened: OpenedRun, run: RunDir, console: Console) -> list[Comparison]:
    """The same unseen prompts, before and after, at each temperature."""
    from minigrpo.evaluation.evaluate import compare

    recipe = opened.recipe
    asks = [EvalRequest(recipe, opened.task, recipe.eval.limit, 1, t, console) for t in TEMPERATURES]
    tuned = EvalSide("tuned", opened.policy, opened.engine, stamp("evaluate", recipe, result_path(run, recipe.train)))
    after = [kept(run, tuned, ask) for ask in asks]
    with base_of(opened) as base:
        before = [kept(run, base, ask) for ask in asks]
    return [compare(*pair) for pair in zip(before, after, strict=True)]


@contextmanager
def base_of(opened: OpenedRun) -> Iterator[EvalSide]:
    """The model before training: the policy with its adapter off, or, where all was trained, the model once more."""
    from minigrpo.models.policy import open_trained
    from minigrpo.rollouts.engines.registry import open_engine

    made = stamp("evaluate", opened.recipe)
    if not opened.policy.is_lora:
        policy = open_trained(opened.recipe.model.path, opened.recipe)
        yield EvalSide("base", policy, open_engine(policy, opened.recipe), made)
        return
    with opened.policy.adapter_off():
        opened.engine.update(opened.policy)
        yield EvalSide("base", opened.policy, opened.engine, made)
    opened.engine.update(opened.policy)


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """What a model is asked, and how: the same for every model that is to be compared."""

    recipe: Recipe
    task: Task
    limit: int
    n: int
    temperature: float
    console: Console
    split: Split = "test"

    @property
    def about(self) -> str:
        """In file names: the task, the split, and what is not greedy."""
        suffix = f"-t{self.temperature:g}" + (f"-n{self.n}" if self.n > 1 else "") if self.temperature else ""
        return f"{slug(self.task.name)}-{self.split}{suffix}"

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.recipe.rollout.max_tokens, self.recipe.seed)

    def put_to(self, side: EvalSide, journal: Path) -> Evaluation:
        from minigrpo.evaluation.answer_cache import AnswerCache
        from minigrpo.evaluation.evaluate import evaluate
        from minigrpo.rollouts.async_grader import Grader

        prompts = prompts_of(self.task, self.split, self.limit)
        asked = {"made": side.made["from"], "sampling": asdict(self.sampling), "n": self.n, "split": self.split}
        console = Console(stderr=True, quiet=self.console.quiet)
        grading = Grader.of(self.task, self.recipe.task, console.print)
        with stage(f"evaluate {side.name}", len(prompts), console) as report, grading as grader:
            return evaluate(
                side.engine,
                self.task,
                name=side.name,
                prompts=prompts,
                sampling=self.sampling,
                tokenizer=side.policy.tokenizer,
                n=self.n,
                split=self.split,
                answer_cache=AnswerCache(journal, asked),
                grader=grader,
                report=report,
            )


def judge_model(model: str, ask: EvalRequest, file: Path) -> Evaluation:
    """Open a model of any kind, ask it, and let it go again: two may not fit side by side.

    Raises ArtifactError where a run's merged model or GGUF file is not what was proved.
    """
    from minigrpo.delivery.artifacts.source import refuse_changed
    from minigrpo.models.policy import open_trained
    from minigrpo.rollouts.engines.registry import open_engine

    found, path = find_run(model), Path(model).expanduser()
    if path.exists():
        refuse_changed(path)
    if path.suffix == GGUF:
        return judge_gguf(path, ask, journal_beside(file, model))
    source = str(existing_result(found.run)) if found and found.artefact == "run" else model
    policy = open_trained(source, ask.recipe)
    sources = [Path(source).expanduser()] if Path(source).expanduser().exists() else []
    made = stamp("evaluate", ask.recipe, *sources)
    made["from"]["model"] = policy.path  # a Hub id, or a folder whose name tells what shaped it
    evaluation = ask.put_to(
        EvalSide(name_of(model), policy, open_engine(policy, ask.recipe), made), journal_beside(file, model)
    )
    del policy
    gc.collect()
    return evaluation


def judge_gguf(path: Path, ask: EvalRequest, journal: Path) -> Evaluation:
    """A file for llama.cpp: the same prompts and the same grading; its own template and tokenizer."""
    from minigrpo.delivery.serve.gguf_engine import open_gguf

    with open_gguf(path, max_tokens=ask.sampling.max_tokens) as engine:
        return ask.put_to(EvalSide(path.stem, engine, engine, stamp("evaluate", ask.recipe, path)), journal)


def name_of(model: str) -> str:
    """Short, and telling: a Hub id as it is, of a path its end, of what a run trained the run."""
    found, path = find_run(model), Path(model).expanduser()
    if path.suffix == GGUF:
        return path.stem
    if found and found.artefact in ("run", "adapter", "model", "merged"):
        return found.run.path.resolve().name
    return path.resolve().name if path.exists() else model


def journal_beside(file: Path, model: str) -> Path:
    """Where the answers of a model are kept until all are there."""
    return file.with_name(f".{file.stem}-{slug(model)}.jsonl")


def kept(run: RunDir, side: EvalSide, ask: EvalRequest) -> Evaluation:
    """The evaluation that the run's folder holds, if it was made from the same; else a new one, which is kept."""
    from minigrpo.evaluation.evaluate import Evaluation

    file = run.evals / f"{side.name}-{ask.about}.json"
    if fits(file, side.made):
        return Evaluation.from_dict(read_json(file))
    journal = journal_beside(file, side.name)
    evaluation = ask.put_to(side, journal)
    write_json(file, evaluation.to_dict() | {"made": side.made})
    journal.unlink(missing_ok=True)
    return evaluation
