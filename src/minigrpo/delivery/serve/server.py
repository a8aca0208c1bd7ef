"""OpenAI-compatible servers of a model: a client that queries one, and a process that is started and reliably ended.

    with serve_gguf(file) as server:
        server.chat([{"role": "user", "content": "What is 2 + 2?"}])

A server runs below a process guard (serve/process_guard.py), which ends it when this process is gone, for whatever
reason. If a server ends or falls silent, the error shows the last lines of its log.

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

from minigrpo.delivery.gguf.header import read_header
from minigrpo.delivery.serve.commands import (
    LOCALHOST,
    EngineName,
    ServerCommand,
    llama_command,
    process_guard_file,
    reserve_port,
)
from minigrpo.delivery.serve.llama_server import API_KEY
from minigrpo.errors import MinigrpoError
from minigrpo.models.chat_template import TAG_OPENED_AT_END, is_continued, turn_options
from minigrpo.runs.rundir import make_folder
from minigrpo.types import Message
from minigrpo.ui.progress import Report, no_report
from minigrpo.utils.http import StatusError, exchange

if TYPE_CHECKING:
    from torch import Tensor

STARTUP_SILENCE_S = 600.0
"""Seconds that a server may write nothing while it starts."""
SHUTDOWN_TIMEOUT_S = 25.0
"""Seconds for the process guard to end the server; the guard itself needs at most two thirds of that."""
LOG_TAIL_LINES = 12
"""Lines of the log that are shown when a server ends by itself."""
LOG_ERROR = re.compile(r"\b\w*Error: | E \w+")
"""A log line that reports an error, as Python and llama.cpp write it."""
MIN_LOGPROB = -200.0
"""Log-probability of tokens that a server rounds to impossible."""


class ServerClient:
    """A client of a running server, over HTTP. It knows an address and a model's name, and owns no process.

    `gone`: returns the error for a server that does not answer, given when that was; by default it names the address.
    `key`: sent with each request.
    """

    def __init__(
        self,
        url: str,
        engine: EngineName,
        model: str,
        *,
        key: str | None = None,
        gone: Callable[[str], MinigrpoError] | None = None,
    ) -> None:
        self.url, self.engine, self.model = url, engine, model
        self._key = key
        self._error_when_gone = gone or self._absent

    @classmethod
    def at(cls, address: str) -> ServerClient:
        """Connect to a server that somebody else started and will end, with the key in MINIGRPO_API_KEY, where it is
        set. Raises MinigrpoError where none answers."""
        parts = urlsplit(address if "//" in address else f"http://{address}")
        url = f"{parts.scheme}://{parts.netloc}"
        key = os.environ.get(API_KEY) or None
        model = cls(url, "llama.cpp", "", key=key).ask("/v1/models")["data"][0]
        # Only llama.cpp reports "meta" (its vocabulary size) there.
        return cls(url, "llama.cpp" if "meta" in model else "vllm", str(model["id"]), key=key)

    def chat(
        self, messages: Sequence[Message], *, temperature: float = 0.0, max_tokens: int = 256, seed: int = 0
    ) -> str:
        """Return the answer's text, including any markup for thinking; of an answer that the last message begins, the
        rest. Raises MinigrpoError where llama.cpp would not continue it as training did."""
        if self.engine == "llama.cpp" and is_continued(messages):
            self.render_text(messages)
        payload = {"model": self.model, "messages": [dict(message) for message in messages], **self.options(messages)}
        reply = self.ask(
            "/v1/chat/completions", {**payload, "temperature": temperature, "max_tokens": max_tokens, "seed": seed}
        )
        said = str(reply["choices"][0]["message"]["content"] or "")
        return said.removeprefix(str(messages[-1]["content"])) if is_continued(messages) else said

    def options(self, messages: Sequence[Message]) -> dict[str, bool]:
        """Return what a request must say so that an answer that the last message begins is continued.

        llama.cpp continues by itself.
        """
        return turn_options(messages) if self.engine == "vllm" and is_continued(messages) else {}

    def tokenize(self, text: str, *, special: bool = False) -> tuple[int, ...]:
        """Return token ids; names of special tokens in the text are parsed. `special`: with the beginning that the
        model asks for."""
        if self.engine == "llama.cpp":
            return tuple(
                self.ask("/tokenize", {"content": text, "add_special": special, "parse_special": True})["tokens"]
            )
        payload = {"model": self.model, "prompt": text, "add_special_tokens": special}
        return tuple(self.ask("/tokenize", payload)["tokens"])

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return a conversation's token ids, rendered by the server's own chat template with its answer opened, or
        continued where the last message begins it."""
        if self.engine == "llama.cpp":
            return self.tokenize(self.render_text(messages), special=True)
        payload = {"model": self.model, "messages": [dict(message) for message in messages]}
        return tuple(self.ask("/tokenize", {**payload, **turn_options(messages)})["tokens"])

    def render_text(self, messages: Sequence[Message]) -> str:
        """Return the text that llama.cpp renders. Raises MinigrpoError where it does not continue the last message as
        training did."""
        payload = {"model": self.model, "messages": [dict(message) for message in messages]}
        text = str(self.ask("/apply-template", payload)["prompt"])
        if is_continued(messages):
            begun = str(messages[-1]["content"])
            if not text.endswith(begun):
                raise MinigrpoError(
                    f"This llama.cpp closes the assistant's message {begun[:40]!r} in place of continuing it. Use a "
                    "newer one, without --no-prefill-assistant."
                )
            if opened := TAG_OPENED_AT_END.search(text.removesuffix(begun)):
                raise MinigrpoError(
                    f"llama.cpp puts the assistant's message {begun[:40]!r} after the {opened[0].strip()} that the "
                    "chat template opens, and training did not. Serve the merged model with vLLM, or begin no answer."
                )
        return text

    def chat_template(self) -> str | None:
        """Return the chat template of llama.cpp's file; None where the server does not tell."""
        found = self.ask("/props").get("chat_template") if self.engine == "llama.cpp" else None
        return found if isinstance(found, str) else None

    def greedy(self, ids: Sequence[int], count: int) -> tuple[int, ...]:
        """Return the greedy continuation, up to `count` tokens; the token that ends an answer may be left out."""
        if self.engine == "llama.cpp":
            payload = {"prompt": list(ids), "n_predict": count, "temperature": 0, "return_tokens": True}
            return tuple(self.ask("/completion", {**payload, "cache_prompt": False})["tokens"])
        payload = {"model": self.model, "prompt": list(ids), "max_tokens": count, "temperature": 0}
        return tuple(self.ask("/v1/completions", {**payload, "return_token_ids": True})["choices"][0]["token_ids"])

    def logprobs(self, ids: Sequence[int], start: int) -> Tensor:
        """Return log-probabilities [N, V] in float32 of the tokens that follow each position from `start` on, as the
        server answers over HTTP.

        llama.cpp is asked once for each position. vLLM must have been started with `all_logprobs=True` (see
        `vllm_command`).
        """
        import torch

        if self.engine == "llama.cpp":
            pairs = [_llama_row(row) for row in self._llama_rows(ids, start)]
        else:
            pairs = [_vllm_row(row) for row in self._vllm_rows(ids, start)]
        size = 1 + max(token for row in pairs for token in row)
        found_NV = torch.full((len(pairs), size), MIN_LOGPROB)
        for place, row in enumerate(pairs):
            found_NV[place, list(row)] = torch.tensor([max(value, MIN_LOGPROB) for value in row.values()])
        return found_NV

    def _llama_rows(self, ids: Sequence[int], start: int) -> Iterator[list[dict[str, Any]]]:
        size = self.ask("/v1/models")["data"][0]["meta"]["n_vocab"]
        # llama.cpp returns no probabilities where the sampled token ends the answer or is part of a character, so a
        # plain letter is forced. The probabilities do not depend on it.
        letter = [[self.tokenize("a")[0], 1e6]]
        fixed = {"n_predict": 1, "n_probs": size, "cache_prompt": False, "temperature": 0, "logit_bias": letter}
        for end in range(start + 1, len(ids) + 1):
            reply = self.ask("/completion", {**fixed, "prompt": list(ids[:end])})
            yield reply["completion_probabilities"][0]["top_logprobs"]

    def _vllm_rows(self, ids: Sequence[int], start: int) -> Iterator[dict[str, Any]]:
        """Yield the prompt's own probabilities. One token is appended to the prompt, so that its last position has
        one, too."""
        payload = {"model": self.model, "prompt": [*ids, ids[-1]], "max_tokens": 1, "temperature": 0}
        reply = self.ask("/v1/completions", {**payload, "prompt_logprobs": -1})
        yield from reply["choices"][0]["prompt_logprobs"][start + 1 :]

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send JSON and return the JSON answer. Raises MinigrpoError where the server refuses, with its own words,
        or is gone."""
        try:
            raw = exchange(self.url + path, body, key=self._key, direct=True)
        except StatusError as fault:
            words = _error_message(fault.raw)
            raise MinigrpoError(f"{self.engine} refuses what it is asked ({fault.code}): {words}") from None
        except OSError as fault:
            raise self._error_when_gone(f"while it answered ({fault})") from None
        return json.loads(raw) if raw else {}

    def is_healthy(self) -> bool:
        """Tell whether the server is healthy and serves our model: another server on that port does not."""
        try:
            exchange(f"{self.url}/health", timeout=5, direct=True)
            reply = json.loads(exchange(f"{self.url}/v1/models", timeout=5, key=self._key, direct=True))
            names = [model.get("id") for model in reply["data"]]
        except (OSError, StatusError, ValueError, KeyError):
            return False
        return self.model in names

    def _absent(self, when: str) -> MinigrpoError:
        return MinigrpoError(f"{self.url} does not answer {when}. Is the server up? minigrpo serve RUN")


class ServerProcess:
    """A server that runs until the block ends: `with ServerProcess(command) as client`. `client` queries it.

    `log`: its output; without one, a temporary file, shown only in errors. `silence`: seconds that it may write nothing
    while it starts. Raises MinigrpoError where it does not start.
    """

    def __init__(
        self,
        command: ServerCommand,
        *,
        log: Path | None = None,
        silence: float = STARTUP_SILENCE_S,
        report: Report = no_report,
    ) -> None:
        self.command = command
        self.client = ServerClient(command.url, command.engine, command.model, key=command.access.key, gone=self._ended)
        with _open_log(log) as stream:
            self.log = Path(stream.name)
            self._log_is_temporary = log is None
            self._guard = subprocess.Popen(
                [sys.executable, "-P", str(process_guard_file()), *command.program],
                env=command.access.environment(),
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_healthy(silence, report)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ServerClient:
        return self.client

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Return the process guard's process id, which is also the id of the whole process group."""
        return self._guard.pid

    @property
    def running(self) -> bool:
        return self._guard.poll() is None

    def close(self) -> None:
        """End the server and all that it started. May be called twice."""
        if self._guard.stdin:
            self._guard.stdin.close()
        try:
            self._guard.wait(SHUTDOWN_TIMEOUT_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C: end it at once
            self._kill()
            self._guard.wait()
        self._kill()
        if self._log_is_temporary:
            self.log.unlink(missing_ok=True)

    def _kill(self) -> None:
        """Kill the process guard's whole process group, including what outlived it."""
        with suppress(OSError):
            if os.name == "nt":
                self._guard.kill()
            else:
                os.killpg(self._guard.pid, signal.SIGKILL)

    def watch(self, every: float = 0.5) -> None:
        """Wait for the end: raises MinigrpoError when the server ends by itself, KeyboardInterrupt for Ctrl-C. Never
        returns."""
        while self.running:
            with suppress(subprocess.TimeoutExpired):
                self._guard.wait(every)
        raise self._ended("while it served")

    def _wait_until_healthy(self, silence: float, report: Report) -> None:
        """Wait until the server is healthy. Any output counts as a sign of life. Raises MinigrpoError if it ends or
        falls silent."""
        last_change, size, pause = time.monotonic(), -1, 0.01
        while not (self.client.is_healthy() and self.running):
            if not self.running:
                raise self._ended("while it started")
            now = self.log.stat().st_size
            if now != size:
                last_change, size = time.monotonic(), now
            if time.monotonic() - last_change > silence:
                raise MinigrpoError(
                    f"{self.command.engine} has said nothing for {silence:g} seconds and does not answer at "
                    f"{self.command.url}, so it was ended. For more patience: --wait {2 * silence:g}{self._tail()}"
                )
            report(0, 0, last_line(self.log))
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def _ended(self, when: str) -> MinigrpoError:
        with suppress(subprocess.TimeoutExpired):
            self._guard.wait(2.0)
        code = self._guard.poll()
        how = "does not answer" if code is None else f"ended {when} (code {code})"
        return MinigrpoError(f"The server of {self.command.what} ({self.command.engine}) {how}.{self._tail()}")

    def _tail(self) -> str:
        """Return the end of the log, after the first error in it: what follows an error is often only its
        consequence."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.is_file() else []
        first = next((line for line in lines[:-LOG_TAIL_LINES] if LOG_ERROR.search(line)), None)
        shown = [*([first, "..."] if first else []), *lines[-LOG_TAIL_LINES:]]
        where = "" if self._log_is_temporary else f" ({self.log})"
        return f"\nIts last lines{where}:\n" + "\n".join(f"    {line[:600]}" for line in shown) if shown else ""


@contextmanager
def _open_log(log: Path | None) -> Iterator[Any]:
    """Open a file that a child process may write to."""
    if log is None:
        with NamedTemporaryFile("w", prefix="minigrpo-serve-", suffix=".log", delete=False) as stream:
            yield stream
    else:
        make_folder(log.parent)
        with log.open("w", encoding="utf-8") as stream:
            yield stream


LINE_WIDTH = 60


def last_line(log: Path) -> str:
    """Return the last words that a server wrote, for a progress line."""
    with suppress(OSError), log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 2000))
        words = " ".join(stream.read().decode(errors="replace").split())
        return words if len(words) <= LINE_WIDTH else words[-LINE_WIDTH - 1 :].partition(" ")[2]
    return ""


def _error_message(raw: bytes) -> str:
    """Return a server's own words from a refusal, whichever way it puts them."""
    with suppress(ValueError, TypeError, KeyError):
        reply = json.loads(raw)
        reply = reply.get("error", reply)
        return str(reply["message"] if isinstance(reply, dict) else reply)[:500]
    return raw.decode(errors="replace")[:500]


def _llama_row(row: list[dict[str, Any]]) -> dict[int, float]:
    return {entry["id"]: float(entry["logprob"]) for entry in row}


def _vllm_row(row: dict[str, Any]) -> dict[int, float]:
    return {int(token): float(entry["logprob"]) for token, entry in row.items()}


def serve_gguf(
    file: Path, *, host: str = LOCALHOST, port: int = 0, context: int | None = None, exact: bool = True, **options: Any
) -> ServerProcess:
    """Start llama.cpp's server on one file and wait until it is healthy: `with serve_gguf(file) as server` queries it.

    `port`: 0 takes a free one. `context`: None takes what the model was made for, up to 4096 tokens. `exact`: keys and
    values in float32 and no flash attention, each of which alone moves log-probabilities by 0.005. `options`: of
    ServerProcess. Raises ArtifactError where the file is missing or truncated, MinigrpoError where llama.cpp is missing
    or refuses.
    """
    head = read_header(file)
    command = llama_command(head, host=host, port=reserve_port(host, port), context=context, exact=exact)
    return ServerProcess(command, **options)
