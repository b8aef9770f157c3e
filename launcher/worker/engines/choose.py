"""The engine of a plan, with its device."""

from __future__ import annotations

import importlib
import os

import torch

from decompft.launcher.plan import Plan
from decompft.launcher.strategies import STRATEGIES
from decompft.launcher.worker.engines.base import Engine


def make_engine(plan: Plan) -> Engine:
    """The runtime that `plan.strategy` names, not yet started."""
    device = torch.device("cpu")
    if plan.world.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    timeout_s = plan.recipe.parallel.timeout_s
    # by name: torch.distributed.fsdp takes 2 s to import, DeepSpeed as long
    module, _, name = STRATEGIES[plan.strategy].impl.partition(":")
    engine = getattr(importlib.import_module(module), name)
    made: Engine
    if plan.deepspeed is not None:
        made = engine(device, timeout_s=timeout_s, config=plan.deepspeed)
    elif plan.strategy == "fsdp":
        made = engine(device, timeout_s=timeout_s, cpu_offload=plan.cpu_offload)
    elif plan.strategy == "hsdp":
        made = engine(device, timeout_s=timeout_s, shard_size=plan.shard_size)
    else:
        made = engine(device, timeout_s=timeout_s)
    return made
