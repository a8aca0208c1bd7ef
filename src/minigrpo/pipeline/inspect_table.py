"""Show the tokens of one group in a terminal, coloured by what an update did to them, or in plain words."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.text import Text

from minigrpo.ui.plain_text import one_line, printable

if TYPE_CHECKING:
    from minigrpo.pipeline.inspect_group import InspectedGroup, Sibling, TokenChange

By = Literal["change", "logprob", "entropy"]
LEGENDS: dict[By, str] = {
    "change": "green: likelier after the update, red: less likely; the brighter, the more",
    "logprob": "red: unlikely when it was sampled, yellow: less so",
    "entropy": "red: many tokens were possible here, yellow: some",
}
MOST_MOVED = 5
"""Tokens of an answer that are told in words."""
BRIGHT, VISIBLE = 0.4, 0.1
"""Shares of the group's largest value from which a token is bright, and coloured at all."""


def inspected_table(found: InspectedGroup, by: By) -> RenderableType:
    """Show siblings with what they earned, the best first, and their tokens coloured `by` one of their figures."""
    asked = found.messages[-1].get("content", "") if found.messages else ""
    head = f"{found.run}, step {found.step}, group {found.number} of {found.of}: prompt {found.prompt}"
    lines: list[RenderableType] = [Text(one_line(head), style="bold"), Text(one_line(asked))]
    lines.append(Text(f"tokens: {LEGENDS[by]}", style="dim"))
    largest = max((abs(_value(token, by)) for each in found.siblings for token in each.tokens), default=0.0)
    shown: dict[tuple[TokenChange, ...], int] = {}
    for sibling in sorted(found.siblings, key=_earned):
        same = shown.setdefault(sibling.tokens, sibling.number)
        tokens = _tokens(sibling, by, largest) if same == sibling.number else [Text(f"  the same as sibling {same}")]
        lines += ["", _facts(sibling), *tokens]
    verdict = Text("These are the answers of the log, to the last byte.", style="green")
    if not found.exact:
        verdict = Text(f"Not exact, so these answers may not be the log's. {found.difference}", style="red")
    return Stack(*lines, "", verdict)


def _earned(sibling: Sibling) -> float:
    reward = sibling.logged["reward"]
    return -reward if reward == reward else 0.0


def _facts(sibling: Sibling) -> Text:
    logged = sibling.logged
    parts = ", ".join(f"{name} {value:g}" for name, value in logged["parts"].items())
    advantage = logged["advantage"]
    earned = f"reward {logged['reward']:g}" + (f" ({parts})" if parts else "")
    style = "green" if advantage > 0 else "red" if advantage < 0 else ""
    ended = "cut off" if logged["finish"] == "length" else "ended by itself"
    facts = f"  advantage {advantage:+.3f}  {len(sibling.tokens)} tokens, {ended}"
    return Text.assemble((f"sibling {sibling.number}: ", "bold"), (earned, style), facts)


def _tokens(sibling: Sibling, by: By, largest: float) -> Iterator[Text]:
    opening = printable(str(sibling.logged.get("opening", "")))
    coloured = ((printable(token.text), _style(token, by, largest)) for token in sibling.tokens)
    yield Text.assemble("  ", (opening, "dim"), *coloured)
    yield Text("  " + "; ".join(_words(sibling)), style="dim")


def _words(sibling: Sibling) -> Iterator[str]:
    tokens = sibling.tokens
    before, after = sum(token.logprob for token in tokens), sum(token.logprob_after for token in tokens)
    yield f"log-probability {before:.3f} -> {after:.3f} ({after - before:+.3f})"
    if tokens:
        first, then = fmean(token.entropy for token in tokens), fmean(token.entropy_after for token in tokens)
        yield f"mean entropy {first:.3f} -> {then:.3f}"
    moved = sorted(tokens, key=lambda token: -abs(token.change))[:MOST_MOVED]
    told = ", ".join(f"{printable(token.text)!r} {token.logprob:.3f} {token.change:+.3f}" for token in moved)
    yield f"moved most: {told}"
    if sibling.differs is not None:
        start, end = sibling.differs
        yield f"first other word than the best: {printable(sibling.text[start:end])!r}"


def _value(token: TokenChange, by: By) -> float:
    values: dict[By, Any] = {"change": token.change, "logprob": token.logprob, "entropy": token.entropy}
    return float(values[by])


def _style(token: TokenChange, by: By, largest: float) -> str:
    value = _value(token, by)
    share = abs(value) / largest if largest else 0.0
    if share < VISIBLE:
        return ""
    if by == "change":
        return ("bold " if share >= BRIGHT else "") + ("green" if value > 0 else "red")
    return "bold red" if share >= BRIGHT else "yellow"
