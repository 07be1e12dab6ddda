"""Tells systemd how the daemon is doing (`Type=notify`)."""

from __future__ import annotations

import logging
import os
import socket

_log = logging.getLogger("kvstore.daemon")


def notify(state: str) -> None:
    """Send e.g. `READY=1` or `STOPPING=1` to the socket in `$NOTIFY_SOCKET`, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # systemd's way to write an abstract address.
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.sendto(state.encode(), address)
    except OSError as e:
        _log.warning("NOTIFY_SOCKET could not be told %s: %s", state, e)
