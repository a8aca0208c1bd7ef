"""A model that is sharded over ranks learns what it learns whole, and each rank holds its share of it."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from minigrpo.config.schema import (
    EvalConfig,
    GroupsConfig,
    ModelConfig,
    ObjectiveConfig,
    Recipe,
    RolloutConfig,
    SaveConfig,
    TrainConfig,
)
from minigrpo.distributed.ranks import ALONE, Ranks
from minigrpo.distributed.shards import WEIGHT, names_of_shards, read_weights, shard, slice_like, unite, write_shards
from minigrpo.errors import RecipeError, SharedPassError
from minigrpo.models.policy import decoder_of, open_policy
from minigrpo.pipeline.audit_chain import origin_step
from minigrpo.pipeline.evidence import read_evidence
from minigrpo.rollouts.engines.fingerprint import policy_logprobs
from minigrpo.rollouts.engines.registry import open_engine, shards
from minigrpo.runs.logger import RankLog, RunLogger
from minigrpo.runs.manifest import hash_files
from minigrpo.runs.rundir import RunDir
from minigrpo.training.grpo import grpo
from minigrpo.training.memory.planner import Device, make_plan
from minigrpo.training.oom import retry_on_oom
from minigrpo.types import Sampling
from tests.distributed.test_lost_ranks import LIMIT_S, begin, ended, ranks_of, steps_logged, wait_until
from tests.distributed.test_same_run import LETTERS, sampled
from tests.helpers.models import rendered
from tests.helpers.ranks import on_ranks
from tests.helpers.tiny import build_model

pytestmark = pytest.mark.needs("linux")

STEPS = 4
SHARDED = {"shards/__0_0.distcp", "shards/__1_0.distcp", "shards/index"}
EVERYTHING: dict[str, Any] = {
    "groups": GroupsConfig(resample=2.0, min_spread=0.05),
    "objective": ObjectiveConfig(kl=0.05, top_entropy=0.5, entropy=0.01),
    "eval": EvalConfig(every=2, held_out=5),
}


def recipe_for(folder: Path, until: int = STEPS, **sections: Any) -> Recipe:
    return Recipe(
        model=ModelConfig(path=str(folder)),
        rollout=RolloutConfig(prompts=3, completions=3, max_tokens=5),
        train=TrainConfig(steps=STEPS, until=until, lr=1e-3, tokens_per_pass=30, inner_epochs=2, full=True),
        save=SaveConfig(every=2, keep=9),
        **sections,
    )


def train(ranks: Ranks, recipe: Recipe, run: RunDir) -> dict[str, int]:
    """Train on these ranks, sharded where there are several; return the bytes that this one holds, by what they are."""
    run.path.mkdir(parents=True, exist_ok=True)
    policy = open_policy(recipe)
    engine = open_engine(policy, recipe)
    if ranks.size > 1:
        policy.shard(ranks)
    frozen = policy.frozen_copy
    held = {"reference": nbytes(frozen.parameters())} if frozen is not None else {}
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: held.update(bytes_held(optimizer)))
    log = RunLogger(run, recipe.train.last_step) if ranks.leads else RankLog(run, ranks.rank)
    grpo(recipe, LETTERS, policy, engine, log, ranks=ranks)
    hook.remove()
    if ranks.leads:
        shutil.rmtree(run.path / "model", ignore_errors=True)
        policy.save(run.path / "model")
    return held


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of memory behind tensors, each piece once: of a sharded one, behind the slice."""
    pieces = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum({piece.untyped_storage().data_ptr(): piece.untyped_storage().nbytes() for piece in pieces}.values())


def bytes_held(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Count parameters, gradients and moments as they lie in memory after a step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = [optimizer.state[parameter][name] for parameter in parameters for name in ("exp_avg", "exp_avg_sq")]
    gradients = [parameter.grad for parameter in parameters]
    return {"parameters": nbytes(parameters), "gradients": nbytes(gradients), "moments": nbytes(moments)}


def weights_of(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.path / "model" / "model.safetensors")


def gap(left: RunDir, right: RunDir) -> float:
    one, two = weights_of(left), weights_of(right)
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def test_a_sharded_run_is_that_of_one_process_and_each_rank_holds_half(tmp_path: Path, tiny_folder: Any) -> None:
    recipe = recipe_for(tiny_folder(), **EVERYTHING)
    alone, together = RunDir(tmp_path / "alone"), RunDir(tmp_path / "together")
    whole = train(ALONE, recipe, alone)
    held = on_ranks(2, tmp_path / "wire", lambda ranks: train(ranks, recipe, together))
    assert sampled(together) == sampled(alone)
    assert gap(alone, together) < 1e-5
    assert whole["moments"] == 2 * whole["parameters"] == 2 * whole["gradients"]
    for kind, count in whole.items():
        assert [rank[kind] for rank in held] == [pytest.approx(count / 2, rel=0.02)] * 2
    figures = [json.loads(line) for line in together.metrics.read_text().splitlines()]
    for one, two in zip(figures, map(json.loads, alone.metrics.read_text().splitlines()), strict=True):
        assert {name: one[name] for name in ("loss", "grad_norm", "entropy", "kl")} == pytest.approx(
            {name: two[name] for name in ("loss", "grad_norm", "entropy", "kl")}, rel=1e-3, abs=1e-6
        )
        assert one["sent_bytes/weights"] > one["sent_bytes/gradients"] > 0


def test_a_checkpoint_of_two_ranks_is_read_by_one_and_by_four_and_of_one_by_two(
    tmp_path: Path, tiny_folder: Any
) -> None:
    model = tiny_folder()
    alone = RunDir(tmp_path / "alone")
    whole = train(ALONE, recipe_for(model), alone)
    half, full = recipe_for(model, until=2), recipe_for(model)
    for name, sizes in {"2 to 1": (2, 1), "2 to 4": (2, 4), "1 to 2": (1, 2)}.items():
        run = RunDir(tmp_path / name)
        for size, recipe in zip(sizes, (half, full), strict=True):
            work = partial(train, recipe=recipe, run=run)
            held = [work(ALONE)] if size == 1 else on_ranks(size, tmp_path / f"{name} wire {size}", work)
            sharded = (run.checkpoint(recipe.train.last_step) / "shards" / "index").is_file()
            assert sharded == (size > 1)
        for rank in held:  # also of what came whole from the disk
            assert rank["moments"] == pytest.approx(whole["moments"] / sizes[1], rel=0.02)
        assert sampled(run) == sampled(alone), name
        assert gap(run, alone) < 1e-5, name


def test_a_sharded_run_that_goes_on_ends_with_the_bytes_of_one_that_was_never_stopped(
    tmp_path: Path, tiny_folder: Any
) -> None:
    model = tiny_folder()
    whole, cut = RunDir(tmp_path / "whole"), RunDir(tmp_path / "cut")
    for run, until in ((whole, STEPS), (cut, 2), (cut, STEPS)):
        job = partial(train, recipe=recipe_for(model, until, **EVERYTHING), run=run)
        on_ranks(2, tmp_path / f"wire of {run.path.name} {until}", job)
    assert hash_files(whole.path / "model") == hash_files(cut.path / "model")
    for step in (2, STEPS):
        one, other = (hash_files(run.checkpoint(step)) for run in (whole, cut))
        assert {name for name in one if name.startswith("shards/")} == SHARDED
        assert {name: one[name] for name in SHARDED} == {name: other[name] for name in SHARDED}, step


def test_layers_travel_twice_a_pass_and_what_lies_outside_once(tmp_path: Path, tiny_folder: Any) -> None:
    recipe, run = recipe_for(tiny_folder(), until=2), RunDir(tmp_path / "run")
    on_ranks(2, tmp_path / "wire", partial(train, recipe=recipe, run=run))
    model = open_policy(recipe).model
    layers = nbytes(weight for layer in decoder_of(model).layers for weight in layer.parameters())
    rest = nbytes(model.parameters()) - layers
    _, row = (json.loads(line) for line in run.metrics.read_text().splitlines())
    passes = row["sent_bytes/gradients"] / ((layers + rest) / 2)
    assert passes > 2
    # The engine copies the layers once more. The rest is gathered for it, and stays so until the first backward pass.
    assert row["sent_bytes/weights"] == passes * (2 * layers + rest) / 2 + layers / 2


@pytest.mark.parametrize(("until", "best"), [(3, 1), (4, 4)])  # 4: it has just been written, by another rank
def test_the_best_checkpoint_is_what_a_sharded_run_leaves(
    until: int, best: int, tmp_path: Path, tiny_folder: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_for(tiny_folder(), until, eval=EvalConfig(every=1, held_out=5))
    recipe = recipe.model_copy(update={"save": SaveConfig(every=2, keep=9, take="best")})
    alone, together = RunDir(tmp_path / "alone"), RunDir(tmp_path / "together")
    train(ALONE, recipe, alone)
    on_ranks(2, tmp_path / "wire", partial(train, recipe=recipe, run=together))
    assert capfd.readouterr().err.count(f"Taken: the weights of step {best},") == 2
    assert gap(alone, together) < 1e-5


def test_a_restored_model_is_gathered_anew_and_a_layer_is_let_go_when_it_has_computed(
    tmp_path: Path, tiny_folder: Any
) -> None:
    recipe = recipe_for(tiny_folder(), until=2)
    train(ALONE, recipe, run := RunDir(tmp_path / "run"))

    def look(ranks: Ranks) -> tuple[Any, ...]:
        policy = open_policy(recipe)
        engine = open_engine(policy, recipe)
        if ranks.size > 1:
            policy.shard(ranks)
        layers, let_go = decoder_of(policy.model).layers, list[bool]()
        layers[1].register_forward_hook(lambda *_: let_go.append(isinstance(next(layers[0].parameters()), DTensor)))
        engine.update(policy)  # the head stays gathered
        policy.restore(run.checkpoint(2))
        (found_T,) = policy_logprobs(policy, rendered((9,)), [((7, 80, 90), (), "")])
        engine.update(policy)
        return found_T, engine.generate(rendered((9, 4)), 2, Sampling(1.0, 5, 3)), let_go

    whole_T, drawn, _ = look(ALONE)
    for found_T, its, let_go in on_ranks(2, tmp_path / "wire", look):
        assert torch.allclose(found_T, whole_T, atol=1e-5)
        assert [[one.token_ids for one in own] for own in its] == [[one.token_ids for one in own] for own in drawn]
        assert let_go == [True]


def test_slices_come_back_whole_however_they_divide(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1), nn.Linear(1, 6))  # 5 and 1 leave a rest, 6 does not
    expected = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def cut(ranks: Ranks) -> dict[str, torch.Tensor]:
        slices = shard(model, [model[0]], ranks)
        for name, weight in slices.items():
            own = slice_like(weight, expected[name]).to_local()
            assert torch.equal(own, weight.to_local())  # type: ignore[operator]
            assert own.untyped_storage().nbytes() == own.nbytes
        write_shards(tmp_path / "shards", {WEIGHT + name: weight.detach() for name, weight in slices.items()}, ranks)
        return unite(slices, ranks)

    united, *others = on_ranks(3, tmp_path / "wire", cut)
    assert others == [{}, {}]
    for found in (united, read_weights(tmp_path / "shards")):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_recipe_says_what_cannot_be_sharded() -> None:
    for knobs, sentence in (
        ({"full": False}, "leave it at auto"),
        ({"optimizer": "adamw8bit"}, "leaves a rank slices"),
    ):
        with pytest.raises(ValidationError, match=sentence):
            Recipe(train=TrainConfig(**{"shard": "on", "full": True, **knobs}))


def test_only_full_training_on_several_ranks_is_sharded_and_only_for_an_engine_with_a_copy_of_its_own() -> None:
    model = build_model()

    def sharded(ranks: int = 2, engine: str = "auto", **train: Any) -> bool:
        config = TrainConfig(**{"full": True, **train})
        return shards(Recipe(train=config, rollout=RolloutConfig(engine=engine)), model, "cpu", ranks)

    assert sharded()
    assert not any((sharded(1), sharded(full=False), sharded(shard="off"), sharded(optimizer="adamw8bit")))
    assert not sharded(engine="transformers")
    with pytest.raises(RecipeError, match="needs rollout"):
        sharded(engine="transformers", shard="on")


def test_a_plan_counts_this_rank_s_part_of_what_is_sharded() -> None:
    config = build_model().config
    recipe = Recipe(train=TrainConfig(full=True))
    one, four = (make_plan(config, recipe, Device("cpu", torch.float32, 1 << 30, ranks=ranks), 20) for ranks in (1, 4))
    for name in ("weights", "optimizer", "gradients"):
        assert four.line(name) == one.line(name) // 4 > 0
    assert one.line("gathered layer") == 0 < four.line("gathered layer")
    assert four.line("engine copies") == one.line("engine copies")


def test_an_index_that_names_a_function_is_not_called(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harm"),)

    (tmp_path / "index").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(pickle.UnpicklingError, match="does not hold"):
        names_of_shards(tmp_path)
    assert not (tmp_path / "harm").exists()


def test_memory_that_runs_out_in_a_shared_pass_halves_those_of_the_next_attempt() -> None:
    def work(parts: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(SharedPassError, match="goes on with passes of 256") as told:
        retry_on_oom(work, [], 512, clear=lambda: None, can_cut=False)
    assert told.value.exit_code == 75  # --nproc begins again


@pytest.mark.long
def test_a_sharded_job_whose_rank_is_killed_ends_as_the_undisturbed_one_and_is_merged_as_any(
    tmp_path: Path, tiny_folder: Any
) -> None:
    folders = [tmp_path / "undisturbed", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
        job = begin(folder, tiny_folder(), "--train.full", "true", "--max-restarts", "1", steps=12)
        if folder.name == "killed":
            wait_until(lambda folder=folder: len(steps_logged(folder)) > 6, job)
            os.kill(ranks_of(job)[1], signal.SIGKILL)
        code, errors = ended(job, folder)
        assert code == 0, errors
        assert "one part of 2" in errors
        assert errors.count("All ranks begin again at the newest checkpoint") == (folder.name == "killed")
        assert "Traceback" not in errors
        assert steps_logged(folder) == list(range(1, 13))
    saved = [hash_files(folder / "run" / "model") for folder in folders]
    assert saved[0] == saved[1]
    checkpoints = [hash_files(RunDir(folder / "run").checkpoint(12) / "shards") for folder in folders]
    assert set(checkpoints[0]) == {"__0_0.distcp", "__1_0.distcp", "index"}
    assert checkpoints[0] == checkpoints[1]
    run = RunDir(folders[1] / "run")
    evidence = read_evidence(run)
    result = next(link.facts for link in evidence.links if link.kind == "result")
    assert origin_step(run, run.path / "model", result, evidence) == 12
    command = [sys.executable, "-m", "minigrpo", "merge", "run"]
    done = subprocess.run(command, cwd=folders[1], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
