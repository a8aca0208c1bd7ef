"""Chat templates that strangers bring: what they open is graded with the answer, and whatever fails in them is told."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from minigrpo.models import chat_template
from tests.helpers.command_line import DONE, REFUSED, Ended, called, started
from tests.helpers.delivered import edit_json, save_base
from tests.strangers import LIMIT_S, cases

pytestmark = [pytest.mark.long, pytest.mark.timeout(LIMIT_S)]

TASK = """
rows = [{"prompt": f"say {i}"} for i in range(4)]
system = "Be brief."

def score(completion, prompt):
    return completion.startswith(OPENING) and (len(OPENING) > 0 or not completion.startswith("<"))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strangers") / "base"
    save_base(folder, "qwen2")
    return folder


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    """Take a template for endless after half a second: hundreds are tried."""
    before = chat_template.LONGEST_RENDERING_S
    chat_template.LONGEST_RENDERING_S = 0.5
    yield
    chat_template.LONGEST_RENDERING_S = before


# Templates that work, from the parts that real ones have.


@dataclass(frozen=True)
class Template:
    """`parts`, to be joined; what the template opens of the answer."""

    parts: tuple[str, ...]
    opening: str

    @property
    def text(self) -> str:
        return "".join(self.parts)


heads = st.sampled_from(
    [
        "",
        "{{ bos_token }}",
        "{{- bos_token -}}",
        "{#- A remark. -#}",
        "{% if tools %}{{ tools | tojson }}{% endif %}",
        "{% set ns = namespace(first=true) %}",
        "Today is {{ strftime_now('%d %B %Y') }}.\n",
        "{% macro said(text) %}{{ text | trim }}{% endmacro %}",
        "{% if not messages[0].role == 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}",
        "{% if nowhere is defined and nowhere %}{{ nowhere }}{% endif %}",
    ]
)
roles = st.sampled_from(
    [
        "",
        "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
        "{% if m['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('Who?') }}{% endif %}",
        "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{% endif %}",
        "{% if m.role == 'system' %}{% continue %}{% endif %}",
    ]
)
ends = st.sampled_from(["<|im_end|>\n", "{{ '<|im_end|>' }}\n", "<|im_end|>{% if not loop.last %}\n{% endif %}"])
openings = st.sampled_from(["", "<think>\n", "<think>", "<answer>\n\n"])


@st.composite
def sound_templates(draw: st.DrawFn) -> Template:
    opening, asks = draw(openings), "{{ m.role }}\n{{ m.content }}"
    return Template(
        (
            *draw(st.lists(heads, max_size=2, unique=True)),
            "{% for m in messages %}",
            draw(roles),
            f"<|im_start|>{asks}",
            draw(ends),
            "{% endfor %}",
            f"{{% if add_generation_prompt %}}<|im_start|>assistant\n{opening}{{% endif %}}",
        ),
        opening,
    )


# What goes wrong in them.

slips = st.sampled_from(
    [
        "{{",
        "{% for %}",
        "{% endif %}",
        "{% if %}",
        "{% martian %}",
        "{{ messages | no_filter }}",
        "{{ nowhere.there }}",
        "{{ nowhere() }}",
        "{{ messages[99].role }}",
        "{{ messages.content + 1 }}",
        "{{ 'x' + 1 }}",
        "{{ 1 / 0 }}",
        "{{ '%d' % 'x' }}",
        "{{ ''.join(messages) }}",
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ '\\ud800' }}",
        "{{ '\\0' }}",
        "{{ raise_exception('why') }}",
        "{{ raise_exception(3) }}",
        "{{ strftime_now(3) }}",
        "{{ messages | tojson(indent='x') }}",
        "{{ messages | map(attribute='nowhere') | sum }}",
        "{% include 'x' %}",
        "{% extends 'x' %}",
        "{% import 'x' as y %}",
        "{% generation %}",
        "{% break %}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{% if '0' in messages[-1].content %}{% for i in lipsum(n=10**9) %}{% endfor %}{% endif %}",
        "{% macro twice(n) %}{% if n %}{{ twice(n - 1) }}{{ twice(n - 1) }}{% endif %}{% endmacro %}{{ twice(99) }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% set messages = 3 %}",
        "{% set add_generation_prompt = false %}",
        "{{ 'x' * 10_000 }}",
    ]
)


@st.composite
def faulty_templates(draw: st.DrawFn) -> str:
    """A sound template with a slip at one of its joints, without one of its parts, or cut."""
    parts = list(draw(sound_templates()).parts)
    place = draw(st.integers(0, len(parts) - 1))
    harm = draw(st.sampled_from(["slip", "slip", "lost", "cut"]))
    if harm == "slip":
        parts.insert(place, draw(slips))
    elif harm == "lost":
        del parts[place]
    text = "".join(parts)
    return text[: draw(st.integers(0, len(text)))] if harm == "cut" else text


def put(folder: Path, template: str, *, inside: bool) -> None:
    """Write the template where tools of two generations put it."""
    (folder / "chat_template.jinja").unlink()
    if inside:
        edit_json(folder / "tokenizer_config.json", chat_template=template)
    else:
        (folder / "chat_template.jinja").write_bytes(template.encode("utf-8", "surrogatepass"))


def planned(folder: Path, *, run: Callable[..., Ended] = called) -> Ended:
    return run("plan", "--json", "quickstart", "--model.path", folder, "--model.device", "cpu")


def evaluated(folder: Path, opening: str = "", *, run: Callable[..., Ended] = called) -> Ended:
    (folder.parent / "mine.py").write_text(f"OPENING = {opening!r}\n{TASK}")
    task = ("--task.name", f"{folder.parent}/mine.py:score", "--rollout.max_tokens", "2", "--model.device", "cpu")
    return run("evaluate", folder, *task, "--limit", "1", "--out", folder.parent / "found.json", "--json")


@cases(40)
@given(template=sound_templates(), inside=st.booleans())
def test_what_a_template_opens_is_graded_with_the_answer(base: Path, template: Template, inside: bool) -> None:
    event(template.opening)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(base, Path(place) / "base"))
        put(folder, template.text, inside=inside)
        ended = evaluated(folder, template.opening)
    assert ended.code == DONE, ended.err
    assert json.loads(ended.out)["model"]["scores"]["accuracy"]["value"] == 1


@cases(100)
@given(template=faulty_templates(), inside=st.booleans(), verb=st.sampled_from([evaluated, planned]))
def test_a_template_that_fails_is_refused_with_its_folder(
    base: Path, template: str, inside: bool, verb: Callable[..., Ended]
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(base, Path(place) / "base"))
        put(folder, template, inside=inside)
        ended = verb(folder)
    event(f"{verb.__name__}: {ended.code}")
    assert ended.code != REFUSED or str(folder) in ended.refused or "what the chat template adds" in ended.refused


# Files of a tokenizer that hold something else.

no_templates = st.sampled_from(
    [3, True, {}, [], [3], {"default": 3}, [{"name": "tool_use", "template": "x"}], [{"name": "default"}], [{}], " "]
)
no_tokens = st.sampled_from([3, True, {}, [], "", "nowhere to be found", {"content": 3}, {"content": "x"}, "\ud800"])
fields = st.sampled_from(["eos_token", "bos_token", "pad_token", "unk_token", "extra_special_tokens"])
others = st.sampled_from(
    [
        {"tokenizer_class": "Martian"},
        {"tokenizer_class": 3},
        {"model_max_length": "many"},
        {"model_max_length": -1},
        {"added_tokens_decoder": 3},
        {"added_tokens_decoder": {"x": {}}},
        {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
        {"clean_up_tokenization_spaces": "yes"},
        {"padding_side": "above"},
        {"model_input_names": 3},
    ]
)
settings_of_tokenizers = (
    no_templates.map(lambda value: {"chat_template": value})
    | st.builds(lambda name, value: {name: value}, fields, no_tokens)
    | others
)


@cases(60)
@given(changes=settings_of_tokenizers, verb=st.sampled_from([evaluated, planned]))
def test_odd_settings_of_a_tokenizer_are_read_or_refused_with_their_folder(
    base: Path, changes: dict[str, Any], verb: Callable[..., Ended]
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(base, Path(place) / "base"))
        if "chat_template" in changes:
            (folder / "chat_template.jinja").unlink()
        edit_json(folder / "tokenizer_config.json", **changes)
        ended = verb(folder)
    event(f"{next(iter(changes))}: {ended.code}")
    assert ended.code != REFUSED or str(folder) in ended.refused


@cases(60)
@given(
    name=st.sampled_from(["chat_template.jinja", "tokenizer_config.json", "tokenizer.json", "config.json"]),
    raw=st.binary(max_size=30)
    | st.sampled_from([b"{}", b"[]", b"null", b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b"{" * 9999]),
    verb=st.sampled_from([evaluated, planned]),
)
def test_files_of_other_bytes_are_refused_with_their_folder(
    base: Path, name: str, raw: bytes, verb: Callable[..., Ended]
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(base, Path(place) / "base"))
        (folder / name).write_bytes(raw)
        ended = verb(folder)
    assert ended.code != REFUSED or str(folder) in ended.refused


@cases(3)
@given(template=faulty_templates())
def test_a_process_of_its_own_says_the_same(base: Path, template: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(base, Path(place) / "base"))
        put(folder, template, inside=False)

        def run(*args: str | Path) -> Ended:
            return started(*args, cwd=folder.parent)

        ended = planned(folder, run=run)
    assert ended.code != REFUSED or str(folder) in ended.refused
