"""Ollama's Modelfile for an exported file: its own template language, the tokens that end an answer, the temperature.

Ollama does not run the chat template in the file. What stands around each message is found by rendering conversations,
and the Modelfile gets a template only if that gives the very text of the chat template again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from minigrpo.models.chat_template import render_text
from minigrpo.types import Message

SAID = ("sys-x", "ask-one", "say-one", "ask-two", "say-two")


@dataclass(frozen=True, slots=True)
class Turns:
    """What stands before and after a message of each role, and what opens the answer."""

    around: dict[str, tuple[str, str]]
    opening: str

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation with its answer opened, as Ollama would."""
        parts = [f"{self.around[m['role']][0]}{m['content']}{self.around[m['role']][1]}" for m in messages]
        return "".join(parts) + self.opening

    def template(self) -> str:
        """In Go's template language."""
        branches = [
            f'{{{{ {"if" if i == 0 else "else if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for i, (role, (before, after)) in enumerate(self.around.items())
        ]
        return f"{{{{- range .Messages }}}}{''.join(branches)}{{{{ end }}}}{{{{ end }}}}{self.opening}"


def conversations() -> tuple[list[Message], ...]:
    roles = ("system", "user", "assistant", "user", "assistant")
    said: list[Message] = [{"role": role, "content": text} for role, text in zip(roles, SAID, strict=True)]
    return said[:2], said[:4], said[1:2], said[1:4]


def turns_of(tokenizer: Any) -> Turns | None:
    """None where the template does more than stand around its messages: default words, roles it does not take."""
    from jinja2 import TemplateError

    try:
        # llama.cpp and Ollama put the beginning-of-text token themselves where the file asks for it.
        bos = tokenizer.bos_token or ""
        wanted = [render_text(tokenizer, messages, opened=True).removeprefix(bos) for messages in conversations()]
        whole = render_text(tokenizer, conversations()[1]).removeprefix(bos)
        asked = render_text(tokenizer, conversations()[0]).removeprefix(bos)
    except TemplateError:
        return None
    for text in SAID[:4]:
        if whole.count(text) != 1:
            return None
    found = _found(whole, asked, wanted[0])
    fits = [found.render(messages) == text for messages, text in zip(conversations(), wanted, strict=True)]
    # A template with words of its own for conversations without a system message is still right with one.
    return found if all(fits[:2]) else None


def _found(whole: str, asked: str, opened: str) -> Turns:
    first, rest = whole.split(SAID[0])
    to_user, rest = rest.split(SAID[1])
    to_answer, rest = rest.split(SAID[2])
    to_next, end = rest.split(SAID[3])
    after_user = end if asked.endswith(end) else ""
    before_user = _common_end(to_user, to_next).removeprefix(after_user)
    around = {
        "system": (first, to_user.removesuffix(before_user)),
        "user": (before_user, after_user),
        "assistant": (to_answer.removeprefix(after_user), to_next.removesuffix(before_user)),
    }
    return Turns(around, opened.removeprefix(asked))


def _common_end(one: str, other: str) -> str:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(other), strict=False))
    return "".join(pair[0] for pair in same)[::-1]


def ends_of(folder: Path, tokenizer: Any) -> list[str]:
    """Texts of the tokens that end an answer: the model's own list, and the tokenizer's."""
    file = folder / "generation_config.json"
    listed = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    ids = [*(listed if isinstance(listed, list) else [listed]), tokenizer.eos_token_id]
    return tokenizer.convert_ids_to_tokens(list(dict.fromkeys(token for token in ids if token is not None)))


def modelfile(gguf: str, folder: Path, tokenizer: Any, temperature: float) -> str:
    """`folder`: of the merged model. `temperature`: the one that it was trained at."""
    turns = turns_of(tokenizer)
    lines = [f"FROM ./{gguf}", ""]
    if turns and '"""' not in turns.template():
        lines += [f'TEMPLATE """{turns.template()}"""', ""]
    else:
        lines += [
            "# The chat template cannot be said in Ollama's language: it will take the nearest that it knows.",
            "",
        ]
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in ends_of(folder, tokenizer)]
    return "\n".join([*lines, f"PARAMETER temperature {temperature:g}", ""])
