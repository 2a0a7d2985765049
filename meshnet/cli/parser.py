"""An argument parser that says what is wrong in one line, as all of meshnet does."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from meshnet.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Like argparse's, but for its error message."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with the status of a usage error."""
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(UsageError.exit_status)
