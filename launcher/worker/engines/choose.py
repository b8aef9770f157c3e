"""The engine of a plan, with its device."""

from __future__ import annotations

import os

import torch

from decompft.launcher.plan import Plan
from decompft.launcher.worker.engines.base import Engine


def make_engine(plan: Plan) -> Engine:
    """The runtime that `plan.strategy` names, not yet started."""
    device = torch.device("cpu")
    if plan.world.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    timeout_s = plan.recipe.parallel.timeout_s
    if plan.strategy == "fsdp":
        # torch.distributed.fsdp takes 2 s to import
        from decompft.launcher.worker.engines.fsdp import FsdpEngine

        return FsdpEngine(device, timeout_s=timeout_s, cpu_offload=plan.cpu_offload)
    if plan.strategy == "ddp":
        from decompft.launcher.worker.engines.ddp import DdpEngine

        return DdpEngine(device, timeout_s=timeout_s)
    return Engine(device, timeout_s=timeout_s)
