"""The chat template: messages become ids in one way, and a tokenizer must have certain tokens."""

import pytest

from minigrpo.errors import ModelError
from minigrpo.models.chat_template import (
    ChatTemplate,
    check_tokenizer,
    clock_warning,
    render,
    set_template_options,
)
from minigrpo.types import Prompt

PROMPT = Prompt("p", ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "say 3"}))


def test_a_prompt_ends_where_the_assistant_begins(tokenizer):
    rendered = render(tokenizer, PROMPT)
    assert tokenizer.decode(rendered.ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nsay 3<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered.prompt is PROMPT


def test_ids_are_plain_integers(tokenizer):
    assert all(type(token) is int for token in render(tokenizer, PROMPT).ids)


def test_a_sound_tokenizer_passes_without_a_warning(tokenizer):
    assert check_tokenizer(tokenizer) == ()


def test_a_tokenizer_without_a_chat_template_is_refused(make_tokenizer):
    with pytest.raises(ModelError, match="has no chat template"):
        check_tokenizer(make_tokenizer(template=None))


def test_a_tokenizer_without_eos_is_refused(make_tokenizer):
    with pytest.raises(ModelError, match="has no eos token"):
        check_tokenizer(make_tokenizer(eos_token=None))


def test_a_template_without_a_generation_prompt_is_refused(make_tokenizer, template):
    deaf = template.partition("{% if add_generation_prompt %}")[0]
    with pytest.raises(ModelError, match="ignores add_generation_prompt"):
        check_tokenizer(make_tokenizer(deaf))


def test_a_template_whose_question_opens_the_answer_is_accepted(make_tokenizer):
    mistral = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}<|im_end|>"
        "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
    )
    assert check_tokenizer(make_tokenizer(mistral)) == ()


def test_two_beginnings_of_text_are_warned_of(make_tokenizer, template):
    (warning,) = check_tokenizer(make_tokenizer("{{ bos_token }}{{ bos_token }}" + template))
    assert "two beginning-of-text tokens" in warning


def test_one_beginning_of_text_is_fine(make_tokenizer, template):
    assert check_tokenizer(make_tokenizer("{{ bos_token }}" + template)) == ()


def test_padding_with_eos_is_warned_of(make_tokenizer):
    (warning,) = check_tokenizer(make_tokenizer(pad_token="<|im_end|>"))
    assert "padding token is the eos token" in warning


def test_a_turn_that_eos_does_not_close_is_warned_of(make_tokenizer):
    (warning,) = check_tokenizer(make_tokenizer(eos_token="<|bos|>", bos_token=None))
    assert "does not close the assistant's turn" in warning


def test_a_role_that_the_template_refuses_is_reported_with_the_prompt(make_tokenizer, template):
    strict = (
        "{% for m in messages if m['role'] == 'tool' %}{{ raise_exception('no tool role') }}{% endfor %}" + template
    )
    called = Prompt("p", (*PROMPT.messages, {"role": "tool", "content": "4"}))
    with pytest.raises(ModelError, match=r"prompt p \(no tool role\).*system, user, tool"):
        render(make_tokenizer(strict), called)


THINKING = "{%- if think is defined and not think %}{{ 'quick ' }}{%- endif %}{% generation %}{% endgeneration %}"


def test_an_option_of_the_template_becomes_its_default_and_stays_with_the_tokenizer(make_tokenizer, template, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = make_tokenizer(template=THINKING + template)
    plain = render(tokenizer, PROMPT).ids
    set_template_options(tokenizer, {"think": False})
    quick = render(tokenizer, PROMPT).ids
    assert tokenizer.decode(quick) == "quick " + tokenizer.decode(plain)
    tokenizer.save_pretrained(tmp_path)
    assert render(AutoTokenizer.from_pretrained(tmp_path), PROMPT).ids == quick
    asked = tokenizer.apply_chat_template([dict(m) for m in PROMPT.messages], add_generation_prompt=True, think=True)
    assert tuple(asked["input_ids"]) == plain


def test_an_option_that_the_template_does_not_know_is_refused_with_those_that_it_knows(make_tokenizer, template):
    with pytest.raises(ModelError, match=r"names 'thinking'.*It knows: think\."):
        set_template_options(make_tokenizer(template=THINKING + template), {"thinking": True})


CLOCKS = {
    "always": ("{{ strftime_now('%d %b %Y') }}", True, True),
    "an hour": ("{{ strftime_now('%H') }}", True, True),
    "unless told": (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b') %}{% endif %}{{ date_string }}",
        True,
        True,
    ),
    "with a system message": (
        "{% if messages[0]['role'] == 'system' %}{{ strftime_now('%Y') }}{% endif %}",
        True,
        False,
    ),
    "without one": ("{% if messages[0]['role'] != 'system' %}{{ strftime_now('%A') }}{% endif %}", False, True),
    "never": ("{% if strftime_now is defined %}{% set year = strftime_now('%Y') %}{% endif %}", False, False),
    "a fixed date": ("{% set date_string = '26 Jul 2024' %}{{ date_string }}", False, False),
}


@pytest.mark.parametrize("name", CLOCKS)
def test_whether_a_prompt_tells_the_date_is_found_by_rendering_it(name, make_tokenizer, template):
    text, with_system, without = CLOCKS[name]
    tokenizer = make_tokenizer(text + template)
    assert ChatTemplate.of(tokenizer).reads_clock(PROMPT.messages) == with_system
    assert ChatTemplate.of(tokenizer).reads_clock(PROMPT.messages[1:]) == without
    assert bool(clock_warning(tokenizer, PROMPT.messages)) == with_system
    set_template_options(tokenizer, {"date_string": "1 May 2026"} if name == "unless told" else {})
    assert ChatTemplate.of(tokenizer).reads_clock(PROMPT.messages) == (with_system and name != "unless told")


def test_options_without_a_template_are_refused(make_tokenizer):
    with pytest.raises(ModelError, match="has no chat template"):
        set_template_options(make_tokenizer(template=None), {"think": True})


ENDLESS = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
FAILING = {
    "syntax": ("{% for %}", "Expected an expression"),
    "division": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "types": ("{{ 'x' + 1 }}", "TypeError"),
    "range": ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
    "recursion": ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
    "surrogate": ("{{ '\\ud800' }}", "TypeError|UnicodeEncodeError"),
    "endless": (ENDLESS, r"did not end within 0\.2 s"),
}


@pytest.mark.parametrize("kind", FAILING)
def test_whatever_fails_in_a_template_is_told_before_and_with_the_prompt(make_tokenizer, template, monkeypatch, kind):
    fault, words = FAILING[kind]
    monkeypatch.setattr("minigrpo.models.chat_template.LONGEST_RENDERING_S", 0.2)
    with pytest.raises(ModelError, match=rf"(?s)refuses prompt p \(.*({words})"):
        render(make_tokenizer(fault + template), PROMPT)
    if kind != "surrogate":  # the text is one; only its tokens are not
        with pytest.raises(ModelError, match=rf"cannot be used: .*({words}).*chat_template\.jinja"):
            check_tokenizer(make_tokenizer(fault + template))


@pytest.mark.parametrize(
    "condition",
    ["'loop' in messages[-1].content", "messages[-1].content | length > 10", "messages[-1].content == 'loop for ever'"],
)
def test_a_template_that_never_ends_on_some_contents_is_told_after_others_have_ended(
    make_tokenizer, template, monkeypatch, condition
):
    monkeypatch.setattr("minigrpo.models.chat_template.LONGEST_RENDERING_S", 0.2)
    tokenizer = make_tokenizer(f"{{% if {condition} %}}{ENDLESS}{{% endif %}}{template}")
    assert render(tokenizer, Prompt("short", ({"role": "user", "content": "2 + 2"},))).ids
    with pytest.raises(ModelError, match=r"refuses prompt long \(it did not end within 0\.2 s\)"):
        render(tokenizer, Prompt("long", ({"role": "user", "content": "loop for ever"},)))
    assert render(tokenizer, Prompt("short", ({"role": "user", "content": "2 + 2"},))).ids


def test_a_template_that_writes_nothing_is_refused_with_the_prompt(make_tokenizer):
    silent = "{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ModelError, match="makes no text at all of prompt p"):
        render(make_tokenizer(silent), PROMPT)
    with pytest.raises(ModelError, match="makes no text at all of prompt template check"):
        check_tokenizer(make_tokenizer(silent))


@pytest.mark.parametrize("odd", [3, [3], {"tool_use": "x"}, {"default": 3}])
def test_a_template_that_is_no_text_is_refused(make_tokenizer, odd):
    with pytest.raises(ModelError, match="cannot be used"):
        check_tokenizer(make_tokenizer(odd))


def test_a_template_that_fails_on_answers_is_warned_of(make_tokenizer, template):
    deaf = "{% for m in messages if m['role'] == 'assistant' %}{{ 1 / 0 }}{% endfor %}" + template
    (warning,) = check_tokenizer(make_tokenizer(deaf))
    assert "fails on a message of the assistant's (ZeroDivisionError" in warning


def test_options_of_a_template_that_cannot_be_read_are_refused(make_tokenizer):
    with pytest.raises(ModelError, match="cannot be used: Expected an expression"):
        set_template_options(make_tokenizer("{% for %}"), {"think": True})
