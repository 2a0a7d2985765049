"""Whether the agent can serve requests that need the mesh."""

from __future__ import annotations


class Readiness:
    """Set once the first pass is applied, and cleared when the agent is told to stop."""

    def __init__(self) -> None:
        self.ready = False
