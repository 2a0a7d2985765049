"""Writes the manual pages from the programs' own argument parsers.

``python manpages.py DIRECTORY`` makes ``meshnet.1``, a page for each of its commands, and
``meshnet-agent.8``.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# Settings of whoever builds must not get into the pages; and argparse wraps usages at this width.
for _name in [name for name in os.environ if name.startswith("MESHNET_")]:
    del os.environ[_name]
os.environ["COLUMNS"] = "80"

from meshnet.cli.main import make_parser  # noqa: E402
from meshnet_agent.main import make_parser as make_agent_parser  # noqa: E402


def write_pages(directory: Path) -> None:
    """Write all pages, in folders of their sections, as ``MANPATH`` has them."""
    for section, parser in ((1, make_parser()), (8, make_agent_parser())):
        pages = dict(_walk(parser))
        folder = directory / f"man{section}"
        folder.mkdir(parents=True, exist_ok=True)
        for found in pages.values():
            text = _page(found, section, [f"{name}({section})" for name in pages])
            folder.joinpath(f"{_dashed(found)}.{section}").write_text(text)


def _walk(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield _dashed(parser), parser
    for group in _groups(parser):
        for command in group.choices.values():
            yield from _walk(command)


def _groups(
    parser: argparse.ArgumentParser,
) -> list[argparse._SubParsersAction[argparse.ArgumentParser]]:
    return [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]


def _dashed(parser: argparse.ArgumentParser) -> str:
    return parser.prog.replace(" ", "-")


def _page(parser: argparse.ArgumentParser, section: int, pages: list[str]) -> str:
    name = _dashed(parser)
    description = " ".join((parser.description or "").split())
    summary = re.split(r"(?<=[a-z)])[.:] ", description)[0].rstrip(".")
    usage = parser.format_usage().removeprefix("usage: ")
    out = [f'.TH "{name.upper()}" {section} "" meshnet meshnet']
    out += [".SH NAME", f"{_escape(name)} \\- {_escape(summary)}"]
    out += [".SH SYNOPSIS", ".nf", _escape(usage.rstrip()), ".fi"]
    out += [".SH DESCRIPTION", _escape(description)]
    formatter = parser._get_formatter()
    options = [a for a in parser._actions if not isinstance(a, argparse._SubParsersAction)]
    if options:
        out.append(".SH OPTIONS")
    for action in options:
        if action.help == argparse.SUPPRESS:
            continue
        out += [".TP", f"\\fB{_escape(formatter._format_action_invocation(action))}\\fR"]
        out.append(_escape(formatter._expand_help(action) if action.help else ""))
    for group in _groups(parser):
        out.append(".SH COMMANDS")
        for command in group._choices_actions:
            out += [".TP", f"\\fB{_escape(command.dest)}\\fR", _escape(command.help or "")]
    if parser.epilog:
        out += [".SH NOTES", ".nf", _escape(parser.epilog.rstrip()), ".fi"]
    near = [p for p in pages if p.partition("(")[0] in _relatives(name, pages)]
    if near:
        out += [".SH SEE ALSO", _escape(", ".join(near))]
    return "\n".join(out) + "\n"


def _relatives(name: str, pages: list[str]) -> set[str]:
    """The page above, and those right below."""
    names = {page.partition("(")[0] for page in pages}
    below = {n for n in names if n.rpartition("-")[0] == name}
    return below | ({name.rpartition("-")[0]} & names)


def _escape(text: str) -> str:
    r"""As roff text: ``\`` and ``-`` are special, ``.`` and ``'`` at a line's start."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^(?=[.'])", r"\\&", text, flags=re.MULTILINE)


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
