"""Serve an artefact with an OpenAI-compatible server: find it, start the server, ask it one question, end it reliably.

Clients get what was trained: the model's own chat template, the temperature of training, and an untruncated
distribution unless a client asks for less.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.text import Text

from minigrpo.delivery.gguf.header import read_header
from minigrpo.delivery.serve.commands import (
    ServerCommand,
    VllmModel,
    docker_command,
    find_vllm,
    llama_command,
    reserve_port,
    vllm_command,
)
from minigrpo.delivery.serve.llama_server import API_KEY
from minigrpo.delivery.serve.resolve import NONSENSE, Servable, ServeOptions, no_template, resolve_servable
from minigrpo.delivery.serve.server import ServerProcess
from minigrpo.errors import MinigrpoError, command_line, more_at
from minigrpo.models.chat_template import PROBE_QUESTION, ChatTemplate, is_continued, turn_options, whole_answer
from minigrpo.runs.rundir import RunDir
from minigrpo.types import Message, Prompt, Task
from minigrpo.ui.progress import stage
from minigrpo.ui.screen import Screen

if TYPE_CHECKING:
    from minigrpo.types import Grade


@dataclass(frozen=True, slots=True)
class ServedAnswer:
    """A question and its answer. `reward` and `solved`: by the task, None for a question that is not the task's.
    `seconds`: for the request."""

    question: str
    answer: str
    reward: float | None
    solved: bool | None
    engine: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def ask_once(run: RunDir, *, format: str = "Q8_0", quiet: bool = False) -> ServedAnswer:
    """Serve the run's GGUF file with llama.cpp, ask one unseen problem of its task, and end the server."""
    options = ServeOptions(engine="llama.cpp", port=0, format=format)
    with run_server(resolve_servable(str(run.path), options), options, quiet=quiet) as (server, servable):
        return ask(server, servable)


@contextmanager
def run_server(
    servable: Servable, options: ServeOptions, *, quiet: bool = False
) -> Iterator[tuple[ServerProcess, Servable]]:
    """Start the server and yield it once it is healthy. Its log is RUN/serve.log."""
    command = server_command(servable, options)
    log = servable.run.path / "serve.log" if servable.run else None
    with stage(f"start {command.engine}", 0, Screen(stderr=True, quiet=quiet)) as report:
        server = ServerProcess(command, log=log, silence=options.wait, report=report)
    with server:
        yield server, servable


def server_command(servable: Servable, options: ServeOptions) -> ServerCommand:
    """Return the command line. Raises MinigrpoError where the engine is missing, the port taken or the context too
    long."""
    common: dict[str, Any] = {"host": options.host, "name": servable.name, "context": options.context}
    common |= {"temperature": servable.temperature, "parallel": options.parallel, "access": options.access}
    if servable.gguf:
        head = read_header(servable.gguf)
        return llama_command(head, **common, port=reserve_port(options.host, options.port), tools=options.llama_cpp)
    assert servable.model is not None
    python = find_vllm(options.vllm)
    if python is None:
        made = servable.run.path if servable.run else servable.model.source
        raise MinigrpoError(
            f"{servable.model.source} is served by vLLM, which is not installed. Install it in an environment of its "
            "own (pip install vllm), and name its python: --vllm ENV/bin/python. Or serve a GGUF file with llama.cpp: "
            f"{command_line('minigrpo', 'export', made)}"
        )
    return vllm_command(servable.model, **common, port=reserve_port(options.host, options.port), python=python)


# Asking


def ask(server: ServerProcess, servable: Servable, question: str | None = None) -> ServedAnswer:
    """Ask one question, greedily: the given one below the system message of the training, else the first unseen
    problem of the run's task, graded by the task."""
    from minigrpo.rollouts.grading import judge

    began = time.perf_counter()
    task, prompt = _choose_prompt(servable, question)
    template = _template_of(servable)
    asked = template.fold_system(prompt.messages)
    answer = server.client.chat(asked, max_tokens=answer_tokens(server.command, servable))
    whole = whole_answer(template.opening(prompt.messages), answer)
    grade: Grade | None = judge(task, prompt, whole) if task else None
    return ServedAnswer(
        question=prompt.messages[-1]["content"],
        answer=answer,
        reward=grade.reward if grade and grade.scored else None,
        solved=grade.solved if grade else None,
        engine=server.command.engine,
        seconds=time.perf_counter() - began,
    )


def answer_tokens(command: ServerCommand, servable: Servable) -> int:
    """Return the length of an answer in tokens: as in training, if half of the context holds it."""
    return min(servable.tokens, command.context // 2) if command.context else servable.tokens


def _template_of(servable: Servable) -> ChatTemplate:
    """Return the chat template that the artefact renders with, read from the files beside it."""
    places = [servable.run.adapter, servable.run.merged] if servable.run else []
    places += [Path(servable.model.source)] if servable.model else []
    return next((found for place in places if (found := ChatTemplate.beside(place)).text), ChatTemplate(None))


def template_warning(servable: Servable) -> str | None:
    """Return the sentence for a GGUF file without a chat template: llama.cpp then takes one of its own."""
    if servable.gguf is None or read_header(servable.gguf).template:
        return None
    return (
        f"WARNING: {no_template(servable.gguf)} Without it llama.cpp writes messages in a form of its own, and the "
        f"model may answer nonsense. {more_at(NONSENSE)}"
    )


def _choose_prompt(servable: Servable, question: str | None) -> tuple[Task | None, Prompt]:
    problem = _problem_of_the_run(servable)
    if question is None and problem:
        return problem
    message: Message = PROBE_QUESTION if question is None else {"role": "user", "content": question}
    # Without the system message that it was trained with, a model is asked something else than it learned to answer.
    system = [one for one in (problem[1].messages[:1] if problem else ()) if one["role"] == "system"]
    return None, Prompt("asked", (*system, message))


def _problem_of_the_run(servable: Servable) -> tuple[Task, Prompt] | None:
    """Return the run's task and its first unseen problem; None without a run, or where its file or data are gone."""
    from minigrpo.rollouts.groups import prompts_of
    from minigrpo.tasks.registry import open_task

    with suppress(MinigrpoError):
        if servable.recipe:
            task = open_task(servable.recipe)
            return task, prompts_of(task, "test", 1)[0]
    return None


# Showing


def _chat_body(command: ServerCommand, messages: Sequence[Message]) -> dict[str, Any]:
    more = turn_options(messages) if command.engine == "vllm" and is_continued(messages) else {}
    return {"model": command.model, "messages": [dict(message) for message in messages], **more}


def curl_command(command: ServerCommand, messages: Sequence[Message]) -> str:
    """Return a curl command, quoted for a POSIX shell."""
    body = json.dumps(_chat_body(command, messages), ensure_ascii=False)
    url = f"{command.url}/v1/chat/completions"
    # The shell puts in the key: it is never printed.
    key = f' -H "Authorization: Bearer ${API_KEY}"' if command.access.key else ""
    return f"{command_line('curl', url, '-H', 'Content-Type: application/json')}{key} {command_line('-d', body)}"


def python_snippet(command: ServerCommand, messages: Sequence[Message]) -> str:
    body = _chat_body(command, messages)
    more = {name: value for name, value in body.items() if name not in ("model", "messages")}
    arguments = f"model={command.model!r}, messages={body['messages']!r}" + (f", extra_body={more!r}" if more else "")
    head, key = "from openai import OpenAI\n", '"none"'
    if command.access.key:
        head, key = f"import os\n{head}", f'os.environ["{API_KEY}"]'
    return (
        f'{head}client = OpenAI(base_url="{command.url}/v1", api_key={key})\n'
        f"print(client.chat.completions.create({arguments}).choices[0].message.content)"
    )


def container_command(command: ServerCommand, servable: Servable, parallel: int | None = None) -> str | None:
    """Return the docker command of vLLM for a model that vLLM can serve; for a run's merged model also when
    llama.cpp serves its GGUF file. None for others."""
    run = servable.run
    model = servable.model or (VllmModel(str(run.merged)) if run and run.merged.is_dir() else None)
    return docker_command(command, model, servable.temperature, parallel) if model else None


# Serving


@dataclass(frozen=True, slots=True)
class ReadyServer:
    """A server that is up, or would be, and how to use it. `answer`: None where nothing was asked."""

    command: ServerCommand
    curl: str
    python: str
    docker: str | None
    log: str | None = None
    answer: ServedAnswer | None = None

    def to_dict(self) -> dict[str, Any]:
        server = {"engine": self.command.engine, "url": self.command.url, "model": self.command.model}
        lines = {"command": command_line(*self.command.program), "curl": self.curl, "docker": self.docker}
        asked = {"log": self.log, "answer": self.answer.to_dict() if self.answer else None}
        return {**server, "context": self.command.context, **lines, "python": self.python, **asked}


def plan_server(what: str, options: ServeOptions, question: str | None = None) -> ReadyServer:
    """Return what `serve` would start, without starting it."""
    servable = resolve_servable(what, options)
    return _describe_server(server_command(servable, options), servable, question, options.parallel)


def serve(
    what: str,
    options: ServeOptions,
    *,
    question: str | None = None,
    once: bool = False,
    tell: Callable[[ReadyServer], None],
) -> None:
    """Serve until Ctrl-C, or with `once` until the question is answered; call `tell` once the server is up and has
    answered.

    Returns when it was stopped. Raises MinigrpoError where the server does not start or ends by itself, and
    KeyboardInterrupt for Ctrl-C while it starts.
    """
    with sigterm_as_interrupt(), run_server(resolve_servable(what, options), options) as (server, servable):
        answer = ask(server, servable, question)
        log = str(server.log) if servable.run else None
        with suppress(KeyboardInterrupt):  # from here on Ctrl-C is the regular way to end it
            ready = _describe_server(server.command, servable, question, options.parallel)
            for warning in filter(None, (options.access.warning(options.host), template_warning(servable))):
                Screen(stderr=True).show(Text(warning, style="bold"))
            tell(replace(ready, log=log, answer=answer))
            if not once:
                server.watch()


def _describe_server(
    command: ServerCommand, servable: Servable, question: str | None, parallel: int | None
) -> ReadyServer:
    messages = tuple(_template_of(servable).fold_system(_choose_prompt(servable, question)[1].messages))
    docker = container_command(command, servable, parallel)
    return ReadyServer(command, curl_command(command, messages), python_snippet(command, messages), docker)


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM within the block, so that the server is ended in order."""

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


def _format_reward(reward: float | None) -> str:
    return "no reward" if reward is None else f"reward {reward:g}"


def ready_lines(ready: ReadyServer, *, stays: bool = True) -> RenderableType:
    """Show how to use the server; `stays`: it goes on running and can be asked more."""
    parts = [Text(f"{ready.command.engine} serves {ready.command.what} as {ready.command.model}", style="bold green")]
    if ready.answer:
        said = ready.answer
        verdict = (
            "" if said.solved is None else f"({'right' if said.solved else 'wrong'}, {_format_reward(said.reward)})"
        )
        parts += [Text(f"question: {said.question}"), Text(f"answer:   {said.answer}"), Text(verdict, style="dim")]
    told = {"Ask it:": ready.curl, "From Python:": ready.python} if stays else {}
    served = "" if ready.command.engine == "vllm" else "The merged model, by "
    told |= {f"{served}vLLM in a container:": ready.docker} if ready.docker and stays else {}
    for title, text in told.items():
        parts += [Text(f"\n{title}", style="dim"), Text(text)]
    if stays:
        parts.append(Text(f"\n{ready.command.url}  (Ctrl-C ends it)", style="bold"))
    return Stack(*parts)


def plan_lines(ready: ReadyServer) -> RenderableType:
    return Stack(*[Text(line) for line in (command_line(*ready.command.program), ready.docker) if line])
