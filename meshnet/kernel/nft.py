"""Our nftables table: loading it in one transaction, and telling whether it is still as loaded.

The kernel's listing of a table is not the text that made it, so after a load the listing's digest
is remembered next to the text (in a file, so that a restarted agent need not load again): while
the listing has that digest, the table *is* the text.  Counters are left out of listings.

Runs ``nft`` (Debian package nftables) without a shell; scripts go in by standard input.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from typing import TYPE_CHECKING

from meshnet.errors import KernelRefusedError
from meshnet.firewall import TABLE

if TYPE_CHECKING:
    from pathlib import Path

_TIMEOUT_S = 30


class NftTable:
    """The table ``inet meshnet`` of the calling process's network namespace.

    Args:
        memory: file that remembers what was loaded; losing it costs one more load.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._text, self._digest = _read(memory)

    def load(self, text: str) -> None:
        """Replace the table by what the script makes, all at once or not at all.

        Raises:
            KernelRefusedError: nft or the kernel refused the script.
        """
        _nft(["-f", "-"], text)
        self._text, self._digest = text, _digest(self._list())
        document = json.dumps({"text": text, "listing_sha256": self._digest})
        draft = self._memory.with_suffix(".new")
        draft.write_text(document)
        os.replace(draft, self._memory)

    def delete(self) -> None:
        """Remove the table.

        Raises:
            KernelRefusedError: nft or the kernel refused.
        """
        _nft(["-f", "-"], f"table inet {TABLE}\ndelete table inet {TABLE}\n")
        self._text = self._digest = ""
        self._memory.unlink(missing_ok=True)

    def read(self) -> str | None:
        """The text the table was loaded from; None: no table; "": not as it was loaded."""
        listing = self._list()
        if not listing:
            return None
        return self._text if _digest(listing) == self._digest else ""

    @staticmethod
    def _list() -> str:
        try:
            return _nft(["--stateless", "list", "table", "inet", TABLE], "")
        except KernelRefusedError as error:
            if "No such file" in str(error):
                return ""
            raise


def _nft(arguments: list[str], script: str) -> str:
    try:
        done = subprocess.run(
            ["nft", *arguments],
            input=script,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise KernelRefusedError("program nft is missing: install the package nftables") from error
    except subprocess.TimeoutExpired as error:
        raise KernelRefusedError(f"nft did not end within {_TIMEOUT_S} s") from error
    if done.returncode != 0:
        first = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[0]
        raise KernelRefusedError(f"nftables table inet {TABLE}: {first}")
    return done.stdout


def _digest(listing: str) -> str:
    return hashlib.sha256(listing.encode()).hexdigest()


def _read(memory: Path) -> tuple[str, str]:
    try:
        document = json.loads(memory.read_text())
        return str(document["text"]), str(document["listing_sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "", ""
