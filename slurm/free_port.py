"""Which port is free on this node, and likely to stay so until torchrun binds it a moment later?

Below the range that the kernel gives to outgoing connections, which take and leave ports all the time.
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

_FIRST, _COUNT = 20_000, 12_000
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A port that nothing listens on, on any address: the other nodes come from outside."""
    for port in random.SystemRandom().sample(range(_FIRST, _FIRST + _COUNT), 100):
        if not _is_given_out(port) and _is_free(port):
            return port
    with socket.socket() as probe:  # a crowded machine: any that the kernel has
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _is_given_out(port: int) -> bool:
    try:
        first, last = map(int, _RANGE.read_text().split())
    except (OSError, ValueError):
        return False
    return first <= port <= last


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    print(free_port())
