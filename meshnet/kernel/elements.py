"""Elements of endpoints' links, which two threads write: the wiring's and the reconciler's.

The wiring adds an endpoint's elements with its link, and removes them with it, without waiting for
a pass.  A pass compares with the endpoints as they were when it began, so its operations on these
elements may be out of date: they would cut off an endpoint that was attached meanwhile.  So both
threads write under one lock, and the wiring's word counts.

Imports no socket, file, clock or trio.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from meshnet.firewall.elements import SETS
from meshnet.state import Ruleset

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from meshnet.state import ElementKey
    from meshnet.tables import Op


def are_wired(ops: Iterable[Op]) -> bool:
    """Whether any operation is on an element of an endpoint's link."""
    return any(SETS[op.key.set_name].wired for op in ops)


class WiredElements:
    """The elements of all endpoints that are connected now.

    Attributes:
        lock: held while such elements are written to the kernel, and already while they are looked
            up here.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._elements: dict[ElementKey, bytes] = {}

    def add(self, elements: Mapping[ElementKey, bytes]) -> bool:
        """Note that an endpoint with these elements is connected; returns whether any is new."""
        before = len(self._elements)
        self._elements.update(elements)
        return len(self._elements) > before

    def remove(self, elements: Mapping[ElementKey, bytes]) -> None:
        """Note that an endpoint with these elements is no longer connected."""
        for key in elements:
            self._elements.pop(key, None)

    def still_right(self, ops: Sequence[Op]) -> list[Op]:
        """The operations on elements, without those that are out of date."""
        # A deletion has the value None, and so has an element that is not connected: that agrees.
        return [
            op
            for op in ops
            if not SETS[op.key.set_name].wired or self._elements.get(op.key) == op.value
        ]

    def bring_up_to_date(self, ruleset: Ruleset) -> Ruleset:
        """The ruleset, with the elements of the endpoints that are connected now."""
        others = {k: v for k, v in ruleset.elements.items() if not SETS[k.set_name].wired}
        return Ruleset(ruleset.firewall, others | self._elements)
