"""How long a step takes, where a speed was measured."""

from __future__ import annotations

from decompft.launcher.forecast_fitted import (
    EFFECTIVE_FLOPS,
    ESTIMATED_FLOPS,
    MIN_KNOWN_HIDDEN,
    PARALLEL_SHARE,
)
from decompft.launcher.plan import Plan
from decompft.launcher.workload import Layout, Workload


def time_forecast(plan: Plan, tokens_per_s: float) -> float:
    """Seconds an optimizer step takes at a speed of all ranks together."""
    return plan.batch.tokens_per_step / tokens_per_s


def known_speed(work: Workload, layout: Layout, gpu_name: str | None) -> float | None:
    """Tokens a second of all ranks together, or None where nothing was measured.

    Of selective and offloaded recomputation an estimate from what was measured without and with full.
    """
    shape, name = work.shape, gpu_name or ""
    is_measured = layout.device == "cuda" and not layout.cpu_offload and shape.hidden >= MIN_KNOWN_HIDDEN
    known = EFFECTIVE_FLOPS | ESTIMATED_FLOPS
    rates = [r for (gpu, mode), r in known.items() if gpu in name and mode == layout.recompute]
    share = PARALLEL_SHARE.get(layout.strategy)
    if not is_measured or not rates or share is None or work.recipe.quantization.compute != "bfloat16":
        return None
    weights = sum(shape.count(x) * x.num_weights for x in shape.linears) + shape.head.num_weights
    # causal attention: half of 2 products forward, 4 backward, of 2 FLOPs each over the sequence
    attention = 6 * work.recipe.data.sequence_length * shape.num_heads * shape.head_dim * shape.num_layers
    return rates[0] * share * layout.world_size / (4 * weights + attention)
