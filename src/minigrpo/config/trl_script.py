"""Read what a script or a configuration file written for TRL or Unsloth sets, without running it.

A script is parsed, never imported: importing it would begin its training. What it computes from constants is worked
out; what it takes from elsewhere (arguments, the environment) is left out and named.
"""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from minigrpo.config.parse import MAX_FILE_BYTES
from minigrpo.errors import RecipeError

CALLS = {
    "GRPOConfig": "config",
    "LoraConfig": "lora",
    "get_peft_model": "lora",
    "BitsAndBytesConfig": "quantize",
    "from_pretrained": "model",
    "load_dataset": "data",
    "GRPOTrainer": "trainer",
}
"""Callables whose arguments are settings, by the group that they belong to."""
POSITIONAL: Mapping[str, tuple[str, ...]] = {
    "model": ("model_name",),
    "data": ("path", "name"),
    "trainer": ("model", "reward_funcs", "args", "train_dataset"),
}
"""What the first positional arguments of a call are called, by group. `get_peft_model`'s is a model object."""
HANDED_OVER = {"args": "config", "peft_config": "lora"}
"""Arguments of the trainer whose fields may have been set one by one, with the group that they belong to."""
OPERATIONS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}
UNSLOTH_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "model": {"load_in_4bit": True},
    "lora": {
        "r": 16,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
}
"""What FastLanguageModel's functions take where nothing is said, by group."""
LARGEST_IN_POWER = 64
"""Base and exponent: what is larger is no setting, and could take forever."""


@dataclass(frozen=True, slots=True)
class Named:
    """An argument that names something of the script: a function, or a list of functions."""

    name: str
    functions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Fields:
    """What a class of the script holds by name: defaults, and what an instance was made with."""

    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Unread:
    """A setting whose value cannot be worked out, with a sentence that shows it."""

    group: str
    option: str
    told: str


@dataclass(frozen=True, slots=True)
class TrlSettings:
    """What was set, by group (`config`: GRPOConfig's fields), and what could not be read.

    `runs_when_imported`: the script trains as soon as it is imported, so that no task can be taken from it.
    """

    groups: Mapping[str, Mapping[str, Any]]
    unread: tuple[Unread, ...] = ()
    script: Path | None = None
    runs_when_imported: bool = False


@dataclass(frozen=True, slots=True)
class _Given:
    """A setting as it stands in the script. `known` holds its value, or nothing where it cannot be worked out."""

    option: str
    known: tuple[Any, ...]
    text: str


@dataclass(slots=True)
class _Reading:
    """Names of the script with their values, while it is read, and what was found.

    `attributes`: what was assigned to a name's attributes (`args.max_steps = 10`), in order.
    `handed_over`: names that were given to the trainer, with the group whose fields their attributes are.
    `imported`: names from other modules, which are functions where the trainer takes them for rewards.
    """

    values: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    unread: list[Unread] = field(default_factory=list)
    attributes: dict[str, list[_Given]] = field(default_factory=dict)
    handed_over: dict[str, str] = field(default_factory=dict)
    imported: dict[str, Named] = field(default_factory=dict)


def read_trl(path: Path) -> TrlSettings:
    """Read a script (.py), or TRL's own file of options (.yaml, .json). Raise RecipeError where it is neither."""
    try:
        raw = path.read_bytes()
    except OSError as fault:
        raise RecipeError(f"{path} cannot be read: {fault.strerror or fault}.") from None
    try:
        if len(raw) > MAX_FILE_BYTES:
            raise ValueError("it is longer than any script or configuration")
        text = raw.decode("utf-8-sig")
        if path.suffix == ".py":
            return _read_script(path, ast.parse(text))
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError, yaml.YAMLError) as fault:
        reason = " ".join(str(fault).split())[:200]
        raise RecipeError(f"{path} is no script (.py) or configuration (.yaml, .json) of TRL: {reason}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path} holds no settings: a configuration is a mapping of names to values.")
    return TrlSettings({"config": {str(name): value for name, value in data.items()}})


def _read_script(path: Path, tree: ast.Module) -> TrlSettings:
    reading = _Reading()
    branches, fields = _in_branches(tree), _in_classes(tree)
    shadowed = _shadowed(tree)
    for node in _in_order(tree):
        hidden = {name: reading.values.pop(name) for name in shadowed.get(id(node), ()) if name in reading.values}
        if isinstance(node, ast.Call):
            _keep_call(reading, node)
        elif id(node) not in fields:
            _keep_statement(reading, node, certain=id(node) not in branches)
        reading.values |= hidden
    _keep_attributes(reading)
    if not reading.groups.keys() & {"config", "trainer"}:
        raise RecipeError(f"{path} calls neither GRPOConfig nor GRPOTrainer: it is no script for TRL's GRPO.")
    guarded = {id(node) for block in tree.body if _is_guarded(block) for node in ast.walk(block)}
    runs = any(
        isinstance(node, ast.Call) and id(node) not in guarded and _called(node) == "train" for node in ast.walk(tree)
    )
    return TrlSettings(reading.groups, tuple(dict.fromkeys(reading.unread)), path, runs)


def _in_order(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the nodes by line: a name is known before it is used."""
    nodes = [node for node in ast.walk(tree) if hasattr(node, "lineno")]
    yield from sorted(nodes, key=lambda node: (node.lineno, not isinstance(node, ast.stmt)))


def _is_guarded(block: ast.AST) -> bool:
    """Return whether a block does not run on import: a definition, or what stands under `if __name__ == ...`."""
    if isinstance(block, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return True
    return isinstance(block, ast.If) and "__name__" in ast.unparse(block.test)


def _called(node: ast.Call) -> str:
    """Return the last part of a call's name."""
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _in_branches(tree: ast.Module) -> set[int]:
    """Return the ids of the nodes that run only sometimes, or more than once: what they set is not known."""
    kinds = ast.If | ast.For | ast.AsyncFor | ast.While | ast.ExceptHandler | ast.match_case
    branches = (node for node in ast.walk(tree) if isinstance(node, kinds))
    return {id(node) for branch in branches if not _is_guarded(branch) for node in ast.walk(branch)}


def _shadowed(tree: ast.Module) -> dict[int, set[str]]:
    """Return, for each node in the body of a function, its parameters: in there, names of the script mean others."""
    found: dict[int, set[str]] = {}
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
        given = function.args
        names = {each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)}
        for node in (inner for line in function.body for inner in ast.walk(line)):
            found[id(node)] = found.get(id(node), set()) | names
    return found


def _in_classes(tree: ast.Module) -> set[int]:
    """Return the ids of the statements in the bodies of classes: the names that they set are no names of the script."""
    return {id(line) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for line in node.body}


def _keep_statement(reading: _Reading, node: ast.AST, *, certain: bool) -> None:
    """Keep the names that a statement sets; where it runs only sometimes, forget them."""
    match node:
        case ast.ImportFrom(names=names):
            reading.imported |= {each.asname or each.name: Named(each.asname or each.name) for each in names}
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            reading.values[name] = Named(name)
        case ast.ClassDef(name=name, body=body):
            reading.values[name] = Fields(_defaults(body, reading.values))
        case ast.Assign(targets=[target], value=value) | ast.AnnAssign(target=target, value=ast.expr() as value):
            for each, given in _pairs(target, value):
                _keep_value(reading, each, given if certain else None)
        case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=value):
            changed = ast.BinOp(ast.Name(name, ast.Load()), op, value)
            _keep_value(reading, target, changed if certain else None)


def _defaults(body: list[ast.stmt], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a class that have a value which can be worked out; `field(default=...)` is one."""
    found: dict[str, Any] = {}
    for line in body:
        if isinstance(line, ast.AnnAssign | ast.Assign) and line.value is not None:
            target = line.target if isinstance(line, ast.AnnAssign) else line.targets[0]
            given = line.value
            if isinstance(given, ast.Call) and _called(given) == "field":
                given = _default_of(given)
            if isinstance(target, ast.Name) and (known := _known(given, values)):
                found[target.id] = known[0]
    return found


def _default_of(call: ast.Call) -> ast.expr:
    """Return what `field(default=...)`, or `field(default_factory=lambda: ...)`, gives; else the call."""
    for keyword in call.keywords:
        if keyword.arg == "default":
            return keyword.value
        if keyword.arg == "default_factory" and isinstance(keyword.value, ast.Lambda):
            return keyword.value.body
    return call


def _pairs(target: ast.expr, value: ast.expr) -> list[tuple[ast.expr, ast.expr | None]]:
    """Return each name that is set with what it is set to: `a, b = 1, 2` sets two, `a, b = f()` to what is unknown."""
    if not isinstance(target, ast.Tuple):
        return [(target, value)]
    if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts):
        return list(zip(target.elts, value.elts, strict=True))
    return [(each, None) for each in target.elts]


def _keep_value(reading: _Reading, target: ast.expr, node: ast.expr | None) -> None:
    """Keep what a name, or a name's attribute, is set to; forget it where that is not known."""
    known = _known(node, reading.values) if node else ()
    match target:
        case ast.Attribute(value=ast.Name(id=name), attr=attribute):
            text = ast.unparse(node)[:60] if node else "..."
            reading.attributes.setdefault(name, []).append(_Given(attribute, known, text))
            if isinstance(held := reading.values.get(name), Fields):
                kept = {field: value for field, value in held.values.items() if field != attribute}
                reading.values[name] = Fields(kept | ({attribute: known[0]} if known else {}))
        case ast.Name(id=name) if known:
            reading.values[name] = _as_functions(name, known[0])
        case ast.Name(id=name):
            reading.values.pop(name, None)


def _as_functions(name: str, value: Any) -> Any:
    """Return a list of functions as one thing with a name; anything else as it is."""
    if isinstance(value, list) and value and all(isinstance(item, Named) for item in value):
        return Named(name, tuple(item.name for item in value))
    return value


def _keep_call(reading: _Reading, node: ast.Call) -> None:
    name = _called(node)
    group = CALLS.get(name)
    if group is None or (name == "from_pretrained" and "Tokenizer" in ast.unparse(node.func)):
        return
    kept = reading.groups.setdefault(group, {})
    if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value).startswith("Fast"):
        kept |= UNSLOTH_DEFAULTS.get(group, {})
    for given in _arguments(node, group, reading):
        if group == "trainer" and given.option in HANDED_OVER and given.known != (None,):
            reading.handed_over[given.text] = HANDED_OVER[given.option]
        if given.known:
            kept[given.option] = given.known[0]
        else:
            told = f"{given.option}={given.text}".replace("**=", "**")
            reading.unread.append(Unread(group, given.option, f"{name}({told}) could not be read"))


def _arguments(node: ast.Call, group: str, reading: _Reading) -> Iterator[_Given]:
    """Yield what a call is given, what a `**mapping` holds one by one where the mapping is known."""
    named = [(keyword.arg or "**", keyword.value) for keyword in node.keywords]
    for option, value in (*zip(POSITIONAL.get(group, ()), node.args, strict=False), *named):
        known = _known(value, {**reading.imported, **reading.values} if option == "reward_funcs" else reading.values)
        if option == "**" and known and isinstance(known[0], dict):
            yield from (_Given(str(each), (held,), str(held)) for each, held in known[0].items())
        else:
            yield _Given(option, () if option == "**" else known, ast.unparse(value)[:60])


def _keep_attributes(reading: _Reading) -> None:
    """Take what was assigned to the fields of the trainer's arguments, after they were made."""
    for name, group in reading.handed_over.items():
        if group not in reading.groups:
            reading.unread.append(Unread(group, "**", f"What {name} holds could not be read"))
        kept = reading.groups.setdefault(group, {})
        for given in reading.attributes.get(name, ()):
            kept.pop(given.option, None)
            if given.known:
                kept[given.option] = given.known[0]
            else:
                told = f"{name}.{given.option} = {given.text} could not be read"
                reading.unread.append(Unread(group, given.option, told))


def _known(node: ast.expr, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the value of an expression as the one element of a tuple; an empty one where it cannot be worked out."""
    try:
        return (_value(node, values),)
    except ValueError:
        return ()


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    """Work out an expression of constants and known names. Raise ValueError where it is anything else."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in values:
            return values[name]
        case ast.Attribute(attr=attr) if attr in ("bfloat16", "float16", "float32"):
            return attr
        case ast.Attribute(value=owner, attr=attr):
            held = _value(owner, values)
            if isinstance(held, Fields) and attr in held.values:
                return held.values[attr]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, values) for item in items]
        case ast.Dict(keys=keys, values=items):
            return _mapping(
                [(key and _value(key, values), item) for key, item in zip(keys, items, strict=True)], values
            )
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(_value(operand, values))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
            return _computed(OPERATIONS[type(op)], _value(left, values), _value(right, values))
        case ast.JoinedStr(values=pieces):
            return "".join(_piece(piece, values) for piece in pieces)
        case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords):
            return _made(name, keywords, values)
    raise ValueError("not a constant")


def _mapping(items: list[tuple[Any, ast.expr]], values: Mapping[str, Any]) -> dict[Any, Any]:
    """Work out a dict by its keys and expressions; a key of None stands before a mapping whose items are taken."""
    made: dict[Any, Any] = {}
    for key, item in items:
        value = _value(item, values)
        if key is None and not isinstance(value, dict):
            raise ValueError("not a mapping")
        made |= value if key is None else {key: value}
    return made


def _made(name: str, keywords: list[ast.keyword], values: Mapping[str, Any]) -> Any:
    """Work out `dict(a=1)`, and an instance of a class of the script by its fields."""
    given = _mapping([(keyword.arg, keyword.value) for keyword in keywords], values)
    held = values.get(name)
    if isinstance(held, Fields):
        return Fields({**held.values, **given})
    if name == "dict" and held is None:
        return given
    raise ValueError("not a constant")


def _piece(node: ast.expr, values: Mapping[str, Any]) -> str:
    """Work out a piece of an f-string, of those that hold words and names alone."""
    if isinstance(node, ast.FormattedValue):
        value = _value(node.value, values)
        if node.format_spec or node.conversion != -1 or not isinstance(value, str | int | float):
            raise ValueError("not a plain text")
        return str(value)
    return str(_value(node, values))


def _computed(operation: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    if operation is operator.pow and max(abs(_number(left)), abs(_number(right))) > LARGEST_IN_POWER:
        raise ValueError("too large a power")
    try:
        return _number(operation(_number(left), _number(right)))
    except (ArithmeticError, OverflowError):
        raise ValueError("not a number") from None


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("not a number")
    return value
