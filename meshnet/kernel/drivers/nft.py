"""Our nftables tables: loading them in one transaction, telling whether they are as loaded.

The kernel's listing of a table differs from the text that made it.  So after a load the listings'
digest is remembered next to what was loaded, in a file, so that a restarted agent need not load
again.  As long as the listings have that digest, the tables do what was loaded.  Listings leave out
counters, and elements of named sets, which are compared one by one (`meshnet.kernel.wire.nftnl`).

Runs ``nft`` (Debian package nftables) without a shell; scripts go in by standard input.
"""

from __future__ import annotations

import hashlib
import subprocess
from typing import TYPE_CHECKING

from meshnet.errors import KernelRefusedError
from meshnet.firewall import UNKNOWN
from meshnet.firewall.elements import TABLE
from meshnet.firewall.rules import FAMILIES, render_rules, render_script
from meshnet.kernel.drivers.nft_memory import NOTHING, Loaded, read_memory, write_memory

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from meshnet.firewall import Firewall, Unknown
    from meshnet.firewall.rules import Count
    from meshnet.state import ElementKey

_TIMEOUT_S = 30
_TRIES = 3
"""Loads in a row before a listing that keeps differing is believed."""


class NftTables:
    """Our tables in the calling process's network namespace.

    Args:
        memory: file that remembers what was loaded; losing it costs one more load.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._loaded = read_memory(memory)

    def load(
        self, firewall: Firewall, held: Mapping[ElementKey, bytes], counts: Mapping[str, Count]
    ) -> None:
        """Replace the tables and all that is in them, all at once or not at all.

        Args:
            held: the elements of their sets.
            counts: what the counters go on from.

        Raises:
            KernelRefusedError: nft or the kernel refused the script.
        """
        text = render_rules(firewall)
        for _ in range(_TRIES):
            _nft(["-f", "-"], render_script(text, held, counts))
            digest = _digest("".join(_list_tables()))
            if text != self._loaded.text or digest == self._loaded.listing_sha256:
                break
            # The same text always lists the same: so somebody changed the tables between load and
            # listing, and that must not be remembered as ours; or nft was upgraded.
        self._loaded = Loaded(firewall, text, digest)
        write_memory(self._memory, self._loaded)

    def delete(self) -> None:
        """Remove the tables.

        Raises:
            KernelRefusedError: nft or the kernel refused.
        """
        # "table" first: deleting a table that does not exist fails the whole script.
        gone = (f"table {f} {TABLE}\ndelete table {f} {TABLE}\n" for f in FAMILIES)
        _nft(["-f", "-"], "".join(gone))
        self._loaded = NOTHING
        self._memory.unlink(missing_ok=True)

    def read(self) -> Firewall | Unknown | None:
        """What the tables were loaded to do; None: neither exists; unknown: not as loaded."""
        listings = _list_tables()
        if not any(listings):
            return None
        as_loaded = _digest("".join(listings)) == self._loaded.listing_sha256
        return self._loaded.firewall if as_loaded else UNKNOWN


def _list_tables() -> list[str]:
    """Our tables without elements and counts; "": it does not exist in that family.

    They are cut out of a listing of all tables of their families.  For a single table nft 1.0.6
    also reads the elements that it does not print, which takes 15 ms for 10,000 of them.
    """
    commands = "".join(f"list ruleset {family}\n" for family in FAMILIES)
    # In numbers: a listing must not change with /etc/protocols.
    listing = _nft(["--terse", "--stateless", "--numeric", "-f", "-"], commands)
    return [_cut_out(f"table {family} {TABLE} {{\n", listing) for family in FAMILIES]


def _cut_out(head: str, listing: str) -> str:
    """The table that begins with `head`, in a listing of many; "" if it is not there."""
    _, begin, rest = f"\n{listing}".partition(f"\n{head}")
    body, end, _ = rest.partition("\n}\n")
    return begin[1:] + body + end


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
        raise KernelRefusedError(f"nftables table {TABLE}: {first}")
    return done.stdout


def _digest(listing: str) -> str:
    return hashlib.sha256(listing.encode()).hexdigest()
