"""A port for torchrun that no outgoing connection takes meanwhile."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from decompft.slurm import free_port

pytestmark = pytest.mark.dist


def test_it_can_be_bound_and_is_not_one_that_the_kernel_gives_out() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "decompft.slurm.free_port"], capture_output=True, text=True, check=True
    )
    port = int(done.stdout)
    with socket.socket() as listener:
        listener.bind(("", port))
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert not first <= port <= last


def test_one_that_somebody_listens_on_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        taken = listener.getsockname()[1]
        monkeypatch.setattr(free_port, "_RANGE", Path("/nowhere"))
        monkeypatch.setattr(free_port, "_FIRST", taken)
        monkeypatch.setattr(free_port, "_COUNT", 2)
        monkeypatch.setattr(free_port.random.SystemRandom, "sample", lambda _, ports, __: list(ports))
        assert free_port.free_port() != taken
