"""Decoding alone: completion tokens a second of one model at so many rows, in turns with other engines.

    python -m benchmarks.decoding FOLDER --rows 1 4 16 64

native        minigrpo's engine
transformers  `generate` of the same weights, in the same process
llama.cpp     its server (xllamacpp), with as many slots as rows, on GGUF files of the same folder: one type each

All sample one short prompt at temperature 1, end nothing early, and work on the same number of threads. What is timed
is the difference between a long and a short rollout, so reading prompts, HTTP and loading count for none of them.
native and transformers have an adapter of rank 8 beside the weights, as in training; llama.cpp has none.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.machine import describe
from minigrpo.config.load import load_recipe
from minigrpo.delivery.gguf.converter import find_converter
from minigrpo.delivery.gguf.quantize import quantise
from minigrpo.errors import MinigrpoError
from minigrpo.models.chat_template import render
from minigrpo.models.policy import Policy, open_policy
from minigrpo.rollouts.engines.native import NativeEngine
from minigrpo.types import Prompt, Rendered, Sampling

Rollout = Callable[[int, int], None]
"""rollout(rows, tokens): sample so many completions of so many tokens."""
QUESTION = Prompt("decoding", ({"role": "user", "content": "Count from one to a thousand, in words."},))
SHORT = 2
"""Tokens of the rollout whose time is subtracted."""


def native(policy: Policy, asked: Rendered) -> Rollout:
    """Return a rollout by minigrpo's engine, which ends at no token."""
    engine = NativeEngine(policy, stop_ids=[-1], rows=1024, blocks=True)
    return lambda rows, tokens: _check(
        [len(done.token_ids) for done in engine.generate([asked], rows, Sampling(1.0, tokens, seed=1))[0]], tokens
    )


def transformers(policy: Policy, asked: Rendered) -> Rollout:
    """Return a rollout by `generate`, as quick as it comes: plain sampling, its default cache."""

    @torch.no_grad()
    def rollout(rows: int, tokens: int) -> None:
        ids_BT = torch.tensor([asked.ids]).expand(rows, -1)
        options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        options |= {"min_new_tokens": tokens, "max_new_tokens": tokens}
        with policy.plain_attention():
            answers_BT = policy.model.generate(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), **options)
        _check([answers_BT.shape[1] - len(asked.ids)], tokens)

    policy.model.eval()
    return rollout


def _check(lengths: Sequence[int], tokens: int) -> None:
    if set(lengths) != {tokens}:
        raise MinigrpoError(f"A completion of {tokens} tokens was asked for, and {sorted(set(lengths))} came")


@contextmanager
def llama_server(file: Path, asked: Rendered, slots: int, context: int, threads: int) -> Iterator[Rollout]:
    """Run llama.cpp's server in a process of its own, at its own defaults but for slots, context and threads."""
    ours, its = multiprocessing.get_context("spawn").Pipe()
    options = (str(file), slots, slots * context, threads)
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(its, options), daemon=True)
    process.start()
    try:
        if not ours.poll(120):
            raise MinigrpoError(f"llama.cpp's server did not start on {file}")
        url = ours.recv()

        def one(tokens: int) -> int:
            body = {"prompt": list(asked.ids), "n_predict": tokens, "ignore_eos": True, "temperature": 1.0}
            body |= {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "cache_prompt": False}
            request = urllib.request.Request(f"{url}/completion", json.dumps(body).encode())
            request.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(request, timeout=600) as answer:
                return int(json.load(answer)["timings"]["predicted_n"])

        def rollout(rows: int, tokens: int) -> None:
            with ThreadPoolExecutor(rows) as pool:
                _check(list(pool.map(one, [tokens] * rows)), tokens)

        yield rollout
    finally:
        process.kill()
        process.join()


def _serve(pipe: Any, options: tuple[str, int, int, int]) -> None:
    import xllamacpp

    silence = os.open(os.devnull, os.O_WRONLY)  # it logs every request
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.n_ctx, threads = options
    params.hostnames, params.port, params.n_predict = ["127.0.0.1"], 0, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    pipe.send(server.listening_address)
    pipe.recv()  # until it is killed


def gguf_files(folder: Path, scratch: Path, kinds: Sequence[str]) -> dict[str, Path]:
    """Write the folder as GGUF, once for each kind."""
    converter, files = find_converter(folder, None), {}
    for kind in kinds:
        files[kind] = scratch / f"{kind}.gguf"
        if kind in ("F32", "F16", "BF16"):
            converter.convert(folder, files[kind], kind, "decoding")
            continue
        source = files.get("BF16") or gguf_files(folder, scratch, ["BF16"])["BF16"]
        quantise(source, files[kind], kind, None)
    return files


def compare(rollouts: dict[str, Rollout], rows: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Return tokens a second of each engine, which take turns: median, least and most."""
    rates: dict[str, list[float]] = {name: [] for name in rollouts}
    for turn in range(repeats):
        for name, rollout in rollouts.items() if turn % 2 else reversed(rollouts.items()):
            seconds = []
            for length in (SHORT, SHORT + tokens):
                began = time.perf_counter()
                rollout(rows, length)
                seconds.append(time.perf_counter() - began)
            rates[name].append(rows * tokens / max(seconds[1] - seconds[0], 1e-9))
    return [
        {"engine": name, "rows": rows, "tokens_per_second": median(taken), "least": min(taken), "most": max(taken)}
        for name, taken in rates.items()
    ]


def main(args: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=__doc__.split("\n\n")[0])
    p.add_argument("folder", type=Path, help="a model folder")
    p.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64])
    p.add_argument("--tokens", type=int, default=64, help="tokens of each completion that are timed")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--gguf", nargs="*", default=["BF16", "Q8_0"], help="types of llama.cpp's files; none: without it")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--out", type=Path, help="a JSON file for what was measured")
    given = p.parse_args(args)
    torch.set_num_threads(given.threads)
    rows_of_table: list[dict[str, Any]] = []
    policy = open_policy(load_recipe("gsm8k-fast", {"model.path": str(given.folder), "lora.rank": "8"}))
    asked = render(policy.tokenizer, QUESTION)
    context = len(asked.ids) + SHORT + given.tokens + 8
    with tempfile.TemporaryDirectory() as scratch:
        files = gguf_files(given.folder, Path(scratch), given.gguf)
        for rows in given.rows:
            with ExitStack() as stack:
                rollouts: dict[str, Rollout] = {make.__name__: make(policy, asked) for make in (native, transformers)}
                for kind, file in files.items():
                    server = llama_server(file, asked, rows, context, given.threads)
                    rollouts[f"llama.cpp {kind}"] = stack.enter_context(server)
                for found in compare(rollouts, rows, given.tokens, given.repeats):
                    rows_of_table.append(found)
                    span = f"({found['least']:.1f} - {found['most']:.1f})"
                    print(
                        f"{rows:4} rows  {found['engine']:16} {found['tokens_per_second']:8.1f} tokens/s  {span}",
                        flush=True,
                    )
    told = {
        "machine": str(describe(given.threads)),
        "dtype": str(policy.dtype),
        "rates": rows_of_table,
    }
    print(told["machine"], told["dtype"])
    if given.out:
        given.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except MinigrpoError as fault:
        sys.exit(str(fault))
