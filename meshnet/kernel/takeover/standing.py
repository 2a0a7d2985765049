"""Whether a takeover stands: the program asks it, and so does whoever starts the program."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.kernel.takeover.journal import Stage

if TYPE_CHECKING:
    from meshnet.kernel.takeover.interface import Interfaces
    from meshnet.kernel.takeover.journal import Journal, JournalDir


def stands(journal: Journal, interfaces: Interfaces) -> bool:
    """Whether what the journal says was confirmed is still so."""
    link = interfaces.find(journal.parent)
    return journal.stage is Stage.CONFIRMED and link is not None and link.master == journal.bridge


def find_standing(bridge: str, journals: JournalDir, interfaces: Interfaces) -> str | None:
    """The link that a bridge has taken, confirmed; None: it has none.

    Raises:
        KernelRefusedError: the journal cannot be read.
    """
    journal = journals.load(bridge)
    return journal.parent if journal is not None and stands(journal, interfaces) else None
