"""What this machine has: GPUs, cores and memory, found without torch."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from decompft.launcher.plan import Device

MIB = 1 << 20
_PROC_GPUS = Path("/proc/driver/nvidia/gpus")
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One node, as the planner sees it."""

    num_gpus: int = 0  # visible to this process
    gpu_memory_bytes: int | None = None  # of the smallest visible GPU, None when unknown
    gpu_name: str | None = None
    compute_capability: tuple[int, int] | None = None  # the lowest of the visible GPUs, None when unknown
    num_cores: int = 1  # that this process may use
    host_memory_bytes: int | None = None  # the cgroup's limit where there is one
    is_cpu_forced: bool = False  # DECOMPFT_DEVICE=cpu
    has_liger: bool = True  # liger-kernel is installed; torch's own norms and activations keep more
    network_gbit_per_s: float | None = (
        None  # of this node, for the time forecast; None: the usual one of its GPUs
    )

    @property
    def device(self) -> Device:
        return "cuda" if self.num_gpus else "cpu"


def detect(environ: Mapping[str, str] = os.environ) -> Machine:
    """Look at this machine; under 5 ms where there is no NVIDIA driver.

    `DECOMPFT_DEVICE=cpu` hides the GPUs, `CUDA_VISIBLE_DEVICES` counts as CUDA counts it.
    """
    is_cpu_forced = environ.get("DECOMPFT_DEVICE", "").lower() == "cpu"
    gpus = [] if is_cpu_forced else visible_gpus(installed_gpus(), environ.get("CUDA_VISIBLE_DEVICES"))
    known = [gpu.memory_bytes for gpu in gpus if gpu.memory_bytes]
    able = [gpu.capability for gpu in gpus if gpu.capability]
    return Machine(
        num_gpus=len(gpus),
        gpu_memory_bytes=min(known, default=None),
        gpu_name=gpus[0].name if gpus else None,
        compute_capability=min(able, default=None),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        host_memory_bytes=_host_memory(),
        is_cpu_forced=is_cpu_forced,
        has_liger=importlib.util.find_spec("liger_kernel") is not None,
    )


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str | None
    uuid: str | None
    memory_bytes: int | None
    capability: tuple[int, int] | None = None


def installed_gpus() -> list[Gpu]:
    """Every GPU of the machine, from nvidia-smi, else (without memory) from the driver's folder."""
    smi = shutil.which("nvidia-smi")
    if smi:
        try:
            done = subprocess.run(
                [smi, "--query-gpu=memory.total,uuid,compute_cap,name", "--format=csv,noheader,nounits"],
                capture_output=True,
                text=True,
                timeout=30,
                check=True,
            )
            return parse_smi(done.stdout)
        except (OSError, subprocess.SubprocessError):
            pass  # a driver that does not answer: the folder below tells at least how many there are
    if not _PROC_GPUS.is_dir():
        return []
    return [Gpu(name=None, uuid=None, memory_bytes=None) for _ in _PROC_GPUS.iterdir()]


def parse_smi(text: str) -> list[Gpu]:
    """Lines of `memory in MiB, uuid, capability, name`; memory may be `[N/A]` on integrated GPUs."""
    gpus = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",", 3)]
        if len(fields) == 4:
            memory, uuid, capability, name = fields
            size = int(memory) * MIB if memory.isdigit() else None
            gpus.append(Gpu(name, uuid, size, _capability(capability)))
    return gpus


def _capability(text: str) -> tuple[int, int] | None:
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def visible_gpus(gpus: list[Gpu], visible: str | None) -> list[Gpu]:
    """What CUDA shows under CUDA_VISIBLE_DEVICES: the list ends at its first entry that names nothing."""
    if visible is None:
        return gpus
    shown: list[Gpu] = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry.isdigit() and int(entry) < len(gpus):
            gpu = gpus[int(entry)]
        elif entry.startswith("MIG-"):
            gpu = Gpu(name="MIG slice", uuid=entry, memory_bytes=None)
        else:
            named = [g for g in gpus if entry and g.uuid and g.uuid.startswith(entry)]
            if len(named) != 1:
                break
            gpu = named[0]
        shown.append(gpu)
    return shown


def _host_memory() -> int | None:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None
    return min([total, *_cgroup_limits()])


def _cgroup_limits() -> list[int]:
    """Memory limits on the way from this process's cgroup to the root (Slurm nests its jobs)."""
    limits = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = _CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = _CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        while group.is_relative_to(root):
            try:
                text = (group / name).read_text().strip()
            except OSError:
                text = ""
            if text.isdigit():
                limits.append(int(text))
            group = group.parent
    return limits
