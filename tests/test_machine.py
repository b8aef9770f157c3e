"""What is found of a machine: GPUs as CUDA shows them, their memory and capability."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from decompft.launcher.machine import detect, parse_smi, visible_gpus

SMI = """81559, GPU-aaaa1111-2, 9.0, NVIDIA H100 80GB HBM3
24564, GPU-bbbb2222-3, 8.9, NVIDIA GeForce RTX 4090
[N/A], GPU-bbbb3333-4, [N/A], NVIDIA GB10
"""


@pytest.mark.parametrize(
    "visible, names",
    [
        (None, ["NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090", "NVIDIA GB10"]),
        ("", []),
        ("-1", []),
        ("1", ["NVIDIA GeForce RTX 4090"]),
        ("1,0", ["NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3"]),
        ("0,9,1", ["NVIDIA H100 80GB HBM3"]),
        ("GPU-bbbb3", ["NVIDIA GB10"]),
        ("GPU-bbbb", []),
    ],
)
def test_visible_gpus_are_those_cuda_shows(visible: str | None, names: list[str]) -> None:
    assert [gpu.name for gpu in visible_gpus(parse_smi(SMI), visible)] == names


def fake_smi(folder: Path) -> None:
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\ncat <<'END'\n{SMI}END\n")
    script.chmod(0o755)


def test_machine_reads_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    machine = detect({})
    assert (machine.device, machine.num_gpus) == ("cuda", 3)
    assert machine.gpu_memory_bytes == 24564 << 20  # the smallest known one bounds the plan
    assert detect({"CUDA_VISIBLE_DEVICES": "0"}).gpu_memory_bytes == 81559 << 20
    assert machine.compute_capability == (8, 9)  # and so does the least able
    assert detect({"CUDA_VISIBLE_DEVICES": "0"}).compute_capability == (9, 0)
    assert detect({"CUDA_VISIBLE_DEVICES": "2"}).compute_capability is None
    forced = detect({"DECOMPFT_DEVICE": "cpu"})
    assert (forced.device, forced.num_gpus, forced.is_cpu_forced) == ("cpu", 0, True)


def test_machine_without_a_driver_is_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has a driver")
    best = min(_timed_detect() for _ in range(5))
    machine = detect({})
    assert best < 0.005
    assert machine.device == "cpu" and machine.num_cores >= 1 and machine.host_memory_bytes


def test_machine_says_whether_liger_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)  # what Python takes for not installed
    assert not detect({}).has_liger
    monkeypatch.delitem(sys.modules, "liger_kernel")
    (tmp_path / "liger_kernel").mkdir()
    (tmp_path / "liger_kernel" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert detect({}).has_liger


def _timed_detect() -> float:
    start = time.perf_counter()
    detect({})
    return time.perf_counter() - start
