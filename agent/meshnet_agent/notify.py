"""Tells systemd the state of the service (sd_notify(3)); does nothing without systemd."""

from __future__ import annotations

import os
import socket


class Notifier:
    """Sends to the socket in ``NOTIFY_SOCKET``, and removes that variable from the environment.

    Programs that the agent starts must not notify systemd on its behalf.  runc does so when it
    inherits the variable, and ``meshnet run`` failed under the unit for that reason.
    """

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")

    def tell(self, state: str) -> None:
        """Send a state, such as ``READY=1``; does nothing if there is no socket.

        Raises:
            OSError: systemd's socket does not accept it.
        """
        address = self._address
        if not address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            # A leading "@" means an abstract socket, whose address begins with a NUL (unix(7)).
            sender.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
