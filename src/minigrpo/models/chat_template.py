"""Render messages to token ids: the only caller of a chat template, so training and evaluation cannot differ in it.

Nothing downstream sees the rendered text; the ids are the prompt. What a tokenizer must have is checked here once,
along with the faults that make a model babble or never stop.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from minigrpo.errors import ModelError
from minigrpo.types import Message, Prompt, Rendered

PROBE_QUESTION: Message = {"role": "user", "content": "What is 2 + 2?"}
PROBE_REPLY = "It is 4."


def render(tokenizer: Any, prompt: Prompt) -> Rendered:
    """Tokenise the prompt's messages, with the template's opening of the assistant's turn."""
    # jinja2 comes with transformers; templates raise its error for roles they do not take.
    from jinja2 import TemplateError

    try:
        encoded = tokenizer.apply_chat_template(
            [dict(message) for message in prompt.messages], add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except TemplateError as fault:
        raise ModelError(
            f"The chat template of {_name_of(tokenizer)} refuses prompt {prompt.id} ({fault}). Change the roles of its "
            f"messages ({', '.join(message['role'] for message in prompt.messages)}) or use another model."
        ) from None
    return Rendered(prompt, tuple(int(token) for token in encoded["input_ids"]))


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
    from jinja2 import Environment, meta

    # A tag of transformers' own, which marks the assistant's words: jinja2 alone does not know it.
    plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", tokenizer.chat_template)
    known = meta.find_undeclared_variables(Environment(extensions=_JINJA_EXTENSIONS).parse(plain))
    offered = sorted(known - _GIVEN_VARIABLES)
    for name, value in options.items():
        if name not in offered:
            raise ModelError(
                f"model.template names {name!r}, which the chat template of {_name_of(tokenizer)} does not know. It "
                f"knows: {', '.join(offered) or 'no options'}."
            )
        default = "{%- if NAME is not defined %}{%- set NAME = VALUE %}{%- endif %}"
        text = json.dumps(value) if not isinstance(value, bool) else str(value).lower()
        tokenizer.chat_template = default.replace("NAME", name).replace("VALUE", text) + tokenizer.chat_template


_JINJA_EXTENSIONS = ("jinja2.ext.loopcontrols", "jinja2.ext.do")
_GIVEN_VARIABLES = {
    *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
    *("bos_token", "eos_token", "unk_token", "pad_token", "raise_exception", "strftime_now"),
}
"""Variables of a chat template that transformers itself fills in."""


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
    if not _opens_assistant_turn(tokenizer):
        raise ModelError(
            f"The chat template of {_name_of(tokenizer)} ignores add_generation_prompt, so the model would not know "
            "that it is its turn. Add {% if add_generation_prompt %} with the assistant's header to the template."
        )
    return tuple(_template_warnings(tokenizer))


def _opens_assistant_turn(tokenizer: Any) -> bool:
    """Tell whether the rendered prompt ends where the assistant's words begin."""
    opening = render_text(tokenizer, [PROBE_QUESTION], opened=True)
    if opening != render_text(tokenizer, [PROBE_QUESTION]):
        return True
    # Mistral's templates have no header for the assistant: [/INST] closes the question and opens the answer at once.
    conversation = render_text(tokenizer, [PROBE_QUESTION, {"role": "assistant", "content": PROBE_REPLY}])
    return conversation.startswith(opening) and conversation[len(opening) :].lstrip().startswith(PROBE_REPLY)


def _template_warnings(tokenizer: Any) -> list[str]:
    """Return faults that do not stop training but often explain why a model behaves strangely elsewhere."""
    found = []
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = render(tokenizer, Prompt("template check", (PROBE_QUESTION,))).ids
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
    after_reply = render_text(tokenizer, [PROBE_QUESTION, {"role": "assistant", "content": PROBE_REPLY}]).rpartition(
        PROBE_REPLY
    )[2]
    if tokenizer.eos_token not in after_reply:
        found.append(
            f"The chat template does not close the assistant's turn with the eos token {tokenizer.eos_token}, so the "
            "model may not stop there."
        )
    return found


def render_text(tokenizer: Any, messages: Sequence[Message], opened: bool = False) -> str:
    return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=opened, tokenize=False))


def _name_of(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or "this model"
