"""Ports of this machine's loopback address, on which pages are served."""

from __future__ import annotations

import socket

HOST = "127.0.0.1"


def refusal(port: int) -> Exception | None:
    """Return why a server cannot listen on a port, or None if it can."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do
        try:
            listening.bind((HOST, port))
        except (OSError, OverflowError) as error:
            return error
    return None
