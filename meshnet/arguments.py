"""An argument parser that says what is wrong in one line, as all of meshnet does, and is fast.

Of the client and of the agent.  May import only the standard library and `meshnet.errors`.
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
    """Like argparse's, but for its error message, and that options are written in full."""

    def __init__(
        self,
        *,
        formatter_class: type[argparse.HelpFormatter] = argparse.HelpFormatter,
        **options: Any,  # noqa: ANN401
    ) -> None:
        # argparse makes a formatter for each argument, to check it; without a width, each would
        # import shutil and measure the terminal.
        sized = partial(formatter_class, width=_width())
        super().__init__(formatter_class=sized, allow_abbrev=False, **options)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, but a sub-command itself refuses what it does not know."""
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
    """As `argparse.HelpFormatter` has it: the terminal's, with a margin."""
    try:
        return int(os.environ.get("COLUMNS", "")) - 2
    except ValueError:
        pass
    try:
        return os.get_terminal_size(1).columns - 2
    except OSError:
        return 78
