"""From a base model and a reward function to a served, fine-tuned model, on the machine you have.

    from minigrpo import RunDir, load_recipe, train
    train(load_recipe("quickstart"), RunDir("runs/first"))

A name is imported when it is first used, so `import minigrpo` loads no torch. May import everything.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigrpo.config.load import dump_recipe as dump_recipe
    from minigrpo.config.load import load_recipe as load_recipe
    from minigrpo.config.schema import Recipe as Recipe
    from minigrpo.errors import ArtifactError as ArtifactError
    from minigrpo.errors import DivergenceError as DivergenceError
    from minigrpo.errors import MinigrpoError as MinigrpoError
    from minigrpo.errors import ModelError as ModelError
    from minigrpo.errors import RecipeError as RecipeError
    from minigrpo.errors import SandboxError as SandboxError
    from minigrpo.errors import TaskError as TaskError
    from minigrpo.pipeline.attack import attack_task as attack_task
    from minigrpo.pipeline.audit import audit as audit
    from minigrpo.pipeline.forks import fork as fork
    from minigrpo.pipeline.replay import replay as replay
    from minigrpo.pipeline.replay import replay_steps as replay_steps
    from minigrpo.pipeline.stages import evaluate as evaluate
    from minigrpo.pipeline.stages import preflight as preflight
    from minigrpo.pipeline.stages import quickstart as quickstart
    from minigrpo.pipeline.stages import run_all as run_all
    from minigrpo.pipeline.stages import train as train
    from minigrpo.pipeline.stages import warmup as warmup
    from minigrpo.rollouts.async_grader import Grader as Grader
    from minigrpo.rollouts.engines.scripted import Scripted as Scripted
    from minigrpo.rollouts.groups import rollout as rollout
    from minigrpo.runs.rundir import RunDir as RunDir
    from minigrpo.tasks.custom.reward_task import reward_task as reward_task
    from minigrpo.training.prompt_sampler import PromptSampler as PromptSampler
    from minigrpo.types import Completion as Completion
    from minigrpo.types import Engine as Engine
    from minigrpo.types import Grade as Grade
    from minigrpo.types import Group as Group
    from minigrpo.types import Prompt as Prompt
    from minigrpo.types import Sampling as Sampling
    from minigrpo.types import Task as Task

__version__ = "0.1.0"

# How long a thread that has to wait spins before it sleeps: GNU's OpenMP reads it when torch is loaded. Its own 300,000
# are no quicker on an idle machine; beside a busy program utils/spinning.py steps in. No bit changes, and what is set
# already stays.
if "OMP_WAIT_POLICY" not in os.environ:  # the number is SPIN_COUNT there
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

HOMES = {
    "minigrpo.types": ("Completion", "Engine", "Grade", "Group", "Prompt", "Sampling", "Task"),
    "minigrpo.config.schema": ("Recipe",),
    "minigrpo.errors": (
        "ArtifactError",
        "DivergenceError",
        "MinigrpoError",
        "ModelError",
        "RecipeError",
        "SandboxError",
        "TaskError",
    ),
    "minigrpo.runs.rundir": ("RunDir",),
    "minigrpo.config.load": ("dump_recipe", "load_recipe"),
    "minigrpo.rollouts.groups": ("rollout",),
    "minigrpo.training.prompt_sampler": ("PromptSampler",),
    "minigrpo.rollouts.engines.scripted": ("Scripted",),
    "minigrpo.rollouts.async_grader": ("Grader",),
    "minigrpo.tasks.custom.reward_task": ("reward_task",),
    "minigrpo.pipeline.audit": ("audit",),
    "minigrpo.pipeline.replay": ("replay", "replay_steps"),
    "minigrpo.pipeline.attack": ("attack_task",),
    "minigrpo.pipeline.forks": ("fork",),
    "minigrpo.pipeline.stages": ("evaluate", "preflight", "quickstart", "run_all", "train", "warmup"),
}
HOME_OF = {name: home for home, names in HOMES.items() for name in names}

__all__ = ["__version__", *sorted(HOME_OF)]


def __getattr__(name: str) -> Any:
    if name not in HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
