"""What the quickstart hands out answers as well through each line that it prints as it did in the run's own evaluation.

The programs themselves (llama-cli, Ollama) are not on every machine: what they would make of the same line and file is
asked of llama.cpp, with their prompts rendered here.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from minigrpo.cli import main
from minigrpo.config.load import load_recipe
from minigrpo.delivery.serve.server import ServerClient, serve_gguf
from minigrpo.rollouts.groups import prompts_of
from minigrpo.runs.rundir import RunDir, read_json
from minigrpo.tasks.registry import open_task
from minigrpo.types import Message, Prompt, Task

pytestmark = [pytest.mark.long, pytest.mark.extra("gguf"), pytest.mark.timeout(1200)]

QUESTIONS, MAY_DIFFER = 150, 2


@pytest.fixture(scope="module", name="run")
def quickstart_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir(tmp_path_factory.mktemp("printed") / "quickstart")
    with pytest.raises(SystemExit) as ended:
        main.main(["quickstart", "--run", str(run.path), "--eval.limit", str(QUESTIONS)])
    assert ended.value.code in (0, None)
    return run


@pytest.fixture(scope="module", name="server")
def llama_server(run: RunDir) -> Iterator[ServerClient]:
    with serve_gguf(gguf_of(run), context=1024) as client:
        yield client


def gguf_of(run: RunDir) -> Path:
    return next(run.gguf.glob("*-Q8_0.gguf"))


def task_of(run: RunDir) -> Task:
    return open_task(load_recipe(str(run.path)))


def own_rights(run: RunDir) -> int:
    answers = read_json(next(run.evals.glob("tuned-*-test.json")))["scores"]["answers"]
    assert len(answers) == QUESTIONS
    return sum(answer["solved"] for answer in answers)


def questions(task: Task) -> list[tuple[Prompt, list[Message]]]:
    """Return each prompt of the evaluation, and what a user would ask: the conversation without the system message."""
    return [
        (prompt, [message for message in prompt.messages if message["role"] != "system"])
        for prompt in prompts_of(task, "test", QUESTIONS)
    ]


def rights(run: RunDir, server: ServerClient, prompts: Sequence[tuple[Prompt, Any]]) -> int:
    """Count the right answers to prompts as text or token ids, greedily."""
    task, limit = task_of(run), load_recipe(str(run.path)).rollout.max_tokens
    told = [
        server.ask("/completion", {"prompt": asked, "n_predict": limit, "temperature": 0})["content"]
        for _, asked in prompts
    ]
    return sum(bool(task.grade(prompt, text).solved) for (prompt, _), text in zip(prompts, told, strict=True))


def test_llama_cli_answers_as_the_run_did(run: RunDir, server: ServerClient) -> None:
    words = shlex.split(run.summary.read_text().partition("Use it:")[2])
    line = words[words.index("llama-cli") : words.index("ollama")]
    assert line[:4] == ["llama-cli", "-m", str(gguf_of(run)), "-sys"]
    system: Message = {"role": "system", "content": line[4]}
    prompts = [(prompt, list(server.render([system, *asked]))) for prompt, asked in questions(task_of(run))]
    assert abs(rights(run, server, prompts) - own_rights(run)) <= MAY_DIFFER


def test_ollama_answers_as_the_run_did(run: RunDir, server: ServerClient) -> None:
    text = gguf_of(run).with_suffix(".Modelfile").read_text()
    template, system = modelfile_part(text, "TEMPLATE"), modelfile_part(text, "SYSTEM")
    own: Message = {"role": "system", "content": system}
    prompts = [(prompt, in_go(template, [own, *asked])) for prompt, asked in questions(task_of(run))]
    assert abs(rights(run, server, prompts) - own_rights(run)) <= MAY_DIFFER


def test_without_the_system_message_it_would_not(run: RunDir, server: ServerClient) -> None:
    template = modelfile_part(gguf_of(run).with_suffix(".Modelfile").read_text(), "TEMPLATE")
    prompts = [(prompt, in_go(template, asked)) for prompt, asked in questions(task_of(run))]
    assert rights(run, server, prompts) < own_rights(run) - 10 * MAY_DIFFER


def modelfile_part(text: str, name: str) -> str:
    found = re.search(rf'^{name} """(.*?)"""$', text, re.MULTILINE | re.DOTALL)
    assert found, f"the Modelfile has no {name}"
    return found[1]


def in_go(template: str, messages: Sequence[Message]) -> str:
    """Render a conversation as Go's text/template would: of its language, what our Modelfiles use."""
    parts = re.split(r"\s*\{\{-\s*(.*?)\s*\}\}|\{\{\s*(.*?)\s*\}\}", template)
    words = [(parts[i], parts[i + 1] or parts[i + 2]) for i in range(0, len(parts) - 1, 3)]
    assert words[0] == ("", "range .Messages")
    end = max(index for index, (_, action) in enumerate(words) if action == "end")
    body = "".join(in_go_once(words[1 : end + 1], message) for message in messages)
    return body + parts[-1]


def in_go_once(words: Sequence[tuple[str, str]], message: Message) -> str:
    """Render the loop's body for one message: a chain of conditions on its role."""
    said, on = "", True
    for before, action in words:
        said += before if on else ""
        if found := re.fullmatch(r'(?:else )?if eq \.Role "(\w+)"', action):
            on = found[1] == message["role"]
        elif action == "end":
            on = True
        elif action == ".Content":
            said += message["content"] if on else ""
        else:
            raise AssertionError(f"not of this language: {action}")
    return said
