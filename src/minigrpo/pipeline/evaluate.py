"""Evaluate models on unseen prompts: one model, a model beside its base, or a run's policy before and after training.

An evaluation that is killed loses nothing: finished answers are in a journal beside its file, and the same command asks
only the remaining prompts.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe
from minigrpo.errors import ArtifactError, command_line
from minigrpo.pipeline import tables
from minigrpo.pipeline.context import OpenedRun, allocator_for
from minigrpo.rollouts.groups import prompts_of
from minigrpo.runs.manifest import existing_result, fits, result_path, slug, stamp, write_sealed
from minigrpo.runs.rundir import RunDir, enclosing_run, find_run, read_json, staying
from minigrpo.types import Engine, Sampling, Split, Task
from minigrpo.ui.progress import stage
from minigrpo.ui.screen import Screen
from minigrpo.utils.paths import user_path

if TYPE_CHECKING:
    from minigrpo.delivery.serve.gguf_engine import GgufEngine
    from minigrpo.evaluation.evaluate import Comparison, Evaluation
    from minigrpo.models.policy import Policy

GGUF = ".gguf"
TEMPERATURES = (0.0, 1.0)
"""Temperatures of a run's evaluations: its likeliest answers, and the policy as it samples in training."""


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

    `model`: a folder, a Hub id, an adapter, a GGUF file, or a run. Without `recipe`, a run's own recipe is used for
    any model in its folder. Return the figures without the answers, and `file`. Raise ArtifactError where `out` is
    something other than an earlier evaluation.
    """
    found = find_run(model)
    recipe = recipe or (load_recipe(str(found.run.path)) if found else Recipe())
    with allocator_for(recipe):
        from minigrpo.evaluation.evaluate import compare, pick_examples
        from minigrpo.tasks.registry import open_task
        from minigrpo.utils.process import process_settings

        console = Screen(quiet=quiet)
        task = open_task(recipe)
        ask = EvalRequest(recipe, task, limit or recipe.eval.limit, n, temperature, console, split)
        tell_where_fewer(console, len(task.prompts(split)), split, limit)
        folder = found.run.evals if found else Path("evals")
        file = out or folder / f"{slug(name_of(model))}-{ask.file_stem}.json"
        require_free(file)
        in_use = [user_path(name) for name in (model, base) if name] + ([found.run.path] if found else [])
        with staying(*in_use, file.parent), process_settings(recipe.train.threads):
            before = evaluate_model(base, ask, file) if base else None
            after = evaluate_model(model, ask, file)
            comparison = compare(before, after) if before else None
            figures = comparison.summary() if comparison else {"model": after.summary()}
            content: dict[str, Any] = after.to_dict()
            if before:
                content |= {"base": before.to_dict(), "change": figures["change"]}
            write_sealed(file, content | {"made": stamp("evaluate", recipe)})
        for name in (model, base):
            journal_beside(file, name or "").unlink(missing_ok=True)
        console.show(tables.comparison_table([comparison]) if comparison else tables.evaluation_table(after))
        for answer in pick_examples(after):
            console.print(tables.answer_panel(answer, "right" if answer["solved"] else "wrong"))
        console.show(Text(f"Every answer: {file}"))
        return figures | {"file": str(file)}


def require_free(file: Path) -> None:
    """Raise ArtifactError unless nothing or an earlier evaluation is there: nothing else is ever replaced.

    In a run's folder evaluations lie in evals/ alone: elsewhere a file would break a seal, or pass for the run's own.
    """
    run = enclosing_run(file)
    if run and user_path(file).resolve().parent != run.evals:
        raise ArtifactError(
            f"{file} lies among the files of the run {run.path}, which no evaluation may touch. Name another place: "
            f"{command_line('--out', run.evals / file.name)}"
        )
    if not os.path.lexists(file):
        return
    try:
        content = read_json(file)
    except ArtifactError:
        content = None
    made = content.get("made") if isinstance(content, dict) and "scores" in content else None
    if not isinstance(made, dict) or made.get("verb") != "evaluate":
        raise ArtifactError(
            f"{file} is no evaluation of minigrpo, so it is not replaced. Move it away, or name another: --out FILE"
        )


def tell_where_fewer(console: Screen, there: int, split: Split, limit: int | None) -> None:
    """Say that fewer prompts are asked than the user wanted: the task has no more."""
    if limit and 0 < there < limit:
        console.print(f"The task has {there} {split} prompts: all of them are asked.")


@dataclass(frozen=True, slots=True)
class EvalSide:
    """One side of a comparison, opened. `made`: the stamp of its sources, by which saved answers are recognised."""

    name: str
    policy: Policy | GgufEngine
    engine: Engine
    made: dict[str, Any]


def before_and_after(opened: OpenedRun, run: RunDir, console: Screen) -> list[Comparison]:
    """Evaluate the model before and after training on the same unseen prompts, at each temperature."""
    from minigrpo.evaluation.evaluate import compare

    recipe = opened.recipe
    asks = [EvalRequest(recipe, opened.task, recipe.eval.limit, 1, t, console) for t in TEMPERATURES]
    tuned = EvalSide("tuned", opened.policy, opened.engine, stamp("evaluate", recipe, result_path(run, recipe.train)))
    after = [evaluate_once(run, tuned, ask) for ask in asks]
    with open_base(opened) as base:
        before = [evaluate_once(run, base, ask) for ask in asks]
    return [compare(*pair) for pair in zip(before, after, strict=True)]


@contextmanager
def open_base(opened: OpenedRun) -> Iterator[EvalSide]:
    """Yield the model before training: the policy with its adapter off, or the model loaded again for full training."""
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
    """What a model is asked, and how: equal for all models that are compared."""

    recipe: Recipe
    task: Task
    limit: int
    n: int
    temperature: float
    console: Screen
    split: Split = "test"

    @property
    def file_stem(self) -> str:
        """Return the part of file names that tells the task, the split, and the sampling unless it is greedy."""
        suffix = f"-t{self.temperature:g}" + (f"-n{self.n}" if self.n > 1 else "") if self.temperature else ""
        return f"{slug(self.task.name)}-{self.split}{suffix}"

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.recipe.rollout.max_tokens, self.recipe.seed)

    def evaluate_side(self, side: EvalSide, journal: Path) -> Evaluation:
        from minigrpo.evaluation.answer_cache import AnswerCache
        from minigrpo.evaluation.evaluate import evaluate
        from minigrpo.rollouts.async_grader import Grader

        prompts = prompts_of(self.task, self.split, self.limit)
        identity = {"made": side.made["from"], "sampling": asdict(self.sampling), "n": self.n, "split": self.split}
        console = Screen(stderr=True, quiet=self.console.quiet)
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
                answer_cache=AnswerCache(journal, identity),
                grader=grader,
                report=report,
            )


def evaluate_model(model: str, ask: EvalRequest, file: Path) -> Evaluation:
    """Open a model of any kind, evaluate it, and free it again: two may not fit side by side.

    Raise ArtifactError where a run's merged model or GGUF file is not what was proved.
    """
    from minigrpo.delivery.artifacts.source import refuse_changed
    from minigrpo.models.policy import open_trained
    from minigrpo.rollouts.engines.registry import open_engine

    found, path = find_run(model), user_path(model)
    if path.exists():
        refuse_changed(path)
    if path.suffix == GGUF:
        return evaluate_gguf(path, ask, journal_beside(file, model))
    source = str(existing_result(found.run)) if found and found.artefact == "run" else model
    policy = open_trained(source, ask.recipe)
    sources = [user_path(source)] if user_path(source).exists() else []
    made = stamp("evaluate", ask.recipe, *sources)
    made["from"]["model"] = policy.path  # a Hub id, or a folder whose name tells what shaped it
    # Without weights in blocks: the model before may not be freed yet, so no plan can tell whether there is room.
    engine = open_engine(policy, ask.recipe)
    evaluation = ask.evaluate_side(EvalSide(name_of(model), policy, engine, made), journal_beside(file, model))
    del policy
    gc.collect()
    return evaluation


def evaluate_gguf(path: Path, ask: EvalRequest, journal: Path) -> Evaluation:
    """Evaluate a GGUF file in llama.cpp: the same prompts and grading, with the file's own template and tokenizer."""
    from minigrpo.delivery.serve.gguf_engine import open_gguf

    with open_gguf(path, max_tokens=ask.sampling.max_tokens) as engine:
        return ask.evaluate_side(EvalSide(path.stem, engine, engine, stamp("evaluate", ask.recipe, path)), journal)


def name_of(model: str) -> str:
    """Return a short name: a Hub id as it is, the last part of a path, or the run's name for what a run trained."""
    found, path = find_run(model), user_path(model)
    if path.suffix == GGUF:
        return path.stem
    if found and found.artefact in ("run", "adapter", "model", "merged"):
        return found.run.path.resolve().name
    return path.resolve().name if path.exists() else model


def journal_beside(file: Path, model: str) -> Path:
    """Return the file that keeps a model's answers until all are there."""
    return file.with_name(f".{file.stem}-{slug(model)}.jsonl")


def evaluate_once(run: RunDir, side: EvalSide, ask: EvalRequest) -> Evaluation:
    """Return the evaluation in the run's folder if it still fits; else evaluate, and save it there."""
    from minigrpo.evaluation.evaluate import Evaluation

    file = run.evals / f"{side.name}-{ask.file_stem}.json"
    if fits(file, side.made):
        return Evaluation.from_dict(read_json(file))
    journal = journal_beside(file, side.name)
    evaluation = ask.evaluate_side(side, journal)
    write_sealed(file, evaluation.to_dict() | {"made": side.made})
    journal.unlink(missing_ok=True)
    return evaluation
