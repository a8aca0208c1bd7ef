"""Tables without lines, in which all results are shown."""

from __future__ import annotations

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text


def plain_table(*columns: str) -> Table:
    """Begin a table narrow enough for 80 columns; names are shown as they are, never read as markup."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=any(columns))
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(Text(column), no_wrap=len(columns) > 1)
    return table


def titled(title: str, *parts: RenderableType) -> RenderableType:
    """Put a title above the parts; a rich table would break its own title to the table's width."""
    return Stack("", Text(title, style="bold"), *parts, "")
