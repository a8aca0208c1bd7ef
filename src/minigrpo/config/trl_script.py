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
FIRST_ARGUMENT = {"model": "model_name", "data": "path", "trainer": "model"}
"""What the first positional argument of a call is called, by group. `get_peft_model`'s is a model object."""
OPERATIONS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


@dataclass(frozen=True, slots=True)
class Named:
    """An argument that names something of the script: a function, or a list of functions."""

    name: str
    functions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TrlSettings:
    """What was set, by group (`config`: GRPOConfig's fields), and sentences on what could not be read.

    `runs_when_imported`: the script trains as soon as it is imported, so that no task can be taken from it.
    """

    groups: Mapping[str, Mapping[str, Any]]
    unread: tuple[str, ...] = ()
    script: Path | None = None
    runs_when_imported: bool = False


@dataclass(slots=True)
class _Reading:
    """Names of the script with their values, while it is read, and what was found."""

    values: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


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
    for node in _in_order(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            reading.values[node.name] = Named(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            _keep_value(reading, node.targets[0].id, node.value)
        elif isinstance(node, ast.Call):
            _keep_call(reading, node)
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


def _is_guarded(block: ast.stmt) -> bool:
    """Return whether a block does not run on import: a definition, or what stands under `if __name__ == ...`."""
    if isinstance(block, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return True
    return isinstance(block, ast.If) and "__name__" in ast.unparse(block.test)


def _called(node: ast.Call) -> str:
    """Return the last part of a call's name."""
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _keep_value(reading: _Reading, name: str, node: ast.expr) -> None:
    try:
        value = _value(node, reading.values)
    except ValueError:
        reading.values.pop(name, None)
        return
    if isinstance(value, list) and value and all(isinstance(item, Named) for item in value):
        value = Named(name, tuple(item.name for item in value))
    reading.values[name] = value


def _keep_call(reading: _Reading, node: ast.Call) -> None:
    name = _called(node)
    group = CALLS.get(name)
    if group is None or (name == "from_pretrained" and "Tokenizer" in ast.unparse(node.func)):
        return
    kept = reading.groups.setdefault(group, {})
    arguments = [(keyword.arg, keyword.value) for keyword in node.keywords if keyword.arg]
    if node.args and group in FIRST_ARGUMENT:
        arguments.append((FIRST_ARGUMENT[group], node.args[0]))
    if len(node.args) > 1 and group == "data":
        arguments.append(("name", node.args[1]))
    for option, given in arguments:
        try:
            kept[option] = _value(given, reading.values)
        except ValueError:
            if group != "trainer" or option in ("model", "reward_funcs"):
                told = ast.unparse(given)
                reading.unread.append(f"{name}({option}={told[:60]}) could not be read")


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    """Work out an expression of constants and known names. Raise ValueError where it is anything else."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in values:
            return values[name]
        case ast.Attribute(attr=attr) if attr in ("bfloat16", "float16", "float32"):
            return attr
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, values) for item in items]
        case ast.Dict(keys=keys, values=items) if all(keys):
            return {_value(key, values): _value(item, values) for key, item in zip(keys, items, strict=True) if key}
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(_value(operand, values))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
            return _computed(OPERATIONS[type(op)], _value(left, values), _value(right, values))
    raise ValueError("not a constant")


def _computed(operation: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    try:
        return operation(_number(left), _number(right))
    except (ArithmeticError, OverflowError):
        raise ValueError("not a number") from None


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("not a number")
    return value
