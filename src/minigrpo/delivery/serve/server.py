"""Servers of a model that speak OpenAI's protocol: a client that asks, a process that is started and surely ended.

    with serve_gguf(file) as server:
        server.chat([{"role": "user", "content": "What is 2 + 2?"}])

It runs below a keeper (serve/supervisor.py) that ends it when this process is gone, however it went. A server that ends
or falls silent is a sentence here, with the last lines of its log.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from minigrpo.delivery.gguf.header import read_head
from minigrpo.delivery.serve.commands import LOCAL, EngineName, ServerCommand, llama_launch, reserve, worker
from minigrpo.errors import MinigrpoError
from minigrpo.types import Message
from minigrpo.ui.progress import Report, no_report
from minigrpo.utils.http import StatusError, exchange

if TYPE_CHECKING:
    from torch import Tensor

SILENCE = 600.0
"""Seconds that a server may say nothing while it starts."""
GRACE = 25.0
"""Seconds for the keeper to end it; the keeper itself gives up after two thirds of that."""
LAST = 12
"""Lines of the log that are shown when a server ends by itself."""
ERROR = re.compile(r"\b\w*Error: | E \w+")
"""A line of a log that names a fault, as Python and as llama.cpp write it."""
FARTHEST = -200.0
"""Log-probability of what a server rounds to impossible."""


class ServerClient:
    """Asks a server that runs, over HTTP. It knows an address and the name of a model, and owns no process.

    `gone`: makes the error where nobody answers, from when that was; without it, the address is named.
    """

    def __init__(
        self, url: str, engine: EngineName, model: str, *, gone: Callable[[str], MinigrpoError] | None = None
    ) -> None:
        self.url, self.engine, self.model = url, engine, model
        self._gone = gone or self._absent

    @classmethod
    def at(cls, address: str) -> ServerClient:
        """Ask a server that somebody else started, and will end, what it is. Raises MinigrpoError without an answer."""
        parts = urlsplit(address if "//" in address else f"http://{address}")
        url = f"{parts.scheme}://{parts.netloc}"
        model = cls(url, "llama.cpp", "").ask("/v1/models")["data"][0]
        # Only llama.cpp tells there how many tokens it knows.
        return cls(url, "llama.cpp" if "meta" in model else "vllm", str(model["id"]))

    def chat(
        self, messages: Sequence[Message], *, temperature: float = 0.0, max_tokens: int = 256, seed: int = 0
    ) -> str:
        """The answer's text, markup for thinking and all."""
        asked = {"model": self.model, "messages": [dict(message) for message in messages]}
        found = self.ask(
            "/v1/chat/completions", {**asked, "temperature": temperature, "max_tokens": max_tokens, "seed": seed}
        )
        return str(found["choices"][0]["message"]["content"] or "")

    def tokenize(self, text: str, *, special: bool = False) -> tuple[int, ...]:
        """Token names in the text count as tokens. `special`: with the beginning that the model asks for."""
        if self.engine == "llama.cpp":
            return tuple(
                self.ask("/tokenize", {"content": text, "add_special": special, "parse_special": True})["tokens"]
            )
        asked = {"model": self.model, "prompt": text, "add_special_tokens": special}
        return tuple(self.ask("/tokenize", asked)["tokens"])

    def rendered(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """A conversation as the server's own chat template renders it, its answer opened, as token ids."""
        asked = {"model": self.model, "messages": [dict(message) for message in messages]}
        if self.engine == "llama.cpp":
            return self.tokenize(self.ask("/apply-template", asked)["prompt"], special=True)
        return tuple(self.ask("/tokenize", {**asked, "add_generation_prompt": True})["tokens"])

    def greedy(self, ids: Sequence[int], count: int) -> tuple[int, ...]:
        """The likeliest continuation, up to `count` tokens; the token that ends an answer may be left out."""
        if self.engine == "llama.cpp":
            asked = {"prompt": list(ids), "n_predict": count, "temperature": 0, "return_tokens": True}
            return tuple(self.ask("/completion", {**asked, "cache_prompt": False})["tokens"])
        asked = {"model": self.model, "prompt": list(ids), "max_tokens": count, "temperature": 0}
        return tuple(self.ask("/v1/completions", {**asked, "return_token_ids": True})["choices"][0]["token_ids"])

    def logprobs(self, ids: Sequence[int], start: int) -> Tensor:
        """[N, V] in float32: of what follows each token from `start` on, as the server answers over HTTP.

        llama.cpp is asked once a position. vLLM must have been started with `whole=True` (see `vllm_launch`).
        """
        import torch

        if self.engine == "llama.cpp":
            pairs = [_llama_row(row) for row in self._llama_rows(ids, start)]
        else:
            pairs = [_vllm_row(row) for row in self._vllm_rows(ids, start)]
        size = 1 + max(token for row in pairs for token in row)
        found_NV = torch.full((len(pairs), size), FARTHEST)
        for place, row in enumerate(pairs):
            found_NV[place, list(row)] = torch.tensor([max(value, FARTHEST) for value in row.values()])
        return found_NV

    def _llama_rows(self, ids: Sequence[int], start: int) -> Iterator[list[dict[str, Any]]]:
        size = self.ask("/v1/models")["data"][0]["meta"]["n_vocab"]
        # It tells nothing where the token taken ends the answer or is half a letter. Which one it is changes no row.
        letter = [[self.tokenize("a")[0], 1e6]]
        fixed = {"n_predict": 1, "n_probs": size, "cache_prompt": False, "temperature": 0, "logit_bias": letter}
        for end in range(start + 1, len(ids) + 1):
            found = self.ask("/completion", {**fixed, "prompt": list(ids[:end])})
            yield found["completion_probabilities"][0]["top_logprobs"]

    def _vllm_rows(self, ids: Sequence[int], start: int) -> Iterator[dict[str, Any]]:
        """The prompt's own probabilities, with one token more, so that the last position has one, too."""
        asked = {"model": self.model, "prompt": [*ids, ids[-1]], "max_tokens": 1, "temperature": 0}
        found = self.ask("/v1/completions", {**asked, "prompt_logprobs": -1})
        yield from found["choices"][0]["prompt_logprobs"][start + 1 :]

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Exchange JSON once. Raises MinigrpoError with the server's own words where it refuses, or is gone."""
        try:
            raw = exchange(self.url + path, body, direct=True)
        except StatusError as fault:
            words = _words(fault.raw)
            raise MinigrpoError(f"{self.engine} refuses what it is asked ({fault.code}): {words}") from None
        except OSError as fault:
            raise self._gone(f"while it answered ({fault})") from None
        return json.loads(raw) if raw else {}

    def is_well(self) -> bool:
        """Tell whether it is healthy, with our model under its name: another server on that port is not it."""
        try:
            exchange(f"{self.url}/health", timeout=5, direct=True)
            found = json.loads(exchange(f"{self.url}/v1/models", timeout=5, direct=True))
            names = [model.get("id") for model in found["data"]]
        except (OSError, StatusError, ValueError, KeyError):
            return False
        return self.model in names

    def _absent(self, when: str) -> MinigrpoError:
        return MinigrpoError(f"{self.url} does not answer {when}. Is the server up? minigrpo serve RUN")


class ServerProcess:
    """Runs a server, up and well until the block ends: `with ServerProcess(launch) as client`. `client` asks it.

    `log`: where it writes; without one, into a file that is shown if need be. `silence`: seconds that it may say
    nothing while it starts. Raises MinigrpoError where it does not come up.
    """

    def __init__(
        self, launch: ServerCommand, *, log: Path | None = None, silence: float = SILENCE, report: Report = no_report
    ) -> None:
        self.launch = launch
        self.client = ServerClient(launch.url, launch.engine, launch.model, gone=self._ended)
        with _written(log) as stream:
            self.log = Path(stream.name)
            self._passing = log is None
            self._keeper = subprocess.Popen(
                [sys.executable, "-P", str(worker()), "watch", *launch.program],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait(silence, report)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ServerClient:
        return self.client

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of its keeper, which leads the group of all that belongs to it."""
        return self._keeper.pid

    @property
    def running(self) -> bool:
        return self._keeper.poll() is None

    def close(self) -> None:
        """Ends it and all that it started. May be called twice."""
        if self._keeper.stdin:
            self._keeper.stdin.close()
        try:
            self._keeper.wait(GRACE)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C: at once, then
            self._kill()
            self._keeper.wait()
        self._kill()
        if self._passing:
            self.log.unlink(missing_ok=True)

    def _kill(self) -> None:
        """The keeper's whole group: also what outlived it."""
        with suppress(OSError):
            if os.name == "nt":
                self._keeper.kill()
            else:
                os.killpg(self._keeper.pid, signal.SIGKILL)

    def watch(self, every: float = 0.5) -> None:
        """Returns never: raises MinigrpoError when it ends by itself, KeyboardInterrupt with Ctrl-C."""
        while self.running:
            with suppress(subprocess.TimeoutExpired):
                self._keeper.wait(every)
        raise self._ended("while it served")

    def _wait(self, silence: float, report: Report) -> None:
        """Until it is well. Whatever it writes is a sign of life."""
        heard, size, pause = time.monotonic(), -1, 0.01
        while not (self.client.is_well() and self.running):
            if not self.running:
                raise self._ended("while it started")
            now = self.log.stat().st_size
            if now != size:
                heard, size = time.monotonic(), now
            if time.monotonic() - heard > silence:
                raise MinigrpoError(
                    f"{self.launch.engine} has said nothing for {silence:g} seconds and does not answer at "
                    f"{self.launch.url}, so it was ended. For more patience: --wait {2 * silence:g}{self._tail()}"
                )
            report(0, 0, last_line(self.log))
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def _ended(self, when: str) -> MinigrpoError:
        with suppress(subprocess.TimeoutExpired):
            self._keeper.wait(2.0)
        code = self._keeper.poll()
        how = "does not answer" if code is None else f"ended {when} (code {code})"
        return MinigrpoError(f"The server of {self.launch.what} ({self.launch.engine}) {how}.{self._tail()}")

    def _tail(self) -> str:
        """The end of the log, after the first error in it: what follows a fault is often only its echo."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.is_file() else []
        first = next((line for line in lines[:-LAST] if ERROR.search(line)), None)
        shown = [*([first, "..."] if first else []), *lines[-LAST:]]
        where = "" if self._passing else f" ({self.log})"
        return f"\nIts last lines{where}:\n" + "\n".join(f"    {line[:600]}" for line in shown) if shown else ""


@contextmanager
def _written(log: Path | None) -> Iterator[Any]:
    """A file that a child may write to."""
    if log is None:
        with NamedTemporaryFile("w", prefix="minigrpo-serve-", suffix=".log", delete=False) as stream:
            yield stream
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as stream:
            yield stream


def last_line(log: Path) -> str:
    """The last that a server wrote, for a progress line."""
    with suppress(OSError), log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 2000))
        lines = stream.read().decode(errors="replace").split()
        return " ".join(lines)[-60:]
    return ""


def _words(raw: bytes) -> str:
    """What a server says of a refusal, whichever way it puts it."""
    with suppress(ValueError, TypeError, KeyError):
        said = json.loads(raw)
        said = said.get("error", said)
        return str(said["message"] if isinstance(said, dict) else said)[:500]
    return raw.decode(errors="replace")[:500]


def _llama_row(row: list[dict[str, Any]]) -> dict[int, float]:
    return {entry["id"]: float(entry["logprob"]) for entry in row}


def _vllm_row(row: dict[str, Any]) -> dict[int, float]:
    return {int(token): float(entry["logprob"]) for token, entry in row.items()}


def serve_gguf(
    file: Path, *, host: str = LOCAL, port: int = 0, context: int | None = None, exact: bool = True, **options: Any
) -> ServerProcess:
    """Start llama.cpp's server of one file and wait until it is well: `with serve_gguf(file) as server` asks it.

    `port`: 0 takes a free one. `context`: None takes what the model was made for, up to 4096. `exact`: keys and values
    in float32 and no flash attention, each of which alone moves log-probabilities by 0.005. `options`: ServerProcess's.
    Raises ArtifactError where the file is missing or cut short, MinigrpoError where llama.cpp is missing or refuses.
    """
    head = read_head(file)
    launch = llama_launch(head, host=host, port=reserve(host, port), context=context, exact=exact)
    return ServerProcess(launch, **options)
