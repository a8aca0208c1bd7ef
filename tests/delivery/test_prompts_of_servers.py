"""What servers render is what training rendered: answers that the prompt begins, and refused system messages."""

import json
import shlex
from pathlib import Path

import pytest

from minigrpo.delivery.gguf.modelfile import find_template_parts
from minigrpo.delivery.serve.commands import ServerCommand
from minigrpo.delivery.serve.gguf_engine import Renderer
from minigrpo.delivery.serve.serve import curl_command, python_snippet
from minigrpo.delivery.serve.server import ServerClient
from minigrpo.errors import MinigrpoError
from minigrpo.models.chat_template import ChatTemplate, opening, render
from minigrpo.types import Prompt
from tests.helpers.tiny import TEMPLATE, build_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "What is 2 + 2?"}
BEGUN = {"role": "assistant", "content": "The answer is"}
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
THINKING = TEMPLATE.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")


class LlamaLike(ServerClient):
    """A client whose server renders as llama.cpp does: the last message of an assistant goes behind the opening of its
    turn. `closes`: as one does that was told not to."""

    def __init__(self, template: str, *, closes: bool = False) -> None:
        super().__init__("http://nowhere", "llama.cpp", "m")
        self.tokenizer = build_tokenizer(template)
        self.closes = closes

    def ask(self, path, body=None):
        if path == "/props":
            return {"chat_template": self.tokenizer.chat_template}
        if path == "/tokenize":
            return {"tokens": self.tokenizer(body["content"], add_special_tokens=False)["input_ids"]}
        assert path == "/apply-template"
        messages, begun = body["messages"], ""
        if messages[-1]["role"] == "assistant" and not self.closes:
            messages, begun = messages[:-1], messages[-1]["content"]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return {"prompt": text + begun}


class VllmLike(ServerClient):
    def __init__(self) -> None:
        super().__init__("http://nowhere", "vllm", "m")
        self.tokenizer = build_tokenizer()
        self.asked = {}

    def ask(self, path, body=None):
        self.asked[path] = body
        if path == "/v1/chat/completions":
            return {"choices": [{"message": {"content": " 4"}}]}
        flags = {name: body[name] for name in ("add_generation_prompt", "continue_final_message") if name in body}
        return {"tokens": self.tokenizer.apply_chat_template(body["messages"], **flags)["input_ids"]}


@pytest.mark.parametrize("begun", ["The answer is", "<think>\nTwo", "```python\n"])
@pytest.mark.parametrize("client", [LlamaLike(TEMPLATE), VllmLike()], ids=["llama.cpp", "vllm"])
def test_a_server_continues_what_training_continued(client, begun):
    asked = (SYSTEM, QUESTION, {**BEGUN, "content": begun})
    assert client.render(asked) == render(client.tokenizer, Prompt("p", asked)).ids


def test_a_server_that_closes_the_message_is_refused():
    with pytest.raises(MinigrpoError, match="closes the assistant's message 'The answer is'"):
        LlamaLike(TEMPLATE, closes=True).render((QUESTION, BEGUN))


def test_a_server_that_puts_the_message_into_a_block_that_training_did_not_open_is_refused():
    for ask in (LlamaLike(THINKING).render, LlamaLike(THINKING).chat):
        with pytest.raises(MinigrpoError, match="after the <think> that the chat template opens"):
            ask((QUESTION, BEGUN))
    assert LlamaLike(THINKING).render((QUESTION,)) == render(build_tokenizer(THINKING), Prompt("p", (QUESTION,))).ids


def test_chats_and_printed_commands_ask_vllm_to_continue():
    client = VllmLike()
    told = {"add_generation_prompt": False, "continue_final_message": True}
    assert client.chat((QUESTION, BEGUN)) == " 4"
    command = ServerCommand("vllm", (), "127.0.0.1", 1, "m", "a model", None)
    body = json.loads(shlex.split(curl_command(command, (QUESTION, BEGUN)))[-1])
    for sent in (client.asked["/v1/chat/completions"], body):
        assert {name: sent.get(name) for name in told} == told
    assert f"extra_body={told!r}" in python_snippet(command, (QUESTION, BEGUN))
    assert "extra_body" not in python_snippet(command, (QUESTION,))
    client.chat((QUESTION,))
    assert not told.keys() & client.asked["/v1/chat/completions"].keys()


def test_an_evaluated_file_is_asked_as_training_asked():
    renderer = Renderer(LlamaLike(REFUSING), "file")
    asked = Prompt("p", (SYSTEM, QUESTION))
    assert render(renderer, asked).ids == render(build_tokenizer(REFUSING), asked).ids
    assert opening(Renderer(LlamaLike(THINKING), "file"), asked) == "<think>\n"
    assert opening(renderer, asked) == ""


@pytest.mark.parametrize("template", [TEMPLATE, REFUSING, THINKING])
def test_the_template_beside_an_adapter_says_the_same_as_its_tokenizer(template, tmp_path: Path):
    tokenizer = build_tokenizer(template)
    tokenizer.save_pretrained(tmp_path)
    beside, inside = ChatTemplate.beside(tmp_path), ChatTemplate.of(tokenizer)
    assert beside.text == template
    for asked in ((SYSTEM, QUESTION), (QUESTION, BEGUN)):
        assert beside.fold_system(asked) == inside.fold_system(asked)
        assert beside.opening(asked) == inside.opening(asked)


def test_ollama_gets_no_template_that_puts_the_system_message_elsewhere():
    assert find_template_parts(build_tokenizer(TEMPLATE)) is not None
    assert find_template_parts(build_tokenizer(REFUSING)) is None
