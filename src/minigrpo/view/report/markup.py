"""HTML in which a text can only be text: whatever is not Markup is escaped when it goes into a tag."""

from __future__ import annotations

import re
from html import escape
from typing import Any

STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
"""Characters that steer the display, and halves of surrogate pairs, which no file of UTF-8 can hold."""
LONGEST_TEXT = 4000
"""Characters of a model's text that are shown."""
VOID = ("meta", "link", "br")
"""Tags without an end."""


class Markup(str):
    """HTML that is finished."""

    __slots__ = ()


def tag(name: str, /, *inside: Any, **attributes: Any) -> Markup:
    """Write a tag. None inside it, or as an attribute, is left out; `class_` means class, `aria_label` aria-label."""
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    words = "".join(f' {key}="{escape(STEERING.sub(_code, str(value)))}"' for key, value in pairs)
    return Markup(f"<{name}{words}>" if name in VOID else f"<{name}{words}>{joined(*inside)}</{name}>")


def joined(*parts: Any) -> Markup:
    return Markup("".join(_markup(part) for part in parts if part is not None))


def _markup(part: Any) -> str:
    return part if isinstance(part, Markup) else signed_text(str(part))


def signed_text(text: str) -> Markup:
    """Escape a text, and write a sign in place of each character that steers the display."""
    shown, at = "", 0
    for found in STEERING.finditer(text):
        shown += f'{escape(text[at : found.start()])}<span class="sign">{_code(found)}</span>'
        at = found.end()
    return Markup(shown + escape(text[at:]))


def _code(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 32 else f"U+{number:04X}"


def model_text(text: Any) -> Markup:
    """Show what a model wrote, or what it was asked, as text; of a long one its beginning."""
    text = str(text)
    rest = len(text) - LONGEST_TEXT
    more = tag("i", f" … and {rest:,} more characters", class_="soft") if rest > 0 else None
    return tag("div", text[:LONGEST_TEXT] or tag("i", "nothing", class_="soft"), more, class_="model-text", dir="auto")


def table(head: list[str], rows: list[list[Any]], *, caption: str | None = None) -> Markup:
    """Write a table whose first column names the rows; it scrolls where it is too wide for the page."""
    heads = [tag("th", name, scope="col", class_=None if at else "text") for at, name in enumerate(head)]
    body = [
        tag("tr", tag("th", row[0], scope="row", class_="text"), *(tag("td", cell) for cell in row[1:])) for row in rows
    ]
    whole = tag(
        "table", tag("caption", caption) if caption else None, tag("thead", tag("tr", *heads)), tag("tbody", *body)
    )
    return tag(
        "div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption or ", ".join(filter(None, head))
    )


def facts(pairs: list[tuple[str, Any]]) -> Markup:
    """Write names with what they are; those without anything are left out."""
    known = [(name, shown) for name, shown in pairs if shown not in (None, "", "–")]
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", shown)) for name, shown in known), class_="facts-list")


def figure(value: Any) -> str:
    """Write a number with three digits or more; anything else as a dash."""
    if not isinstance(value, int | float) or value != value:
        return "–"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{int(value):,}".replace("-", "−")
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.2e}".replace("-", "−")
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}").replace("-", "−")


def signed(value: float) -> str:
    fixed = f"{abs(value):.3f}"
    return ("" if float(fixed) == 0 else "+" if value > 0 else "−") + fixed


def percent(value: Any) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, int | float) else "–"


def interval(low: float, high: float, show: Any = signed) -> Markup:
    return tag("span", f"[{show(low)}, {show(high)}]", class_="interval")
