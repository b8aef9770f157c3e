"""Which kernels run on a device: each proves itself once against its plain twin, or the twin runs from then on.

A compiler, a driver or a card that nobody tried may refuse a kernel, or run it wrongly. So the first time that a
kernel is wanted for a device and a dtype it is compiled, run on a small example and compared with what plain torch
makes of it. Nothing is proved while a CUDA graph is being captured or code traced: `prove_all` does it before.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from importlib import import_module

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SWITCH = "DECOMPFT_TRITON"  # 0: no kernel of ours or of Liger's runs, to find out whether one is at fault

# each has a `PROVED`
_MODULES = (
    "columns", "dequantize", "norm", "norm_many", "rows", "changed", "visit", "combine", "swiglu", "rms_norm",
    "cross_entropy", "weight_times", "fp8",
)  # fmt: skip


class WrongKernelError(Exception):
    """A kernel's result is further from its twin's than its bound."""


@dataclass(kw_only=True)
class Proved:
    """A kernel and what is known of it in this process."""

    name: str
    instead: str  # what runs in its place, in words
    # runs the kernel on a small example of that dtype; raises whatever goes wrong, `WrongKernelError` if it computes
    # something else
    example: Callable[[torch.device, torch.dtype], None]
    # whom `prove_all` proves it for: a method's layers, a base's format, a family of models; None: for all
    methods: tuple[str, ...] | None = None
    formats: tuple[str, ...] | None = None
    families: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None  # that it is ever asked for; None: the compute dtype
    computes: tuple[torch.dtype, ...] | None = None  # compute dtypes that it is for; None: any
    is_asked_for: bool = False  # left out by `prove_all`: who wants it has it proved
    _reasons: dict[tuple[torch.device, torch.dtype], str] = field(default_factory=dict)

    def runs(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the kernel is to be used; one warning if not. The first call for a pair compiles and runs it."""
        reason = self._reasons.get((device, dtype))
        if reason is None:
            if _is_recording(device):
                return False
            reason = self._reasons[device, dtype] = self._prove(device, dtype)
            if reason:
                logger.warning(
                    "kernel %s (%s on %s) is not used: %s; %s runs instead",
                    self.name, _short(dtype), device, reason, self.instead,
                )  # fmt: skip
        return not reason

    def reason(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why it does not run; empty where it does."""
        return (
            ""
            if self.runs(device, dtype)
            else self._reasons.get((device, dtype), "not proved before a capture")
        )

    def _prove(self, device: torch.device, dtype: torch.dtype) -> str:
        if is_off():
            return f"{SWITCH}=0"
        try:
            with torch.no_grad():
                # compiled by the first, launched as all later ones by the second (launch.py)
                for _ in range(2 if device.type == "cuda" else 1):
                    self.example(device, dtype)
        except WrongKernelError as wrong:
            return str(wrong)
        except ImportError as missing:
            return f"{missing.name} is not installed"
        except (
            Exception
        ) as error:  # a compiler's, a driver's, a launch's: all mean that the twin is what works here
            return f"{type(error).__name__}: {_first_line(error)}"
        return ""


def is_off() -> bool:
    return os.environ.get(SWITCH) == "0"


def close_to(found: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """Element by element, or raise.

    Args:
        expected: what the twin makes of the same.
        bound: largest distance, as a number or for each element.

    Raises:
        WrongKernelError: it is further; NaN is further than anything.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise WrongKernelError(f"it makes {_shape(found)}, not {_shape(expected)}")
    apart = (found.double() - expected.double()).abs()
    if not bool((apart <= bound).all()):
        raise WrongKernelError(f"it computes something else, by up to {apart.max():.3g}")


def prove_all(
    device: torch.device, compute: torch.dtype, methods: Collection[str], base_format: str, family: str
) -> str:
    """Prove what a run will want on a CUDA device, before any graph is captured; says what runs, and what does not.

    Args:
        compute: dtype of weights in products, and of activations.
        methods: of the run's adapters.
        family: the model's, as transformers names it.
    """
    if device.type != "cuda":
        return "torch (no GPU)"
    device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
    began = time.perf_counter()
    used, not_used = [], []
    for module in _MODULES:
        proved: Proved = import_module(f"decompft.adapters.kernels.{module}").PROVED
        if proved.is_asked_for:
            continue
        if proved.methods is not None and not set(proved.methods) & set(methods):
            continue
        if proved.formats is not None and base_format not in proved.formats:
            continue
        if proved.families is not None and family not in proved.families:
            continue
        if proved.computes is not None and compute not in proved.computes:
            continue
        reasons = [r for d in proved.dtypes or (compute,) if (r := proved.reason(device, d))]
        if reasons:
            not_used.append(f"{proved.instead} for {proved.name} ({reasons[0]})")
        else:
            used.append(proved.name)
    seconds = time.perf_counter() - began
    parts = [f"triton for {', '.join(used)} (proved in {seconds:.1f} s)"] if used else []
    return "; ".join(parts + not_used)


def _is_recording(device: torch.device) -> bool:
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {_short(tensor.dtype)}"
