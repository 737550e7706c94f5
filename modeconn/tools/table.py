"""Plain tables, which look the same in a terminal, a log and a file; and the same for notebooks."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Collection, Iterable, Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows under a header, the first column to the left, all others to the right.

    Example:
        >>> print(table(["", "loss"], [["line", "0.5"], ["curve", "0.25"]]))
               loss
        line    0.5
        curve  0.25
    """
    cells = [header, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for first, *others in cells:
        rest = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *rest]).rstrip())
    return "\n".join(lines)


def html_table(header: Sequence[str] | None, rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """Return the same as HTML; without a header, rows alone; columns of text to the left, where notebooks have none.

    Example:
        >>> html_table(["", "loss"], [["line", "0.5"]]).removeprefix("<table><tr>")
        '<th></th><th>loss</th></tr><tr><td style="text-align: left">line</td><td>0.5</td></tr></table>'
    """
    lines = [(row, "td") for row in rows] if header is None else [(header, "th"), *((row, "td") for row in rows)]

    def cell(tag: str, number: int, text: str) -> str:
        to_left = number in left and (tag == "td" or text)
        side = ' style="text-align: left"' if to_left else ""
        return f"<{tag}{side}>{html.escape(text)}</{tag}>"

    body = ("".join(cell(tag, number, text) for number, text in enumerate(cells)) for cells, tag in lines)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in body)}</table>"


def csv_table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    r"""Return rows under a header as comma-separated values.

    Example:
        >>> csv_table(["t", "loss"], [[0.0, 0.5]])
        't,loss\n0.0,0.5\n'
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()
