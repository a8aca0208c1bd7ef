"""Render messages to token ids: the only caller of a chat template, so training and evaluation cannot differ in it.

Nothing downstream sees the rendered text; the ids are the prompt. A conversation whose last message is the assistant's
is continued, not closed. What a tokenizer must have is checked here once, along with the faults that make a model
babble or never stop.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from minigrpo.errors import MinigrpoError, ModelError
from minigrpo.types import Completion, Message, Prompt, Rendered
from minigrpo.utils.deadline import within
from minigrpo.utils.faults import words_of

PROBE_QUESTION: Message = {"role": "user", "content": "What is 2 + 2?"}
PROBE_REPLY = "It is 4."
_PROBE_SYSTEM: Message = {"role": "system", "content": "Be brief."}

_TWO_MOMENTS = datetime(2001, 2, 3, 4, 5, 6), datetime(2012, 11, 20, 17, 48, 59)
"""Different in every part that a date or a time may be told by."""

_CLOCK_FORMAT = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(["'])(.*?)\1""")

_TAG = re.compile(r"</?[A-Za-z][\w:-]*>|```")
TAG_OPENED_AT_END = re.compile(r"<[A-Za-z][\w:-]*>\s*\Z")


def render(tokenizer: Any, prompt: Prompt) -> Rendered:
    """Tokenise the prompt's messages, with the template's opening of the assistant's turn.

    Raise ModelError where the template refuses them, fails on them, or makes nothing of them.
    """
    try:
        ids = render_ids(tokenizer, prompt.messages)
    except ChatTemplateError as fault:
        if fault.continues:
            raise ModelError(
                f"Prompt {prompt.id} ends with the assistant's words, which the chat template of "
                f"{_name_of(tokenizer)} does not leave as they are ({fault.reason}). End it with the user's message, "
                "or use another model."
            ) from None
        raise ModelError(
            f"The chat template of {_name_of(tokenizer)} refuses prompt {prompt.id} ({fault.reason}). Change its "
            f"messages (of {', '.join(str(message['role']) for message in prompt.messages)}), mend it, or use another "
            "model."
        ) from None
    if not ids:
        raise ModelError(f"The chat template of {_name_of(tokenizer)} makes no text at all of prompt {prompt.id}.")
    return Rendered(prompt, ids)


class ChatTemplateError(ModelError):
    """A chat template that raised an error on messages, or did not end. `continues`: the messages end with the
    assistant's, and what failed is to leave that one open."""

    def __init__(self, tokenizer: Any, reason: str, *, continues: bool = False) -> None:
        super().__init__(
            f"The chat template of {_name_of(tokenizer)} cannot be used: {reason}. Mend it (chat_template.jinja, or "
            "chat_template in tokenizer_config.json) or use another model."
        )
        self.reason, self.continues = reason, continues


LONGEST_RENDERING_S = 20.0
"""Seconds after which a template is taken for one that never ends: a long conversation takes milliseconds."""


def _apply(tokenizer: Any, messages: Sequence[Message], **options: Any) -> Any:
    """Apply the tokenizer's chat template, a stranger's program. Raise ChatTemplateError for whatever it raises."""
    # jinja2 comes with transformers; templates raise its error for roles they do not take.
    from jinja2 import TemplateError

    try:
        return within(
            LONGEST_RENDERING_S,
            lambda: tokenizer.apply_chat_template(template_messages(tokenizer, messages), **options),
        )
    except MinigrpoError:
        raise
    except TemplateError as fault:
        raise ChatTemplateError(tokenizer, " ".join(words_of(fault).split())) from None
    except TimeoutError:
        raise ChatTemplateError(tokenizer, f"it did not end within {LONGEST_RENDERING_S:g} s") from None
    except Exception as fault:
        reason = f"{type(fault).__name__}: {' '.join(words_of(fault).split())[:160]}"
        raise ChatTemplateError(tokenizer, reason, continues="continue_final_message" in options) from None


def render_ids(tokenizer: Any, messages: Sequence[Message]) -> tuple[int, ...]:
    """Return the ids that the model answers: the assistant's turn is opened, or its last message continued."""
    encoded = _apply(tokenizer, messages, **turn_options(messages), tokenize=True, return_dict=True)
    return tuple(int(token) for token in encoded["input_ids"])


def render_text(tokenizer: Any, messages: Sequence[Message], opened: bool = False) -> str:
    """Return the rendered text. `opened`: as the model answers it, else with every turn closed."""
    options = turn_options(messages) if opened else {"add_generation_prompt": False}
    return str(_apply(tokenizer, messages, **options, tokenize=False))


def is_continued(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether the answer continues the last message: it is the assistant's own."""
    return bool(messages) and messages[-1]["role"] == "assistant"


def turn_options(messages: Sequence[Message]) -> dict[str, bool]:
    """Return the options of a chat template that open the assistant's turn, or leave it open: TRL's rule, and vLLM's
    names."""
    continued = is_continued(messages)
    return {"add_generation_prompt": not continued, **({"continue_final_message": True} if continued else {})}


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template's text, with the special tokens that it may name: enough to see what it does with a message."""

    text: str | None
    specials: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate:
        text = getattr(tokenizer, "chat_template", None)
        text = text.get("default") if isinstance(text, dict) else text
        specials = getattr(tokenizer, "special_tokens_map", {})
        text = text if isinstance(text, str) else None  # a file may hold anything
        return cls(text or None, tuple((name, token) for name, token in specials.items() if isinstance(token, str)))

    @classmethod
    def beside(cls, folder: Path) -> ChatTemplate:
        """Read the template of a tokenizer's folder, without opening the tokenizer."""
        file = folder / "chat_template.jinja"
        try:
            if file.is_file():
                return cls(file.read_text(encoding="utf-8"))
            found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
        except (OSError, ValueError, AttributeError):
            return cls(None)
        return cls(found if isinstance(found, str) else None)

    def render(self, messages: Sequence[Message], *, opened: bool) -> str | None:
        """Return the text; None where the template raises an error, or does not end."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, _ = within(
                LONGEST_RENDERING_S,
                lambda: render_jinja_template(
                    [[dict(message) for message in messages]],
                    chat_template=self.text,
                    add_generation_prompt=opened,
                    **dict(self.specials),
                ),
            )
        except Exception:  # a template is a program: it may divide by zero
            return None
        return str(texts[0])

    def reads_clock(self, messages: Sequence[Message]) -> bool:
        """Tell whether these messages become another text at another time: the template writes the date into them."""
        if self.text is None:
            return False
        asked = self.fold_system(messages)
        stopped = (replace(self, text=_with_stopped_clock(self.text, now)) for now in _TWO_MOMENTS)
        then, later = (each.render(asked, opened=not is_continued(asked)) for each in stopped)
        return then != later

    @property
    def refuses_system(self) -> bool:
        """Tell whether it raises an error on a system message, or leaves its words out, and takes the conversation
        without it."""
        return self.text is not None and _refuses_system(self)

    def fold_system(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Put the system message before the first user message, with a blank line between, where it is refused."""
        given = [dict(message) for message in messages]
        if not given or given[0]["role"] != "system" or not self.refuses_system:
            return given
        words, rest = given[0]["content"], given[1:]
        place = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
        if place is None:
            return [{"role": "user", "content": words}, *rest]
        joined = f"{words}\n\n{rest[place]['content']}" if words else rest[place]["content"]
        return [*rest[:place], {**rest[place], "content": joined}, *rest[place + 1 :]]

    def opening(self, messages: Sequence[Message]) -> str:
        """Return the beginning of the answer's form that stands in the prompt; "" where there is none.

        It is a tag that the template itself opens after the assistant's header (<think>), or the assistant's message
        that the answer continues, if that has a tag or a code fence. Plain words ("The answer is") are part of the
        question.
        """
        if is_continued(messages):
            begun = str(messages[-1].get("content") or "")
            return begun if _TAG.search(begun) else ""
        if self.text is None:
            return ""
        asked = self.fold_system(messages)
        found = TAG_OPENED_AT_END.search(self.render(asked, opened=True) or "")
        if found is None:
            return ""
        reply: Message = {"role": "assistant", "content": PROBE_REPLY}
        header = (self.render([*asked, reply], opened=False) or "").rpartition(PROBE_REPLY)[0]
        return "" if header.endswith(found[0]) else found[0]  # a header that looks like a tag begins no answer


def _with_stopped_clock(template: str, now: datetime) -> str:
    """Put a macro in the place of transformers' `strftime_now`, which takes no other clock."""
    formats = {found[2] for found in _CLOCK_FORMAT.finditer(template)}
    told = json.dumps({form: now.strftime(form) for form in sorted(formats)}, ensure_ascii=False)
    read = f"{{{{- {told}.get(format, {json.dumps(str(now))}) -}}}}"
    return f"{{%- macro strftime_now(format) -%}}{read}{{%- endmacro -%}}{template}"


@cache
def _refuses_system(template: ChatTemplate) -> bool:
    found = template.render([_PROBE_SYSTEM, PROBE_QUESTION], opened=True)
    taken = found is not None and _PROBE_SYSTEM["content"] in found
    return not taken and template.render([PROBE_QUESTION], opened=True) is not None


def template_messages(tokenizer: Any, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages as the tokenizer's template takes them: see `ChatTemplate.fold_system`."""
    return ChatTemplate.of(tokenizer).fold_system(messages)


def opening(tokenizer: Any, prompt: Prompt) -> str:
    """Return what the prompt begins of its answer: see `ChatTemplate.opening`."""
    return ChatTemplate.of(tokenizer).opening(prompt.messages)


def with_opening(tokenizer: Any, prompt: Prompt, completions: Sequence[Completion]) -> tuple[Completion, ...]:
    """Return the completions with what their prompt began of them."""
    begun = opening(tokenizer, prompt)
    return tuple(replace(one, opening=begun) for one in completions) if begun else tuple(completions)


def whole_answer(begun: str, answer: str) -> str:
    """Return a written answer with what the prompt begins of it, whether it was written with that or without."""
    return answer if answer.startswith(begun.rstrip()) else begun + answer


def after_opening(begun: str, answer: str) -> str:
    """Return what is left of a written answer where the prompt has begun it."""
    tag = begun.rstrip()
    if not tag or not answer.startswith(tag):
        return answer
    return answer.removeprefix(tag).removeprefix(begun[len(tag) :])


def set_template_options(tokenizer: Any, options: Mapping[str, Any]) -> None:
    """Write options into the template itself, as its defaults.

    So whatever is saved with this tokenizer renders as training did (the adapter, a merged model, a served one), and
    nobody has to remember them. Raise ModelError where the template does not know an option.
    """
    if not options:
        return
    if not isinstance(tokenizer.chat_template, str):
        raise ModelError(
            f"model.template sets options, but {_name_of(tokenizer)} has no chat template, or several by name. Leave "
            "model.template empty or use a model with one template."
        )
    from jinja2 import TemplateError

    try:
        offered = _template_options(tokenizer.chat_template)
    except (TemplateError, RecursionError) as fault:
        raise ChatTemplateError(tokenizer, words_of(fault)) from None
    for name, value in options.items():
        if name not in offered:
            raise ModelError(
                f"model.template names {name!r}, which the chat template of {_name_of(tokenizer)} does not know. It "
                f"knows: {', '.join(offered) or 'no options'}."
            )
        default = "{%- if NAME is not defined %}{%- set NAME = VALUE %}{%- endif %}"
        text = json.dumps(value) if not isinstance(value, bool) else str(value).lower()
        tokenizer.chat_template = default.replace("NAME", name).replace("VALUE", text) + tokenizer.chat_template


def _template_options(template: str) -> list[str]:
    """Return the names of the variables that whoever renders a chat template may set."""
    from jinja2 import Environment, meta

    # A tag of transformers' own, which marks the assistant's words: jinja2 alone does not know it.
    plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)
    known = meta.find_undeclared_variables(Environment(extensions=_JINJA_EXTENSIONS).parse(plain))
    return sorted(known - _GIVEN_VARIABLES)


_JINJA_EXTENSIONS = ("jinja2.ext.loopcontrols", "jinja2.ext.do")
_GIVEN_VARIABLES = {
    *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
    *("bos_token", "eos_token", "unk_token", "pad_token", "raise_exception", "strftime_now"),
}
"""Variables of a chat template that transformers itself fills in."""


def clock_warning(tokenizer: Any, messages: Sequence[Message]) -> str | None:
    """Warn of a chat template that writes the date into a prompt of these messages; None where it does not."""
    template = ChatTemplate.of(tokenizer)
    if not template.reads_clock(messages):
        return None
    dates = [name for name in _template_options(template.text or "") if "date" in name]
    cure = f"--model.template.{dates[0]} '1 January 2026'" if dates else "a fixed date in its chat_template.jinja"
    return (
        f"The chat template of {_name_of(tokenizer)} writes the date into the prompt: the same question is other "
        "tokens on another day, in a run that goes on over midnight, in one that is resumed, and where the model is "
        f"served. To train on one date: {cure}"
    )


def check_tokenizer(tokenizer: Any) -> tuple[str, ...]:
    """Return warnings about a tokenizer; raise ModelError where no prompt can be rendered or no answer could end."""
    if not tokenizer.chat_template:
        raise ModelError(
            f"The tokenizer of {_name_of(tokenizer)} has no chat template, as is usual for base models, so messages "
            "cannot become a prompt. Use the instruct version of the model, or put a chat_template.jinja beside its "
            "tokenizer files."
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"The tokenizer of {_name_of(tokenizer)} has no eos token, so no answer could ever end. Set eos_token in "
            "its tokenizer_config.json to the token that closes the assistant's turn."
        )
    asked = probe_messages(tokenizer)
    if not _opens_assistant_turn(tokenizer, asked):
        raise ModelError(
            f"The chat template of {_name_of(tokenizer)} ignores add_generation_prompt, so the model would not know "
            "that it is its turn. Add {% if add_generation_prompt %} with the assistant's header to the template."
        )
    return tuple(_template_warnings(tokenizer, asked))


def probe_messages(tokenizer: Any) -> list[Message]:
    """Return a question, after a system message where the template needs one.

    Raise ChatTemplateError where it takes neither.
    """
    try:
        render_text(tokenizer, [PROBE_QUESTION], opened=True)
    except ChatTemplateError as refusal:
        asked = [_PROBE_SYSTEM, PROBE_QUESTION]
        try:
            render_text(tokenizer, asked, opened=True)
        except ChatTemplateError:
            raise refusal from None
        return asked
    return [PROBE_QUESTION]


def _opens_assistant_turn(tokenizer: Any, asked: Sequence[Message]) -> bool:
    """Tell whether the rendered prompt ends where the assistant's words begin."""
    opening = render_text(tokenizer, asked, opened=True)
    if opening != render_text(tokenizer, asked):
        return True
    # Mistral's templates have no header for the assistant: [/INST] closes the question and opens the answer at once.
    conversation = render_text(tokenizer, [*asked, {"role": "assistant", "content": PROBE_REPLY}])
    return conversation.startswith(opening) and conversation[len(opening) :].lstrip().startswith(PROBE_REPLY)


def _template_warnings(tokenizer: Any, asked: Sequence[Message]) -> list[str]:
    """Return faults that do not stop training but often explain why a model behaves strangely elsewhere."""
    found = []
    if template_messages(tokenizer, [_PROBE_SYSTEM, PROBE_QUESTION])[0]["role"] != "system":
        found.append(
            "The chat template refuses the system role, or leaves its words out: a system message is put before the "
            "first user message, with a blank line between."
        )
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = render(tokenizer, Prompt("template check", tuple(asked))).ids
    if bos is not None and ids[:2] == (bos, bos):
        found.append("The chat template puts two beginning-of-text tokens before the prompt; one is meant.")
    plain = tokenizer("x")["input_ids"]
    if bos is not None and plain[:1] == [bos] and ids[0] != bos:
        found.append(
            "The tokenizer begins plain text with its beginning-of-text token, but the chat template does not."
        )
    if tokenizer.pad_token_id == eos:
        found.append(
            "The padding token is the eos token. Masks here come from lengths, so this is harmless; tools that mask "
            "by token would never train the model to stop."
        )
    try:
        answered = render_text(tokenizer, [*asked, {"role": "assistant", "content": PROBE_REPLY}])
    except ChatTemplateError as fault:
        return [*found, f"The chat template fails on a message of the assistant's ({fault.reason})."]
    if tokenizer.eos_token not in answered.rpartition(PROBE_REPLY)[2]:
        found.append(
            f"The chat template does not close the assistant's turn with the eos token {tokenizer.eos_token}, so the "
            "model may not stop there."
        )
    return found


def _name_of(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or "this model"
