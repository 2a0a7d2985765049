"""Tells systemd how the service is doing (sd_notify(3)); without systemd it does nothing."""

from __future__ import annotations

import os
import socket


class Notifier:
    """Speaks to the socket in ``NOTIFY_SOCKET``, which it takes out of the environment.

    What the agent starts must not speak for it: runc would, of a container that it starts.
    """

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")

    def tell(self, state: str) -> None:
        """Send a state, such as ``READY=1``."""
        address = self._address
        if not address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            # "@" stands for the abstract namespace.
            sender.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
