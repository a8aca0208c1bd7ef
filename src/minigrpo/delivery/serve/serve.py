"""An artefact behind OpenAI's protocol: found, served, asked one question of its task, ended for certain.

Clients get what was trained: the chat template is the model's own, the temperature that of the training, and nothing is
cut off the distribution unless a client asks for it.
"""

from __future__ import annotations

import json
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.text import Text

from minigrpo.delivery.gguf.header import read_head
from minigrpo.delivery.serve.commands import (
    Model,
    ServerCommand,
    docker_line,
    find_vllm,
    llama_launch,
    reserve,
    vllm_launch,
)
from minigrpo.delivery.serve.resolve import Servable, ServeOptions, resolve_servable
from minigrpo.delivery.serve.server import ServerProcess
from minigrpo.errors import MinigrpoError
from minigrpo.models.chat_template import PROBE_QUESTION
from minigrpo.runs.rundir import RunDir
from minigrpo.types import Message, Prompt, Task
from minigrpo.ui.progress import stage

if TYPE_CHECKING:
    from minigrpo.types import Grade


@dataclass(frozen=True, slots=True)
class Answer:
    """`reward` and `solved`: by the task, None where the question is none of its own. `seconds`: from start to end."""

    question: str
    answer: str
    reward: float | None
    solved: bool | None
    engine: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def ask_once(run: RunDir, *, format: str = "Q8_0", quiet: bool = False) -> Answer:
    """Serve the run's GGUF file with llama.cpp, ask one unseen problem of its task, and end the server."""
    wanted = ServeOptions(engine="llama.cpp", port=0, format=format)
    with serving(resolve_servable(str(run.path), wanted), wanted, quiet=quiet) as (server, artefact):
        return ask(server, artefact)


@contextmanager
def serving(
    artefact: Servable, wanted: ServeOptions, *, quiet: bool = False
) -> Iterator[tuple[ServerProcess, Servable]]:
    """The server, up and well. Its log is RUN/serve.log."""
    launch = launch_of(artefact, wanted)
    log = artefact.run.path / "serve.log" if artefact.run else None
    with stage(f"start {launch.engine}", 0, Console(stderr=True, quiet=quiet)) as report:
        server = ServerProcess(launch, log=log, silence=wanted.wait, report=report)
    with server:
        yield server, artefact


def launch_of(artefact: Servable, wanted: ServeOptions) -> ServerCommand:
    """The command line. Raises MinigrpoError where the engine is missing, the port taken, the context too long."""
    common: dict[str, Any] = {"host": wanted.host, "name": artefact.name, "context": wanted.context}
    common["temperature"] = artefact.temperature
    if artefact.gguf:
        head = read_head(artefact.gguf)
        return llama_launch(head, **common, port=reserve(wanted.host, wanted.port), tools=wanted.llama_cpp)
    assert artefact.model is not None
    python = find_vllm(wanted.vllm)
    if python is None:
        raise MinigrpoError(
            f"{artefact.model.source} is served by vLLM, which is not installed. Install it in an environment of its "
            "own (pip install vllm), and name its python: --vllm ENV/bin/python. Or serve a GGUF file with llama.cpp: "
            f"minigrpo export {artefact.run.path if artefact.run else artefact.model.source}"
        )
    return vllm_launch(artefact.model, **common, port=reserve(wanted.host, wanted.port), python=python)


# Asking


def ask(server: ServerProcess, artefact: Servable, question: str | None = None) -> Answer:
    """One question, greedily: the given one, else the first unseen one of the run's task, graded by it."""
    from minigrpo.rollouts.grading import judge

    began = time.perf_counter()
    task, prompt = _asked(artefact, question)
    answer = server.client.chat(prompt.messages, max_tokens=room(server.launch, artefact))
    grade: Grade | None = judge(task, prompt, answer) if task else None
    return Answer(
        question=prompt.messages[-1]["content"],
        answer=answer,
        reward=grade.reward if grade and grade.scored else None,
        solved=grade.solved if grade else None,
        engine=server.launch.engine,
        seconds=time.perf_counter() - began,
    )


def room(launch: ServerCommand, artefact: Servable) -> int:
    """Tokens for an answer: as many as in training, if half of the context holds them."""
    return min(artefact.tokens, launch.context // 2) if launch.context else artefact.tokens


def _asked(artefact: Servable, question: str | None) -> tuple[Task | None, Prompt]:
    from minigrpo.rollouts.groups import prompts_of
    from minigrpo.tasks.registry import open_task

    if question is None and artefact.recipe:
        with suppress(MinigrpoError):  # its file or data may be gone: the plain question tells as well that it speaks
            task = open_task(artefact.recipe)
            return task, prompts_of(task, "test", 1)[0]
    message: Message = PROBE_QUESTION if question is None else {"role": "user", "content": question}
    return None, Prompt("asked", (message,))


# Showing


def body_of(launch: ServerCommand, messages: tuple[Message, ...] | list[Message]) -> dict[str, Any]:
    return {"model": launch.model, "messages": [dict(message) for message in messages]}


def curl_line(launch: ServerCommand, messages: tuple[Message, ...]) -> str:
    """For a POSIX shell, whatever stands in the messages."""
    body = json.dumps(body_of(launch, messages), ensure_ascii=False)
    url = f"{launch.url}/v1/chat/completions"
    return shlex.join(["curl", url, "-H", "Content-Type: application/json", "-d", body])


def python_lines(launch: ServerCommand, messages: tuple[Message, ...]) -> str:
    asked = f"model={launch.model!r}, messages={[dict(message) for message in messages]!r}"
    return (
        "from openai import OpenAI\n"
        f'client = OpenAI(base_url="{launch.url}/v1", api_key="none")\n'
        f"print(client.chat.completions.create({asked}).choices[0].message.content)"
    )


def container_line(launch: ServerCommand, artefact: Servable) -> str | None:
    """vLLM's docker line, for what vLLM could serve: a run's merged model, too, when llama.cpp serves its file."""
    run = artefact.run
    model = artefact.model or (Model(str(run.merged)) if run and run.merged.is_dir() else None)
    return docker_line(launch, model, artefact.temperature) if model else None


# Serving


@dataclass(frozen=True, slots=True)
class Ready:
    """A server that is up, or would be, and what to do with it. `answer`: None where nothing was asked."""

    launch: ServerCommand
    curl: str
    python: str
    docker: str | None
    log: str | None = None
    answer: Answer | None = None

    def to_dict(self) -> dict[str, Any]:
        launch = {"engine": self.launch.engine, "url": self.launch.url, "model": self.launch.model}
        lines = {"command": shlex.join(self.launch.program), "curl": self.curl, "docker": self.docker}
        asked = {"log": self.log, "answer": self.answer.to_dict() if self.answer else None}
        return {**launch, "context": self.launch.context, **lines, "python": self.python, **asked}


def planned(what: str, wanted: ServeOptions, question: str | None = None) -> Ready:
    """What `serve` would start, without starting it."""
    artefact = resolve_servable(what, wanted)
    return _ready(launch_of(artefact, wanted), artefact, question)


def serve(
    what: str, wanted: ServeOptions, *, question: str | None = None, once: bool = False, tell: Callable[[Ready], None]
) -> None:
    """Serve until Ctrl-C, or with `once` until the question is answered; `tell` is called when it is up and has spoken.

    Returns when it was stopped. Raises MinigrpoError where it does not come up or ends by itself, and KeyboardInterrupt
    with Ctrl-C while it starts.
    """
    with terminated(), serving(resolve_servable(what, wanted), wanted) as (server, artefact):
        answer = ask(server, artefact, question)
        log = str(server.log) if artefact.run else None
        with suppress(KeyboardInterrupt):  # from here on it is the way to end it
            tell(replace(_ready(server.launch, artefact, question), log=log, answer=answer))
            if not once:
                server.watch()


def _ready(launch: ServerCommand, artefact: Servable, question: str | None) -> Ready:
    messages = _asked(artefact, question)[1].messages
    lines = curl_line(launch, messages), python_lines(launch, messages), container_line(launch, artefact)
    return Ready(launch, *lines)


@contextmanager
def terminated() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that its server is ended in order."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def amount(reward: float | None) -> str:
    return "no reward" if reward is None else f"reward {reward:g}"


def ready_lines(ready: Ready, *, stays: bool = True) -> RenderableType:
    """What a person reads when the server is up; `stays`: it can be asked more."""
    parts = [Text(f"{ready.launch.engine} serves {ready.launch.what} as {ready.launch.model}", style="bold green")]
    if ready.answer:
        said = ready.answer
        verdict = "" if said.solved is None else f"({'right' if said.solved else 'wrong'}, {amount(said.reward)})"
        parts += [Text(f"question: {said.question}"), Text(f"answer:   {said.answer}"), Text(verdict, style="dim")]
    told = {"Ask it:": ready.curl, "From Python:": ready.python} if stays else {}
    told |= {"vLLM in a container:": ready.docker} if ready.docker else {}
    for title, text in told.items():
        parts += [Text(f"\n{title}", style="dim"), Text(text)]
    if stays:
        parts.append(Text(f"\n{ready.launch.url}  (Ctrl-C ends it)", style="bold"))
    return Stack(*parts)


def planned_lines(ready: Ready) -> RenderableType:
    return Stack(*[Text(line) for line in (shlex.join(ready.launch.program), ready.docker) if line])
