"""Write the pages that follow from the code: every knob, every command, the public Python names.

    python docs/generate.py            # writes docs/knobs.md, docs/commands.md, docs/python.md
    python docs/generate.py --check    # exit code 1 where one of them is not what the code says

No model and no torch is loaded: the schema, the command line and the source text say all of it.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer.main

import minigrpo
from minigrpo.cli.main import app
from minigrpo.cli.options import EXAMPLES, RecipeCommand
from minigrpo.config.fields import Field, field_table
from minigrpo.config.load import load_recipe, recipe_names
from minigrpo.config.schema import Recipe
from minigrpo.utils.markdown import markdown_table

KINDS = {"int": "NUMBER", "float": "NUMBER", "Path": "PATH"}
FOLDER = Path(__file__).parent
PAGE_WIDTH = 88
"""Characters of a line of code that the site shows without scrolling, on a screen of 1280 pixels."""
MADE = "<!-- Made by docs/generate.py: change the code, then run it. -->\n\n"


def knobs_page() -> str:
    """Return the recipes of the package, and every knob by section, with its default and what it takes."""
    text = (
        f"{MADE}# Recipes and knobs\n\nA recipe is a YAML or TOML file of knobs. What it leaves out keeps its default. "
        "Each knob is also an\noption of `preflight`, `train` and `run`: `--lora.rank 16`. "
        "`minigrpo recipes NAME > mine.yaml` writes a whole recipe, with\nwhat each knob does.\n\n"
        "## The recipes of the package\n\n"
    )
    recipes = [(name, load_recipe(name)) for name in recipe_names()]
    rows = [(f"`{name}`", f"`{one.model.path}`", str(one.train.steps), one.about) for name, one in recipes]
    text += markdown_table(("recipe", "model", "steps", "what it is for"), rows) + "\n"
    sections: dict[str, list[Field]] = {}
    for knob in field_table():
        sections.setdefault(knob.name.rpartition(".")[0], []).append(knob)
    for section, knobs in sections.items():
        about = type(getattr(Recipe(), section)).__dict__.get("__doc__") if section else None
        text += f"\n## {section or 'Beside the sections'}\n\n" + (f"{inspect.cleandoc(about)}\n\n" if about else "")
        rows = [(f"`{knob.name}`", f"`{knob.shown_default}`", knob.expects, _about(knob)) for knob in knobs]
        text += markdown_table(("knob", "default", "takes", "what it does"), rows) + "\n"
    return text


def _about(knob: Field) -> str:
    return knob.about + (f" ({knob.unit})" if knob.unit else "")


def commands_page() -> str:
    """Return every command with its arguments, options and examples."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    codes = "Exit code 0: done; 1: the answer is no; 2: it could not be done, and a sentence says why."
    text = f"{MADE}# Every command\n\n{codes}\n"
    for name, command in commands.items():
        arguments = [param for param in command.params if param.param_type_name == "argument"]
        shown = " ".join(f"[{one.name}]" if not one.required else one.name for one in arguments).upper()
        text += f"\n## minigrpo {name}\n\n```text\nminigrpo {' '.join((name, shown)).strip()} [OPTIONS]\n```\n\n"
        text += inspect.cleandoc(command.help or "").replace("\f", "") + "\n\n"
        rows = [(_option(param), _plain(param)) for param in command.params]
        if rows:
            text += markdown_table(("option", "what it does"), rows) + "\n"
        if isinstance(command, RecipeCommand):
            text += "\nEvery [knob](knobs.md) of a recipe is an option, too.\n"
        text += f"\n```bash\n{inspect.cleandoc(EXAMPLES[name])}\n```\n"
    return text


def _option(param: Any) -> str:
    if param.param_type_name == "argument":
        return f"`{param.name.upper()}`"
    kind = getattr(param.type_descriptor.annotation, "__name__", "text")
    takes = "" if param.is_flag else f" {param.metavar or KINDS.get(kind, 'TEXT')}"
    return f"`{', '.join([*param.opts, *param.secondary_opts])}{takes}`"


def _plain(param: Any) -> str:
    """Return what an option does, and its default where it is told."""
    default = param.show_default if isinstance(param.show_default, str) else param.default
    if param.param_type_name == "argument":
        default = None
    elif param.is_flag:
        default = param.opts[0] if default and param.secondary_opts else None
    told = f" Default: {default}." if default not in (None, "", ()) else ""
    return " ".join(f"{param.help or ''}{told}".split()).replace("|", "\\|")


def python_page() -> str:
    """Return the public names with their signatures and docstrings, read from the source without importing it."""
    text = f"{MADE}# Python\n\nWhat `import minigrpo` hands out. Each name is imported when it is first used.\n"
    for home, names in minigrpo.HOMES.items():
        text += f"\n## {home}\n" + "".join(_entry(_definition(home, name)) for name in names)
    return text


def _definition(home: str, name: str) -> ast.FunctionDef | ast.ClassDef:
    """Return where a module defines a name, or where the module takes it from does."""
    spec = find_spec(home)
    assert spec is not None
    assert spec.origin is not None
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and node.module and name in [each.name for each in node.names]:
            return _definition(node.module, name)
    raise LookupError(f"{home} has no {name}")


def _entry(node: ast.FunctionDef | ast.ClassDef) -> str:
    about = ast.get_docstring(node) or ""
    if isinstance(node, ast.FunctionDef):
        return f"\n### {node.name}\n\n```python\n{_signature(node)}\n```\n\n{about}\n"
    lines = [f"class {node.name}({', '.join(ast.unparse(base) for base in node.bases)})".replace("()", "")]
    lines += [f"    {ast.unparse(field)}" for field in node.body if isinstance(field, ast.AnnAssign)]
    methods = [each for each in node.body if isinstance(each, ast.FunctionDef) and not each.name.startswith("_")]
    text = f"\n### {node.name}\n\n```python\n" + "\n".join(lines) + f"\n```\n\n{about}\n"
    return text + "".join(_method(each) for each in methods if ast.get_docstring(each))


def _signature(node: ast.FunctionDef) -> str:
    """Return a function's head, with a line for each parameter where one line is wider than a page."""
    line = _line(node)
    if len(line) <= PAGE_WIDTH:
        return line
    lines = "".join(f"    {one},\n" for one in _parameters(node.args))
    return f"def {node.name}(\n{lines}){line[len(f'def {node.name}({ast.unparse(node.args)})') :]}"


def _line(node: ast.FunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"def {node.name}({ast.unparse(node.args)}){returns}"


def _parameters(args: ast.arguments) -> Iterator[str]:
    """Yield the parameters one by one, each as it is written, with the marks * and **."""
    defaults = [None] * (len(args.posonlyargs) + len(args.args) - len(args.defaults)) + list(args.defaults)
    for one, default in zip([*args.posonlyargs, *args.args], defaults, strict=True):
        yield _parameter(one, default)
    if args.vararg or args.kwonlyargs:
        yield f"*{ast.unparse(args.vararg) if args.vararg else ''}"
    for one, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        yield _parameter(one, default)
    if args.kwarg:
        yield f"**{ast.unparse(args.kwarg)}"


def _parameter(one: ast.arg, default: ast.expr | None) -> str:
    if default is None:
        return ast.unparse(one)
    return f"{ast.unparse(one)} = {ast.unparse(default)}" if one.annotation else f"{one.arg}={ast.unparse(default)}"


def _method(node: ast.FunctionDef) -> str:
    about = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
    named = any("property" in ast.unparse(each) for each in node.decorator_list)
    return f"\n- `{node.name if named else _line(node).removeprefix('def ')}`: {about}\n"


PAGES = {"knobs.md": knobs_page, "commands.md": commands_page, "python.md": python_page}


def stale_pages() -> Iterator[str]:
    """Yield the names of pages that are not what the code says."""
    for name, page in PAGES.items():
        file = FOLDER / name
        if not file.is_file() or file.read_text(encoding="utf-8") != page():
            yield name


if __name__ == "__main__":
    if "--check" in sys.argv:
        stale = list(stale_pages())
        sys.exit(f"not what the code says: {', '.join(stale)}. Run: python docs/generate.py" if stale else 0)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
