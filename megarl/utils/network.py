"""Addresses on this machine."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A TCP port that nothing listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]
