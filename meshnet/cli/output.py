"""What commands print: one JSON document, or a table for people."""

from __future__ import annotations

import json

TYPE_CHECKING = False  # see meshnet.unix_http
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

QUIET_S = 1.0
"""A command that takes longer says so if standard error is a terminal."""


def print_json(document: Any) -> None:  # noqa: ANN401
    """Print one document on standard output, and nothing else."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def print_either(as_json: bool, document: Any, line: object) -> int:  # noqa: ANN401
    """Print the document, or one line for people; returns exit status 0."""
    if as_json:
        print_json(document)
    else:
        print(line)
    return 0


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under a header, columns as wide as their widest cell."""
    cells = [list(header), *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(line.rstrip())


def joined(values: Iterable[object]) -> str:
    """Join values to the text of one cell; a dash if there are none."""
    return ", ".join(map(str, values)) or "-"
