"""Runs that wait for the GPU while another has it: one_at_a_time/."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

SITE = Path(__file__).resolve().parent / "one_at_a_time"


def waiting(environment: Mapping[str, str], lock: Path) -> dict[str, str]:
    """The environment of a run that has the GPU when no other run with this lock has it."""
    path = [str(SITE), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "GPU_LOCK": str(lock), "PYTHONPATH": os.pathsep.join(path)}
