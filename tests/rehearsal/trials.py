"""What is rehearsed: each trial runs in a process of its own (stage.py) and returns what the tests compare, as JSON.

A trial goes through the code that a run goes through, on a pretended card and on the CPU: the recipe's `model.device`
is the only difference.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cards import Card
from minigrpo.config.load import load_recipe
from minigrpo.config.schema import AdapterConfig, ModelConfig, Recipe, RolloutConfig
from minigrpo.models import logprobs
from minigrpo.models.lora_linear import is_four_bit
from minigrpo.models.policy import Policy, open_policy, recompute_activations
from minigrpo.rollouts.engines import cuda_graph, kv_cache
from minigrpo.rollouts.engines.cuda_graph import SlotEngine
from minigrpo.rollouts.engines.native import NativeEngine
from minigrpo.rollouts.engines.registry import open_engine
from minigrpo.runs.logger import RunLogger
from minigrpo.runs.rundir import RunDir
from minigrpo.training import grpo
from minigrpo.training.memory.machine import plan_of, plan_of_run
from minigrpo.training.memory.meta import uniform_micro_batch
from minigrpo.training.memory.planner import largest_micro_batch
from minigrpo.types import Engine, Grade, Prompt, Sampling, Task
from tests.helpers.models import rendered, set_lora
from tests.rehearsal.allocations import counted
from tests.rehearsal.cards import pretended, pretended_mac
from tests.rehearsal.device import PretendedGpu
from tests.rehearsal.graphs import Graph, Stream

PROMPTS = (1, 40, 23, 7, 12)
ADAPTER_SIZES = (0.02, 0.05)
"""Entries of B in the two rounds of a trial: as after a few hundred steps of training, twice."""
ENGINE_NAMES = {"NativeEngine": "native", "SlotEngine": "slots", "TransformersEngine": "transformers"}


def engine_recipe(folder: str, device: str, dtype: str, engine: str) -> Recipe:
    return Recipe(
        model=ModelConfig(path=folder, device=device, dtype=dtype),  # type: ignore[arg-type]
        lora=AdapterConfig(rank=8, alpha=16),
        rollout=RolloutConfig(engine=engine, temperature=0.9),  # type: ignore[arg-type]
    )


def said(engine: Engine, *, limit: int = 40, n: int = 4, seed: int = 7) -> list[list[list[Any]]]:
    """Return token ids, log-probabilities and finish of each completion."""
    answers = engine.generate(rendered(PROMPTS), n, Sampling(0.9, limit, seed))
    return [[[list(c.token_ids), list(c.logprobs), c.finish] for c in own] for own in answers]


def two_rounds(recipe: Recipe) -> tuple[Policy, Engine, list[Any]]:
    """Sample, change the weights as an update would, and sample again: a recorded graph must read the new ones."""
    policy = open_policy(recipe)
    set_lora(policy, ADAPTER_SIZES[0])
    engine = open_engine(policy, recipe)
    rounds = []
    with patch.object(cuda_graph, "MIN_OWN_SLOTS", 16):  # several graphs within few tokens
        for size in ADAPTER_SIZES:
            set_lora(policy, size)
            engine.update(policy)
            rounds.append(said(engine))
    return policy, engine, rounds


@contextmanager
def as_on_a_gpu(device: str = "auto") -> Iterator[None]:
    """Let the native engine share prompts on the CPU, too: its other layout rounds otherwise in 16 bit. As on a Mac
    attention is then plain products.
    """
    plain = sdpa_kernel(SDPBackend.MATH) if device == "mps" else nullcontext()
    with patch.object(kv_cache, "MAX_COPIED_BYTES", 0), plain:
        yield


def machine(card: Card, guard: Path, device: str) -> AbstractContextManager[PretendedGpu]:
    """Pretend a machine with a GPU of that kind: a Mac, or one with two of the card."""
    return pretended_mac(guard) if device == "mps" else pretended(card, guard, count=2)


def engines(card: Card, guard: Path, *, folder: str, engine: str, dtype: str, device: str = "auto") -> dict[str, Any]:
    """Sample on the card and, with the same kind of engine and the same number type, on the CPU."""
    with machine(card, guard, device) as gpu:
        policy, opened, on_gpu = two_rounds(engine_recipe(folder, device, dtype, engine))
        name, kind = ENGINE_NAMES[type(opened).__name__], str(policy.dtype).removeprefix("torch.")
        found = {
            "engine": name,
            "device": str(policy.device),
            "dtype": kind,
            "launches": gpu.launches.total(),
            "graphs": len(Graph.made),
            "replays": sum(graph.replays for graph in Graph.made),
            "streams": len(Stream.made),
            "pools": len({id(graph.pool) for graph in Graph.made}),
            "modes": sorted({graph.mode for graph in Graph.made}),
        }
    with as_on_a_gpu(device):
        _, _, on_cpu = two_rounds(engine_recipe(folder, "cpu", kind, name))
    return {**found, "gpu": on_gpu, "cpu": on_cpu}


def choices(card: Card, guard: Path, *, recipe: str, folder: str, changes: Mapping[str, str]) -> dict[str, Any]:
    """Open policy and engine of a recipe on the card: which number type and which engine are taken?"""
    wanted = load_recipe(recipe, {**SMALL, "model.path": folder, **changes})
    with bitsandbytes_of_a_cpu() if "model.quantize" in changes else nullcontext(), pretended(card, guard):
        policy = open_policy(wanted)
        name = ENGINE_NAMES[type(open_engine(policy, wanted)).__name__]
        return {"dtype": str(policy.dtype).removeprefix("torch."), "engine": name}


def a_token(card: Card, guard: Path, *, folders: Mapping[int, str]) -> dict[str, Any]:
    """Count what a token costs. `folders`: one model by its number of layers, so that a layer's share can be told."""
    found: dict[str, Any] = {"slots": {}, "native": {}, "native_waits": {}, "kinds": {}}
    with pretended(card, guard) as gpu:
        for layers, folder in folders.items():
            policy = open_policy(engine_recipe(folder, "auto", "auto", "auto"))
            slots = SlotEngine(policy, stop_ids=[-1], rows=64)  # no row ends
            Graph.made.clear()
            said(slots, limit=4)
            gpu.reset()
            found["slots"][layers] = len(Graph.made[0].launches)
            found["kinds"][layers] = Counter(launch.function for launch in Graph.made[0].launches)
            native = NativeEngine(policy, stop_ids=[999], rows=64)
            longer, shorter = _counted(gpu, native, 5), _counted(gpu, native, 3)
            found["native"][layers] = (longer[0] - shorter[0]) / 2
            found["native_waits"][layers] = (longer[1] - shorter[1]) / 2
        said(slots, limit=64)
        gpu.reset()
        said(slots, limit=64)
        found["synchronizations"] = _sites(gpu.synchronizations)
        found["host_copies"] = _sites(gpu.host_copies)
    return found


def a_pass(card: Card, guard: Path, *, folders: Mapping[int, str]) -> dict[str, dict[int, int]]:
    """Count what a pass of training launches, forward and backward, by number of layers; with recomputation, too."""
    found: dict[str, dict[int, int]] = {"kept": {}, "recomputed": {}}
    with pretended(card, guard) as gpu:
        for layers, folder in folders.items():
            policy = open_policy(engine_recipe(folder, "auto", "auto", "auto"))
            for way in found:
                if way == "recomputed":
                    recompute_activations(policy.model)
                gpu.reset()
                policy.logprobs(uniform_micro_batch(8, 4, 10, vocabulary=260), step=0).logprobs_N.sum().backward()
                found[way][layers] = gpu.launches.total()
    return found


def _counted(gpu: PretendedGpu, engine: Engine, tokens: int) -> tuple[int, int]:
    """Return launches and synchronizations of a rollout."""
    gpu.reset()
    said(engine, limit=tokens)
    return gpu.launches.total(), gpu.synchronizations.total()


def _sites(counter: Mapping[tuple[str, str], int]) -> dict[str, int]:
    return {f"{where} ({what})": times for (what, where), times in sorted(counter.items())}


def shapes(card: Card, guard: Path, *, folder: str) -> dict[str, Any]:
    """Sample as training does, then as an evaluation, then as training again: count the graphs that are captured."""
    captured = []
    with pretended(card, guard):
        policy = open_policy(engine_recipe(folder, "auto", "auto", "slots"))
        engine = SlotEngine(policy, stop_ids=[3], rows=64)
        for n in (4, 1, 4, 1):
            Graph.made.clear()
            said(engine, n=n)
            captured.append(len(Graph.made))
    return {"captured": captured}


def freed_weights(card: Card, guard: Path, *, folder: str) -> list[Any]:
    """Take over new weights at new addresses, as an engine must not, and sample: what does a graph read then?"""
    from minigrpo.rollouts.engines import decoder

    with pretended(card, guard), patch.object(decoder, "copy_in_place", lambda old, new: new):
        policy = open_policy(engine_recipe(folder, "auto", "auto", "slots"))
        engine = SlotEngine(policy, stop_ids=[3], rows=64)
        said(engine)
        engine.decoder.refresh()  # not engine.update, which sees that addresses changed
        return said(engine)


def scoring(card: Card, guard: Path, *, folder: str) -> dict[str, Any]:
    """Score 40 tokens where a CPU would take one row of logits at a time and a GPU all: count the head's launches."""
    pieces = {"CHUNK_LOGITS": 260 * 2, "CACHED_LOGITS": 260, "GPU_CHUNK_LOGITS": 260 * 64}
    with pretended(card, guard) as gpu, patch.multiple(logprobs, **pieces):
        policy = open_policy(engine_recipe(folder, "auto", "auto", "auto"))
        gpu.reset()
        scores = policy.logprobs(uniform_micro_batch(8, 4, 10, vocabulary=260), step=0)
        launches = sum(n for (_, where), n in gpu.launches.items() if where.startswith("models/logprobs.py"))
        return {
            "tokens": len(scores.logprobs_N),
            "launches": launches,
            "synchronizations": _sites(gpu.synchronizations),
        }


MEMORY = {
    "rollout.prompts": "4",
    "rollout.completions": "4",
    "rollout.max_tokens": "80",
    "rollout.rows": "24",
    "eval.limit": "30",
    "eval.every": "1",
    "eval.held_out": "6",
    "lora.rank": "8",
    "train.steps": "1",
}
"""A run whose evaluations are larger than its steps, in two graphs each: of 64 and of 80 own slots."""


def memory(card: Card, guard: Path, *, folder: str) -> dict[str, Any]:
    """Sample, evaluate and update as a run does, and count what is asked of the allocator, beside the plan."""
    recipe = load_recipe("gsm8k-fast", {**MEMORY, "model.path": folder})
    lengths = (65, 40, 23, 12)

    def ask(engine: Engine, prompts: int, n: int, heat: float) -> None:
        engine.generate(rendered((lengths * prompts)[:prompts]), n, Sampling(heat, recipe.rollout.max_tokens, 7))

    with pretended(card, guard), counted() as allocations:
        policy = open_policy(recipe)
        engine = SlotEngine(policy, stop_ids=[-1], rows=recipe.rollout.rows)  # no row ends
        whole, updates = plan_of_run(policy, recipe, max(lengths)), plan_of(policy, recipe, max(lengths))
        assert whole is not None
        optimizer, held = grpo.open_optimizer(recipe.train, policy), allocations.now
        found: dict[str, Any] = {"held": held}
        part = largest_micro_batch(recipe.rollout, max(lengths), updates.tokens_per_pass, vocabulary=260)
        for _ in range(2):  # from the second on all gradients and moments are there
            allocations.reset()
            ask(engine, recipe.rollout.prompts, recipe.rollout.completions, recipe.rollout.temperature)
            ask(engine, recipe.eval.held_out, 1, 0.0)
            found |= {"rollouts": allocations.peak, "graphs": allocations.pool}
            allocations.reset()
            policy.logprobs(part, step=0).logprobs_N.sum().backward()
            policy.logprobs(part, step=0).logprobs_N.sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            found["update"] = allocations.peak
        found["kept"] = allocations.now
        allocations.reset()
        for heat in (0.0, 1.0):
            ask(engine, recipe.eval.limit, 1, heat)
        found |= {"evaluations": allocations.peak}
    plans = {"whole": whole, "updates": updates}
    return {"found": found, **{name: plan.to_dict() for name, plan in plans.items()}}


def pretence(card: Card, guard: Path, *, act: str) -> Any:
    """Do one thing that a GPU refuses, to see it refused."""
    if act == "float64 on a Mac":
        with pretended_mac(guard):
            return torch.ones(3, device="mps").double().tolist()
    with pretended(card, guard, count=2):
        x = torch.ones(3, device="cuda")
        if act == "mix with the CPU":
            return (x + torch.ones(3)).tolist()
        if act == "mix two cards":
            return (x + torch.ones(3, device="cuda:1")).tolist()
        if act == "a third card":
            return torch.cuda.set_device(2)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x * 2
            if act == "wait in a capture":
                return y.sum().item()
            if act == "copy in a capture":
                return (y + torch.tensor([1.0, 2.0, 3.0], device="cuda")).shape
            if act == "another card in a capture":
                return torch.ones(3, device="cuda:1").shape
            x.add_(1)
        before, unwritten = x.tolist(), y.tolist()
        graph.replay()
        return {"before": before, "unwritten": unwritten, "x": x.tolist(), "y": y.tolist()}


def letters() -> Task:
    """Reward: the share of small letters. Even random weights earn some, and some more than others."""

    def prompts(split: str) -> list[Prompt]:
        return [Prompt(f"{split}-{i}", ({"role": "user", "content": f"say {i}"},)) for i in range(20)]

    def grade(prompt: Prompt, text: str) -> Grade:
        return Grade(sum(letter.islower() for letter in text) / 8)

    return Task("letters", prompts, grade)


SMALL = {
    "rollout.prompts": "3",
    "rollout.completions": "4",
    "rollout.max_tokens": "12",
    "rollout.rows": "64",
    "train.steps": "2",
    "train.tokens_per_pass": "90",
    "save.every": "1",
    "save.keep": "2",
}
"""What makes a packaged recipe's step small; its number type, objective and way of training stay."""


@contextmanager
def bitsandbytes_of_a_cpu() -> Iterator[None]:
    """Let a pretended GPU's tensors be packed by bitsandbytes' code for CPUs."""
    from tests.rehearsal.four_bit import four_bit_weights  # not before it is needed: a second

    with four_bit_weights():
        yield


class UpdateCosts:
    """Counts what each update costs, around grpo's own function."""

    def __init__(self, gpu: PretendedGpu) -> None:
        self.gpu, self.update, self.costs = gpu, grpo.update_policy, list[dict[str, Any]]()

    def __call__(self, *args: Any, **named: Any) -> Any:
        self.gpu.reset()
        found = self.update(*args, **named)
        counters = {name: getattr(self.gpu, name) for name in ("launches", "synchronizations", "host_copies")}
        passes = len(list(args[3].split(args[4].tokens_per_pass)))
        sites = {name: _sites(counters[name]) for name in ("synchronizations", "host_copies")}
        packing = {what for what, _ in counters["launches"] if what.startswith("bitsandbytes.")}
        launches = counters["launches"].total()
        self.costs.append({"passes": passes, "launches": launches, "bitsandbytes": sorted(packing), **sites})
        return found


def train(card: Card, guard: Path, *, recipe: str, folder: str, changes: Mapping[str, str]) -> dict[str, Any]:
    """Train for two steps on the card, again from the checkpoint after the first, and one step on the CPU."""
    knobs = {**SMALL, "model.path": folder, **changes}
    packs = {"model.quantize", "train.optimizer"} & knobs.keys()
    home = Path(tempfile.mkdtemp(prefix="minigrpo-rehearsal-"))
    try:
        with bitsandbytes_of_a_cpu() if packs else nullcontext(), pretended(card, guard) as gpu:
            costs = UpdateCosts(gpu)
            with patch.object(grpo, "update_policy", costs):
                policy, engine = train_once(load_recipe(recipe, knobs), home / "whole")
            resumed = home / "resumed"
            shutil.copytree(home / "whole", resumed)
            shutil.rmtree(resumed / "checkpoints" / "000002")
            train_once(load_recipe(recipe, knobs), resumed)
            dtype = str(policy.dtype).removeprefix("torch.")
            packed = sum(is_four_bit(layer) for layer in policy.model.modules() if not hasattr(layer, "base_layer"))
        here = {"model.device": "cpu", "model.dtype": dtype, "rollout.engine": engine}
        with as_on_a_gpu():
            train_once(load_recipe(recipe, {**knobs, **here, "train.steps": "1"}), home / "cpu")
        rows = {name: steps_of(home / name) for name in ("whole", "resumed", "cpu")}
        scale = policy.loss_scale.scale
        return {
            "engine": engine,
            "device": str(policy.device),
            "dtype": dtype,
            "scale": scale,
            "packed": packed,
            "updates": costs.costs,
        } | rows
    finally:
        shutil.rmtree(home)


def train_once(recipe: Recipe, folder: Path) -> tuple[Policy, str]:
    policy = open_policy(recipe)
    folder.mkdir(exist_ok=True)
    engine = open_engine(policy, recipe)
    grpo.grpo(recipe, letters(), policy, engine, RunLogger(RunDir(folder), recipe.train.steps))
    return policy, ENGINE_NAMES[type(engine).__name__]


def steps_of(folder: Path) -> dict[str, Any]:
    """Return the figures of each step, without times and memory, and the tokens that were sampled."""
    run = RunDir(folder)
    figures = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    groups = [json.loads(line) for line in run.groups.read_text(encoding="utf-8").splitlines()]
    measured = ("seconds", "memory_gb", "tokens_per_second", "time")
    return {
        "figures": [{k: v for k, v in step.items() if not k.startswith(measured)} for step in figures],
        "texts": [[completion["text"] for completion in group["completions"]] for group in groups],
    }


def notebook(card: Card, guard: Path, *, path: str, home: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Run a notebook's cells on the card, its commands in this process; return what each cell printed.

    `values`: of the cell of parameters. The install cell has tests of its own.
    """
    import nbformat
    from IPython.core.inputtransformer2 import TransformerManager

    os.chdir(home)
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    names: dict[str, Any] = {}
    told: dict[str, str] = {}
    packs = "model.quantize" in values["KNOBS"]
    with bitsandbytes_of_a_cpu() if packs else nullcontext(), pretended(card, guard) as gpu:
        names["get_ipython"] = lambda: SimpleNamespace(system=lambda line: print(command(line.format(**names))))
        for cell in cells:
            if cell.id == "install":
                continue
            with redirect_stdout(io.StringIO()) as out:
                exec(TransformerManager().transform_cell(cell.source), names)
                names |= values if "parameters" in cell.metadata.get("tags", ()) else {}
            told[cell.id] = out.getvalue()
        return {"told": told, "launches": gpu.launches.total()}


def command(line: str) -> str:
    """Run a command of minigrpo in this process and return what it said; refuse any exit code but 0."""
    from typer.testing import CliRunner

    from minigrpo.cli.main import app

    done = CliRunner().invoke(app, shlex.split(line)[1:])
    assert done.exit_code == 0, f"{line}\n{done.output}"
    return done.output


def benchmark(card: Card, guard: Path, *, scratch: str) -> dict[str, Any]:
    """Let the benchmarks prove, on the card, that both sides have one gradient and all engines the same tokens; the
    gradient with activations kept, and again with activations recomputed.
    """
    from benchmarks import gpu_checks, proof
    from benchmarks.workloads import WORKLOADS

    with pretended(card, guard) as gpu:
        setup = replace(gpu_checks.setup_of(WORKLOADS["mini"], Path(scratch), "cuda"), dtype="float32")
        tokens = list(gpu_checks.same_tokens(setup))
        gpu.reset()
        proofs = {"kept": asdict(proof.prove(setup))}
        with patch.object(proof, "must_recompute", lambda *_: True):
            proofs["recomputed"] = asdict(proof.prove(setup))
        return {"tokens": tokens, "proofs": proofs, "launches": gpu.launches.total()}


TRIALS: dict[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (
        engines,
        choices,
        a_token,
        a_pass,
        shapes,
        freed_weights,
        scoring,
        memory,
        pretence,
        train,
        notebook,
        benchmark,
    )
}
