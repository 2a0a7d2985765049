"""Whether requests that need the mesh can be served now."""

from __future__ import annotations


class Readiness:
    """Set once the first pass is applied, and cleared when the agent is told to stop."""

    def __init__(self) -> None:
        self.ready = False
