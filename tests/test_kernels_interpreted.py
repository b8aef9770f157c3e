"""Triton's interpreter runs every kernel on a CPU and finds what torch finds."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CHECK = Path(__file__).parent.parent / "benchmarks" / "check_kernels.py"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compute_what_torch_does_in_the_interpreter() -> None:
    # an environment of its own: the decorator reads the variable when a kernel is imported
    done = subprocess.run(
        [sys.executable, CHECK, "interpret"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "proof" in done.stdout and "as torch" in done.stdout
