"""Whether a takeover stands: both the program and the agent that starts it ask this."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.kernel.takeover.journal import Stage

if TYPE_CHECKING:
    from meshnet.kernel.takeover.interface import Interfaces
    from meshnet.kernel.takeover.journal import Journal, JournalDir


def stands(journal: Journal, interfaces: Interfaces) -> bool:
    """Whether the journal says that the takeover was confirmed, and the link is still a port."""
    link = interfaces.find(journal.parent)
    return journal.stage is Stage.CONFIRMED and link is not None and link.master == journal.bridge


def find_standing(bridge: str, journals: JournalDir, interfaces: Interfaces) -> str | None:
    """The link that a bridge has taken over, confirmed; None: it has not taken one.

    Raises:
        KernelRefusedError: the journal cannot be read.
    """
    journal = journals.load(bridge)
    return journal.parent if journal is not None and stands(journal, interfaces) else None
