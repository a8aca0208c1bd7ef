"""Write Ollama's Modelfile for an exported file: its own template language, the system message of training, the tokens
that end an answer, and sampling from the whole distribution, as in training.

Ollama does not run the chat template in the file. The text around each message is found by rendering conversations, and
the Modelfile gets a template only if it reproduces the chat template's text exactly.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from minigrpo.models.chat_template import ChatTemplate, ChatTemplateError, render_text
from minigrpo.types import Message

SAMPLING = {"top_k": 0, "top_p": 1, "min_p": 0, "repeat_penalty": 1}
"""Ollama's own defaults cut the distribution off and punish repetition, which training did neither."""

PROBE_WORDS = ("sys-x", "ask-one", "say-one", "ask-two", "say-two")


@dataclass(frozen=True, slots=True)
class TemplateParts:
    """The text before and after a message of each role, and the text that opens the answer."""

    around: dict[str, tuple[str, str]]
    opening: str

    def render(self, messages: Sequence[Message]) -> str:
        """Render a conversation with its answer opened, as Ollama would."""
        parts = [f"{self.around[m['role']][0]}{m['content']}{self.around[m['role']][1]}" for m in messages]
        return "".join(parts) + self.opening

    def template(self) -> str:
        """Return the template in Go's template language."""
        branches = [
            f'{{{{ {"if" if i == 0 else "else if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for i, (role, (before, after)) in enumerate(self.around.items())
        ]
        return f"{{{{- range .Messages }}}}{''.join(branches)}{{{{ end }}}}{{{{ end }}}}{self.opening}"


def probe_conversations() -> tuple[list[Message], ...]:
    roles = ("system", "user", "assistant", "user", "assistant")
    messages: list[Message] = [{"role": role, "content": text} for role, text in zip(roles, PROBE_WORDS, strict=True)]
    return messages[:2], messages[:4], messages[1:2], messages[1:4]


def find_template_parts(tokenizer: Any) -> TemplateParts | None:
    """Find the text around messages; None where the template does more than that: default messages, roles it does
    not take, the date of the day."""
    template = ChatTemplate.of(tokenizer)
    if template.refuses_system or any(template.reads_clock(messages) for messages in probe_conversations()[:2]):
        return None
    try:
        # llama.cpp and Ollama add the beginning-of-text token themselves where the file asks for it.
        bos = tokenizer.bos_token or ""
        expected = [
            render_text(tokenizer, messages, opened=True).removeprefix(bos) for messages in probe_conversations()
        ]
        whole = render_text(tokenizer, probe_conversations()[1]).removeprefix(bos)
        asked = render_text(tokenizer, probe_conversations()[0]).removeprefix(bos)
    except ChatTemplateError:
        return None
    for text in PROBE_WORDS[:4]:
        if whole.count(text) != 1:
            return None
    found = _split_template(whole, asked, expected[0])
    fits = [found.render(messages) == text for messages, text in zip(probe_conversations(), expected, strict=True)]
    # A template that adds a default system message is still right for conversations that have one.
    return found if all(fits[:2]) else None


def default_system(tokenizer: Any, parts: TemplateParts) -> str | None:
    """Return the system message that the chat template puts in where a conversation has none; None where there is none,
    or where it tells the date, which must not be frozen."""
    user = probe_conversations()[2]
    if ChatTemplate.of(tokenizer).reads_clock(user):
        return None
    text = render_text(tokenizer, user, opened=True).removeprefix(tokenizer.bos_token or "")
    added, (before, after) = text.removesuffix(parts.render(user)), parts.around["system"]
    if added == text or not added.startswith(before) or not added.endswith(after):
        return None
    return added[len(before) : len(added) - len(after)] or None


def _split_template(whole: str, asked: str, opened: str) -> TemplateParts:
    first, rest = whole.split(PROBE_WORDS[0])
    to_user, rest = rest.split(PROBE_WORDS[1])
    to_answer, rest = rest.split(PROBE_WORDS[2])
    to_next, end = rest.split(PROBE_WORDS[3])
    after_user = end if asked.endswith(end) else ""
    before_user = _common_suffix(to_user, to_next).removeprefix(after_user)
    around = {
        "system": (first, to_user.removesuffix(before_user)),
        "user": (before_user, after_user),
        "assistant": (to_answer.removeprefix(after_user), to_next.removesuffix(before_user)),
    }
    return TemplateParts(around, opened.removeprefix(asked))


def _common_suffix(one: str, other: str) -> str:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(other), strict=False))
    return "".join(pair[0] for pair in same)[::-1]


def end_tokens(folder: Path, tokenizer: Any) -> list[str]:
    """Return the texts of tokens that end an answer: of the model's own list, and the tokenizer's."""
    file = folder / "generation_config.json"
    listed = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    ids = [*(listed if isinstance(listed, list) else [listed]), tokenizer.eos_token_id]
    return tokenizer.convert_ids_to_tokens(list(dict.fromkeys(token for token in ids if token is not None)))


def sampling_parameters(temperature: float) -> dict[str, float]:
    """Return Ollama's options that sample as training did."""
    return {"temperature": temperature, **SAMPLING}


def render_modelfile(gguf: str, folder: Path, tokenizer: Any, temperature: float, system: str | None = None) -> str:
    """Return the Modelfile's text. `folder`: of the merged model. `temperature`: of training. `system`: the system
    message of training; None: the one that the chat template puts in by itself."""
    parts = find_template_parts(tokenizer)
    lines = [f"FROM ./{gguf}", ""]
    if parts and '"""' not in parts.template():
        lines += [f'TEMPLATE """{parts.template()}"""', ""]
    else:
        lines += [
            "# The chat template cannot be said in Ollama's language: it will take the nearest that it knows.",
            "",
        ]
    system = default_system(tokenizer, parts) if system is None and parts else system
    if system and '"""' not in system:
        lines += [f'SYSTEM """{system}"""', ""]
    elif system:
        lines += [
            "# The system message of training holds three quotes, which have no place here: send it yourself.",
            "",
        ]
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in end_tokens(folder, tokenizer)]
    lines += [f"PARAMETER {name} {value:g}" for name, value in sampling_parameters(temperature).items()]
    return "\n".join([*lines, ""])
