"""Tells systemd how the service is doing (sd_notify(3)); without systemd it does nothing."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> None:
    """Send a state, such as ``READY=1``, to the socket in ``NOTIFY_SOCKET``."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        # "@" stands for the abstract namespace.
        sender.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
