"""The argument parser of client and agent: fast, and its errors are one line like all of meshnet's.

May import only the standard library and `meshnet.errors`.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import cache, partial

from meshnet.errors import UsageError

TYPE_CHECKING = False  # see meshnet.unix_http
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's parser, with one-line errors, and options that must be written in full."""

    def __init__(
        self,
        *,
        formatter_class: type[argparse.HelpFormatter] = argparse.HelpFormatter,
        **options: Any,  # noqa: ANN401
    ) -> None:
        # argparse makes a formatter for each argument, to check it; without a width, each would
        # import shutil and measure the terminal.
        sized = partial(formatter_class, width=_width())
        # No abbreviations: a script that uses one would break when another option begins like it.
        super().__init__(formatter_class=sized, allow_abbrev=False, **options)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as argparse does, but let a subcommand refuse unknown arguments itself.

        argparse collects them and has the main parser refuse them, which would name the help of
        ``meshnet`` instead of the command's.
        """
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with the status of a usage error."""
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(UsageError.exit_status)


@cache
def _width() -> int:
    """The width of help texts, as in `argparse.HelpFormatter`: the terminal's less a margin."""
    try:
        return int(os.environ.get("COLUMNS", "")) - 2
    except ValueError:
        pass
    try:
        return os.get_terminal_size(1).columns - 2
    except OSError:
        return 78
