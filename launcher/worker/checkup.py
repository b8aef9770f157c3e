"""What works on this machine, and what to do about what does not: one check a line, each on its own."""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

State = Literal["ok", "warn", "fail"]
_PACKAGES = ("torch", "transformers", "bitsandbytes", "torchao", "deepspeed", "liger-kernel", "triton")
_REQUIRED = ("torch", "transformers", "bitsandbytes")
_EXTRA = {"torchao": "gpu", "liger-kernel": "gpu", "deepspeed": "deepspeed"}
_LOW_DISK_BYTES = 20 * 2**30  # a 7B checkpoint takes 14 GB


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the report."""

    name: str
    state: State
    text: str  # what was found
    fix: str = ""  # what to do, when it is not ok


Check = Callable[[], Finding]


def run_checks() -> Iterator[Finding]:
    """Every check in turn; one that breaks is a failure of its own and stops no other."""
    yield _python()
    for package in _PACKAGES:
        yield _package(package)
    for name, check, required in _CHECKS:
        yield guarded(name, check, required=required)


def guarded(name: str, check: Check, *, required: bool) -> Finding:
    """The check's finding; whatever it raises becomes a failure, or a warning when nothing needs it."""
    try:
        return check()
    except Exception as error:  # a broken installation raises anything
        lines = str(error).strip().splitlines() or [""]
        return Finding(
            name=name,
            state="fail" if required else "warn",
            text=f"{type(error).__name__}: {lines[0]}",
            fix=_FIXES.get(name, "reinstall decompft into a fresh virtual environment"),
        )


def _python() -> Finding:
    return Finding(name="python", state="ok", text=f"{platform.python_version()}, {sys.executable}")


def _package(name: str) -> Finding:
    try:
        return Finding(name=name, state="ok", text=version(name))
    except PackageNotFoundError:
        if name in _REQUIRED:
            return Finding(name=name, state="fail", text="not installed", fix=f"pip install {name}")
        extra = _EXTRA.get(name)
        fix = f"pip install 'decompft[{extra}]'" if extra else "comes with torch for a GPU"
        # what only a GPU uses is missed only where there is one
        needed = name != "deepspeed" and _has_gpu()
        if needed:
            return Finding(name=name, state="warn", text="not installed", fix=fix)
        return Finding(name=name, state="ok", text="not installed, and not needed here")


def _devices() -> Finding:
    import torch

    cores = f"{len(os.sched_getaffinity(0))} CPU cores"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        if built and Path("/dev/nvidiactl").exists():
            fix = "the driver is older than torch's CUDA, or the container has no access: see nvidia-smi"
            return Finding(
                name="devices", state="warn", text=f"a GPU that torch cannot use; {cores}", fix=fix
            )
        return Finding(name="devices", state="ok", text=f"no GPU; {cores}")
    lines = []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        lines.append(
            f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute {facts.major}.{facts.minor}"
        )
    counted = [f"{lines.count(line)} x {line}" for line in dict.fromkeys(lines)]
    return Finding(name="devices", state="ok", text="; ".join([*counted, cores]))


def _gpu_health() -> Finding:
    """What the check before a job on Slurm asks of each node's GPUs."""
    from decompft.launcher.worker.node_gpus import check_gpus

    states, problems = check_gpus(0)
    told = [problem for problem in problems if problem.kind != "gpu count"]  # nobody asked for any
    if told:
        text = "; ".join(problem.text for problem in told)
        return Finding(name="gpu health", state="warn", text=text, fix=told[0].hint)
    found = f"no ECC error, slowdown or foreign memory on {len(states)} GPU(s)" if states else "no GPU to ask"
    return Finding(name="gpu health", state="ok", text=found)


def _bfloat16() -> Finding:
    import torch

    device = _device()
    a = torch.full((64, 64), 0.5, dtype=torch.bfloat16, device=device)
    if float((a @ a)[0, 0]) != 16.0:
        raise ArithmeticError("a bfloat16 matrix product is wrong")
    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding(
            name="bfloat16",
            state="warn",
            text="this GPU emulates it, slowly",
            fix="quantization.compute: float32",
        )
    where = (
        "in hardware" if device == "cuda" else "works, but a CPU is faster with quantization.compute: float32"
    )
    return Finding(name="bfloat16", state="ok", text=where)


def _fp8() -> Finding:
    """Both products of a layer as `quantization.compute: fp8` makes them."""
    import torch

    from decompft.launcher.fp8_layers import MIN_CAPABILITY
    from decompft.launcher.worker.fp8 import product_error, refuse_gpu

    device, where = torch.device(_device()), "emulated on the CPU, slowly"
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < MIN_CAPABILITY:  # no defect: nothing but this one setting needs them
            text = "this GPU has none (compute capability {}.{}, they need {}.{})".format(
                *found, *MIN_CAPABILITY
            )
            return Finding(
                name="fp8 products", state="ok", text=f"{text}: use quantization.compute: bfloat16"
            )
        refuse_gpu(device)
        where = "torch._scaled_mm, row-wise"
    return Finding(name="fp8 products", state="ok", text=f"{where}; error {product_error(device):.3f}")


def _nf4() -> Finding:
    """Quantize and dequantize a matrix through the very layer that training uses."""
    import torch

    from decompft.adapters.frozen.fourbit import Nf4Linear

    device = _device()
    layer = Nf4Linear(256, 64, block_size=64, double_quant=True, bias_dtype=None).to(device)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(device)
    back = layer.unpack(layer.pack(weight), torch.float32)
    error = float((back - weight).norm() / weight.norm())
    if not error < 0.12:  # of normal weights in blocks of 64 it is 0.09
        raise ArithmeticError(f"nf4 comes back with a relative error of {error:.2f}")
    return Finding(
        name="nf4", state="ok", text=f"quantizes and dequantizes on the {device}, error {error:.3f}"
    )


def _adamw8bit() -> Finding:
    import torch
    from bitsandbytes.optim import AdamW8bit

    # below 4,096 numbers bitsandbytes keeps 32-bit moments
    parameter = torch.nn.Parameter(torch.ones(128, 128, device=_device()))
    parameter.grad = torch.ones_like(parameter)
    AdamW8bit([parameter], lr=0.1).step()
    if not torch.allclose(parameter, torch.tensor(0.9, device=parameter.device), atol=0.02):
        raise ArithmeticError("a step of 8-bit AdamW is wrong")
    return Finding(name="8-bit AdamW", state="ok", text="a step on one device is right")


def _process_group(backend: str) -> Finding:
    import torch
    import torch.distributed as dist

    device = "cuda" if backend == "nccl" else "cpu"
    store = dist.HashStore()  # type: ignore[attr-defined]  # torch exports it without naming it
    patience = datetime.timedelta(seconds=10)
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=patience)
    try:
        one = torch.ones(1, device=device)
        dist.all_reduce(one)
        assert float(one) == 1.0, one
    finally:
        dist.destroy_process_group()
    return Finding(name=backend, state="ok", text=f"a process group of one reduces on the {device}")


def _gloo() -> Finding:
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return Finding(
            name="gloo",
            state="warn",
            text=f"the host name {socket.gethostname()} has no address",
            fix="add it to /etc/hosts, or set GLOO_SOCKET_IFNAME to the network's interface",
        )
    found = _process_group("gloo")
    return Finding(name=found.name, state=found.state, text=f"{found.text} ({address})")


def _nccl() -> Finding:
    if not _has_gpu():
        return Finding(name="nccl", state="ok", text="no GPU: gloo is used")
    return _process_group("nccl")


def _torchrun() -> Finding:
    import torch.distributed.run  # noqa: F401

    return Finding(name="torchrun", state="ok", text="torch.distributed.run can be imported")


def _fsdp() -> Finding:
    from torch.distributed.fsdp import fully_shard  # noqa: F401

    return Finding(name="fsdp", state="ok", text="FSDP2 (fully_shard) is there")


def _liger() -> Finding:
    if not _has_gpu():
        return Finding(name="liger kernels", state="ok", text="no GPU: torch's own are used")
    if importlib.util.find_spec("liger_kernel") is None:
        fix = "pip install 'decompft[gpu]'"
        return Finding(name="liger kernels", state="warn", text="not installed: training is slower", fix=fix)
    import liger_kernel.transformers.monkey_patch as patches

    families = len(patches.MODEL_TYPE_TO_APPLY_LIGER_FN)
    return Finding(name="liger kernels", state="ok", text=f"for {families} model families")


def _cache() -> Finding:
    from decompft.launcher.places import cache_dir

    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        return Finding(
            name="cache",
            state="fail",
            text=f"{folder} cannot be written: {error.strerror}",
            fix="set DECOMPFT_CACHE to a folder that can",
        )
    return Finding(name="cache", state="ok", text=str(folder))


def _disk() -> Finding:
    from decompft.launcher.places import cache_dir

    free = {}
    for place in (Path.cwd(), cache_dir()):
        existing = next(p for p in (place, *place.parents) if p.exists())
        free[place] = shutil.disk_usage(existing).free
    text = ", ".join(f"{num_bytes / 2**30:,.0f} GiB free for {place}" for place, num_bytes in free.items())
    if min(free.values()) < _LOW_DISK_BYTES:
        fix = "a 7B model with its checkpoints wants 20 GiB; DECOMPFT_CACHE and --run-dir name other disks"
        return Finding(name="disk", state="warn", text=text, fix=fix)
    return Finding(name="disk", state="ok", text=text)


def _hub() -> Finding:
    from decompft.launcher.model_source import hub_cache

    names = [n for n in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE") if _is_on(n)]
    where = f"cache {hub_cache(os.environ)}"
    if names:
        fix = "right for a compute node without a network; run `decompft fetch RECIPE` where there is one"
        return Finding(name="hub", state="warn", text=f"offline by {', '.join(names)}; {where}", fix=fix)
    token = "HF_TOKEN is set" if os.environ.get("HF_TOKEN") else "no HF_TOKEN: gated models are refused"
    return Finding(name="hub", state="ok", text=f"{where}; {token}")


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")


def _has_gpu() -> bool:
    try:
        import torch

        return torch.cuda.is_available()
    except Exception:  # torch itself is checked by others
        return False


def _device() -> str:
    return "cuda" if _has_gpu() else "cpu"


_CHECKS: tuple[tuple[str, Check, bool], ...] = (
    ("devices", _devices, True),
    ("gpu health", _gpu_health, False),
    ("bfloat16", _bfloat16, False),
    ("fp8 products", _fp8, False),
    ("nf4", _nf4, True),
    ("8-bit AdamW", _adamw8bit, False),
    ("gloo", _gloo, True),
    ("nccl", _nccl, True),
    ("torchrun", _torchrun, True),
    ("fsdp", _fsdp, False),
    ("liger kernels", _liger, False),
    ("cache", _cache, True),
    ("disk", _disk, False),
    ("hub", _hub, False),
)

_FIXES = {
    "devices": "see what `python -c 'import torch; torch.cuda.init()'` says",
    "bfloat16": "use quantization.compute: float32",
    "fp8 products": "use quantization.compute: bfloat16",
    "nf4": "pip install --force-reinstall bitsandbytes; until then quantization.format: none",
    "8-bit AdamW": "use train.optimizer: adamw, or reinstall bitsandbytes",
    "gloo": "set GLOO_SOCKET_IFNAME to the network's interface; parallel.strategy: single needs no gloo",
    "nccl": "run again with NCCL_DEBUG=INFO; parallel.strategy: single needs no NCCL",
    "torchrun": "reinstall torch",
    "fsdp": "use parallel.strategy: ddp or single, or a newer torch",
    "liger kernels": "pip install --upgrade liger-kernel; training works without it, slower",
}
