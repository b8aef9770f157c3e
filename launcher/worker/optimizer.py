"""AdamW over the trained tensors, full or 8-bit, its schedule, clipping, and its state as moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from decompft.adapters.base import Adapter, Settling
from decompft.adapters.inject import adapters
from decompft.adapters.token_rows import token_rows
from decompft.launcher.recipe import TrainSection
from decompft.launcher.worker.adamw import QuickAdamW
from decompft.launcher.worker.engines.base import Engine, full_shape
from decompft.launcher.worker.schedule import factor_of


def make_optimizer(
    model: nn.Module, trained: Mapping[str, nn.Parameter], train: TrainSection, engine: Engine
) -> torch.optim.Optimizer:
    """AdamW in groups of equal learning-rate scale; scalars, norms, biases and rows of tokens are never decayed,
    nor are matrices that hold a part of the weight (Adapter.no_decay).

    Tensors whose state starts anew at another step are a group of their own: ZeRO counts a group's steps together.
    """
    scales = {f"{n}.{t}": s for n, a in adapters(model) for t, s in a.lr_scales().items()}
    kept = {f"{n}.{t}" for n, a in adapters(model) for t in a.no_decay()}
    # decay draws to 0, and an embedding's row is away from it before it trains, read or not
    kept |= {f"{n}.rows" for n, _ in token_rows(model)}
    restarts = {f"{n}.{t}": step for n, a in adapters(model) for t, step in a.restarts().items()}
    groups: dict[tuple[float, bool, int], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        decays = len(full_shape(parameter)) > 1 and name not in kept
        groups.setdefault((scales.get(name, 1.0), decays, restarts.get(name, 0)), []).append(parameter)
    params = [
        {
            "params": members,
            "lr": train.learning_rate * scale,
            "weight_decay": train.weight_decay if decays else 0.0,
        }
        for (scale, decays, _), members in groups.items()
    ]
    common: dict[str, Any] = {"lr": train.learning_rate, "betas": train.betas, "eps": train.adam_eps}
    if train.optimizer == "adamw":
        return QuickAdamW(params, fused=True, **common)
    # bitsandbytes takes 3 s to import
    from decompft.launcher.worker.adamw8bit import AdamW8bit

    return AdamW8bit(params, engine, **common)


def schedule(
    optimizer: torch.optim.Optimizer, train: TrainSection, total_steps: int
) -> Callable[[int], float]:
    """Step (from 0) -> factor of the learning rate; each group keeps its own rate as `initial_lr`."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return factor_of(train, total_steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def clip_gradients(
    layers: list[tuple[str, Adapter]], trained: Mapping[str, nn.Parameter], engine: Engine, max_norm: float
) -> Tensor:
    """Clip by global norm, in place, and return the norm before clipping: () float64, which no host has waited for.

    Tensors that still settle (Adapter.settling) are first scaled by their factor and then left
    out: they neither count towards the norm nor shrink with it.
    """
    waits = {f"{n}.{t}": w for n, a in layers for t, w in a.settling().items()}
    pieces = {n: engine.gradient(p) for n, p in trained.items()}
    grads = {n: g for n, g in pieces.items() if g is not None}
    others, waiting = [n for n in grads if n not in waits], [n for n in grads if n in waits]
    names = [*others, *waiting]
    norms = torch._foreach_norm([grads[n] for n in names])
    squares = engine.sum_pieces(torch.stack([n.to(engine.device) for n in norms]).square()).double()
    replicas = [engine.replicas(trained[n]) for n in names]
    if set(replicas) != {1}:
        squares /= torch.tensor(replicas, dtype=squares.dtype).to(squares.device, non_blocking=True)
    factors = Settling.factors([waits[n] for n in waiting]).to(squares.device) if waiting else squares[:0]
    squares[len(others) :].masked_fill_(factors < 1, 0.0)
    norm = squares.sum().sqrt()
    clip = max_norm / (norm + 1e-6) if max_norm else torch.ones_like(norm)
    clip = torch.where(norm > max_norm, clip, 1.0)
    if max_norm and others:
        scaled = [grads[n] for n in others]
        torch._foreach_mul_(scaled, _beside(clip, scaled))
    if waiting:
        scaled = [grads[n] for n in waiting]
        each = _beside(torch.where(factors < 1, factors, clip), scaled)
        torch._foreach_mul_(scaled, list(each.unbind()))
    return norm


def _beside(numbers: Tensor, gradients: list[Tensor]) -> Tensor:
    """Numbers in the dtype of gradients, where all can be scaled by them.

    Under offload fsdp has matrices in host memory and vectors on the device: a number of the host scales both, one
    of the device its own alone.
    """
    return numbers.to(next((g for g in gradients if g.is_cpu), gradients[0]))


def read_moments(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, engine: Engine
) -> dict[str, Tensor]:
    """This rank's piece of both moments, float32 whatever the optimizer stores, and the step count.

    Empty before the first step, and where an 8-bit optimizer has nothing here.
    """
    if hasattr(optimizer, "moments"):  # AdamW8bit, imported where it is made
        return optimizer.moments(parameter)
    return engine.moments(optimizer, parameter)


def write_moments(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, moments: Mapping[str, Tensor], engine: Engine
) -> None:
    """Set this rank's piece of both moments; an 8-bit optimizer quantizes them again."""
    if hasattr(optimizer, "set_moments"):
        optimizer.set_moments(parameter, moments)
    else:
        engine.set_moments(optimizer, parameter, moments)


def read_raw(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """8-bit moments as they are stored, for a run that goes on with its rows cut as now; {} for other optimizers."""
    return optimizer.raw(parameter) if hasattr(optimizer, "raw") else {}


def write_raw(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, raw: Mapping[str, Tensor]) -> None:
    """Set what `read_raw` gave, after `write_moments`."""
    optimizer.set_raw(parameter, raw)  # type: ignore[attr-defined]  # AdamW8bit
