"""Three hundred broken recipes: each is refused in a sentence with exit code 2, and names the line that is wrong."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from minigrpo.cli.main import main
from minigrpo.config.fields import field_table, fields_by_name
from minigrpo.config.load import dump_recipe, load_recipe
from minigrpo.config.schema import Recipe
from minigrpo.errors import RecipeError

Lines = list[str]
Broken = tuple[Lines, int]
"""A file, and the number of the line that is wrong."""

TABLES = {knob.name for knob in field_table() if knob.is_table}
TEXTS = {knob.name for knob in field_table() if knob.kind == "text" and not knob.choices}


def refused(path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    # Asked first, so that a recipe that is right after all fails the test in place of being trained.
    with pytest.raises(RecipeError):
        load_recipe(
            str(path), [(flag.removeprefix("--"), value) for flag, value in zip(*[iter(flags)] * 2, strict=True)]
        )
    with pytest.raises(SystemExit) as ended:
        main(["train", str(path), "--run", str(path.parent / "never"), *flags])
    told = capsys.readouterr().err
    assert ended.value.code == 2, told
    assert "Traceback" not in told
    assert told.isprintable() or set(told) - set("\n") == {c for c in told if c.isprintable()}
    assert not (path.parent / "never").exists()
    return told


def whole() -> Lines:
    """A recipe file with every knob, one a line."""
    return dump_recipe(Recipe()).splitlines()


def as_toml(lines: Lines) -> Lines:
    """The same in TOML: null has no spelling there, so such lines become comments, and no line moves."""
    found = []
    for line in lines:
        if section := re.fullmatch(r"(\w+):", line):
            found.append(f"[{section[1]}]")
        elif knob := re.match(r"\s*(\w+): (.*?)(\s+#.*)?$", line):
            key, value = knob[1], knob[2]
            is_bare = re.fullmatch(r"true|false|-?[\d.]+(e[+-]?\d+)?|\{\}|\[.*\]|\"\"", value) is not None
            quoted = value if is_bare else f'"{value.strip(chr(39))}"'
            found.append(f"# {key}" if value == "null" else f"{key} = {quoted}")
        else:
            found.append(line)
    return found


def places(lines: Lines) -> dict[str, int]:
    """Index of each knob's line."""
    found, section = {}, ""
    for index, line in enumerate(lines):
        if head := re.fullmatch(r"(\w+):", line):
            section = f"{head[1]}."
        elif knob := re.match(r"(\s*)(\w+):", line):
            found[(section if knob[1] else "") + knob[2]] = index
    return found


def with_value(lines: Lines, index: int, value: str) -> Lines:
    key = lines[index].partition(":")[0]
    return [*lines[:index], f"{key}: {value}", *lines[index + 1 :]]


def misspelled(dice: random.Random) -> Broken:
    lines = whole()
    while True:
        name, index = dice.choice(list(places(lines).items()))
        section, _, leaf = name.rpartition(".")
        at = dice.randrange(len(leaf))
        wrong = leaf[:at] + dice.choice(["", leaf[at] * 2, "ß", "_"]) + leaf[at + 1 :]
        if wrong != leaf and wrong and f"{section}.{wrong}".strip(".") not in fields_by_name():
            lines[index] = lines[index].replace(f"{leaf}:", f'"{wrong}":', 1)
            return lines, index + 1


def doubled(dice: random.Random) -> Broken:
    lines = whole()
    index = dice.choice([place for name, place in places(lines).items() if name not in TABLES])
    return [*lines[: index + 1], lines[index], *lines[index + 1 :]], index + 2


def misplaced(dice: random.Random) -> Broken:
    lines = whole()
    found = places(lines)
    name = dice.choice([name for name in found if "." in name])
    leaf = name.rpartition(".")[2]
    strange = [n for n in found if "." in n and f"{n.partition('.')[0]}.{leaf}" not in fields_by_name()]
    index = found[dice.choice(strange)]
    moved = lines[found[name]].partition("  #")[0]
    return [*lines[: index + 1], moved, *lines[index + 1 :]], index + 2


def nested(dice: random.Random) -> Broken:
    lines = whole()
    name, index = dice.choice([(n, place) for n, place in places(lines).items() if n not in TABLES])
    return with_value(lines, index, f"{{{name.rpartition('.')[2]}: 1}}"), index + 1


def of_wrong_type(dice: random.Random) -> Broken:
    lines = whole()
    index = dice.choice([place for name, place in places(lines).items() if name not in TEXTS | TABLES])
    wrong = [
        "many",
        "[1, 2]",
        ".nan",
        "-.inf",
        "1e999",
        "0x1g",
        "1,5",
        "'1 0'",
        "50%",
        '"\\e[31m\\0"',
        '"\\ud800"',
        "💥",
    ]
    return with_value(lines, index, dice.choice(wrong)), index + 1


def out_of_range(dice: random.Random) -> Broken:
    lines = whole()
    ranged = {knob.name for knob in field_table() if knob.range}
    index = dice.choice([place for name, place in places(lines).items() if name in ranged])
    wrong = ["-1", "-1e-9", f"-{'9' * 400}"]
    return with_value(lines, index, dice.choice(wrong)), index + 1


def in_a_table(dice: random.Random) -> Broken:
    lines = whole()
    index = places(lines)["task.weights"]
    wrong = ["{a: b}", "{a: [1]}", "{a: {b: 1}}", "{a: 1, a: 2}", "[a]", "5", "{a: .inf}"]
    return with_value(lines, index, dice.choice(wrong)), index + 1


def no_yaml(dice: random.Random) -> Broken:
    lines = whole()
    index = dice.choice([place for name, place in places(lines).items() if name.startswith("objective.")])
    wrong = dice.choice(
        ["\trank: 3", "  lr: *nowhere", "  lr: @1", "  lr: `1`", '  lr: "\\q"', "  lr: %1", "  a: b: c"]
    )
    return [*lines[:index], wrong, *lines[index:]], index + 1


YAML = (misspelled, doubled, misplaced, nested, of_wrong_type, out_of_range, in_a_table, no_yaml)


@pytest.mark.parametrize("kind", YAML)
def test_a_mistake_in_yaml_is_named_with_its_line(
    kind: Callable[[random.Random], Broken], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(15):
        lines, wrong = kind(random.Random(f"{kind.__name__} {seed}"))
        path = tmp_path / f"{seed}.yaml"
        path.write_text("\n".join(lines), encoding="utf-8")
        assert f"{path}:{wrong}:" in refused(path, capsys), lines[wrong - 1]


@pytest.mark.parametrize("kind", [misspelled, misplaced, of_wrong_type, out_of_range])
def test_a_mistake_in_toml_is_named_with_its_line(
    kind: Callable[[random.Random], Broken], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = 0
    for seed in range(30):
        lines, wrong = kind(random.Random(f"toml {kind.__name__} {seed}"))
        line = lines[wrong - 1]
        if "null" in line or ('"' in line and kind is not misspelled):
            continue  # a comment in TOML, or not the same text there
        text = "\n".join(as_toml([line.replace('"', "") if ":" in line else line for line in lines]))
        path = tmp_path / f"{seed}.toml"
        path.write_text(text, encoding="utf-8")
        told = refused(path, capsys)
        assert f"{path}:{wrong}:" in told or "this is not TOML" in told, lines[wrong - 1]
        tried += 1
    assert tried >= 10


@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_random_bytes_bring_no_traceback(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = whole() if suffix == "yaml" else as_toml(whole())
    text = "\n".join(line.partition("  #")[0] for line in lines if not line.strip().startswith("#")).encode()
    bits = [
        b"\0",
        b"\xff",
        b"\t",
        b"{",
        b"[[",
        b"&a ",
        b"*a",
        b'"""',
        b"'",
        b"\n- ",
        b"\\U99999999",
        b"\xe2\x80\xa8",
        b"!!x ",
    ]
    for seed in range(50):
        dice = random.Random(f"{suffix} {seed}")
        broken = bytearray(text)
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(len(broken))
            broken[at : at + dice.randint(0, 2)] = dice.choice([*bits, bytes([dice.randrange(256)])])
        path = tmp_path / f"{seed}.{suffix}"
        path.write_bytes(bytes(broken))
        refused(path, capsys, "--train.lr", "nope")  # some of the files are whole all the same


@pytest.mark.parametrize(
    ("suffix", "text", "told"),
    [
        ("yaml", "seed: 1\nabout: caf\xe9\n".encode("latin-1"), ":2: byte 0xe9 is not UTF-8"),
        ("yaml", b"seed: 1\nabout: \x07\n", ":2: this is not YAML: the character U+0007"),
        ("yaml", b'seed: 1\nabout: "\\UFFFFFFFF"\n', ": this is not YAML"),
        ("yaml", b"seed: 1\0", "is not a text file"),
        ("yaml", b"%YAML " + b"9" * 5000 + b".1\n--- \nseed: 1\n", ": this is not YAML"),
        ("yaml", b"seed: " + b"9" * 5000, ":1: seed is 9"),
        ("yaml", b"a: &a {" + b"b, " * 2000 + b"}\n", "sets more than 1000 knobs"),
        ("yaml", b"seed: &a [*a]\n", ":1: seed is a list"),
        ("yaml", b"lora: &a {rank: *a}\n", ":1: lora.rank is a mapping"),
        ("yaml", b'"\\e[2J": 1\n', ":1: there is no knob \\x1b[2J"),
        ("toml", b"seed = " + b"9" * 5000, ": this is not TOML"),
        ("toml", b"seed = 0x" + b"f" * 5000, ": this is not TOML"),
        ("toml", b"[lora]\n'rank' = 0\n", ":2: lora.rank is 0"),
        ("toml", b"seed = 1\nlora = { rank = 0 }\n", ":2: lora.rank is 0"),
        ("toml", b"seed = 1\nlora . rank = 0\n", ":2: lora.rank is 0"),
        ("toml", b"[task.weights]\na = 1\nb = 'c'\n", ":3: task.weights.b is c"),
        ("toml", b"seed = 1\nabout = 'x", ":2: this is not TOML"),
    ],
)
def test_a_file_broken_on_purpose_is_refused_in_a_sentence(
    suffix: str, text: bytes, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"my.{suffix}"
    path.write_bytes(text)
    assert told in refused(path, capsys)


def test_aliases_of_aliases_cannot_fill_the_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my.yaml"
    rows = [f"{a}: &{a} [{', '.join([f'*{b}'] * 300)}]" for a, b in zip("bcdefgh", "abcdefg", strict=True)]
    path.write_text("\n".join(["a: &a [x]", *rows, "seed: *h"]), encoding="utf-8")
    assert f"{path}:9: seed is a list" in refused(path, capsys)
    bombs = ["lora: &a {" + ", ".join(f"k{i}: 1" for i in range(300)) + "}", *(["? *a\n: *a"] * 3)]
    path.write_text("\n".join(bombs), encoding="utf-8")
    assert "sets more than 1000 knobs" in refused(path, capsys)


CONTRADICTIONS: tuple[dict[str, str], ...] = (
    {"train.full": "true", "lora.dropout": "0.1"},
    {"train.inner_epochs": "2", "lora.dropout": "0.1"},
    {"objective.name": "cispo", "objective.clip_dual": "3"},
    {"objective.entropy_target": "1", "objective.entropy": "0"},
    {"objective.overlong": "64", "rollout.max_tokens": "64"},
    {"objective.importance_floor": "0.5", "objective.importance": "off"},
    {"save.take": "best", "eval.every": "0"},
    {"groups.replay": "2", "objective.importance": "off"},
    {"warmup.steps": "2", "train.full": "true"},
)


@pytest.mark.parametrize("knobs", CONTRADICTIONS, ids=" ".join)
@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_a_contradiction_names_the_lines_of_all_the_knobs_that_are_set(
    suffix: str, knobs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"my.{suffix}"
    form = "{}: {}" if suffix == "yaml" else "{} = '{}'"
    path.write_text("\n".join(["# a", *(form.format(*item) for item in knobs.items())]), encoding="utf-8")
    assert f"{path}:2 and {path}:3: " in refused(path, capsys)
    name, value = next(iter(knobs.items()))
    path.write_text("\n".join(form.format(*item) for item in knobs.items() if item[0] != name), encoding="utf-8")
    told = refused(path, capsys, f"--{name}", value)
    assert f"{path}:1 and --{name}: " in told


def test_two_contradictions_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("train: {full: true}\nlora: {dropout: 0.1}\nsave: {take: best}\n", encoding="utf-8")
    told = refused(path, capsys)
    assert f"{path}:1 and {path}:2: lora.dropout" in told
    assert f"{path}:3: save.take" in told
