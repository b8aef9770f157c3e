"""The config that DeepSpeed is given: generated from the plan, extended by the recipe."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from decompft.launcher.errors import PlanError
from decompft.launcher.plan import Batch
from decompft.launcher.recipe import Recipe
from decompft.launcher.strategies import Strategy

# numbers of one reduction or gathering; DeepSpeed's own default of 5e8 is 2 GB of float32 at once
BUCKET_NUMBERS = 50_000_000
# parameters up to this many numbers stay whole on each rank under ZeRO-3: norms and MAP's scalars, whose
# gathering costs more than they weigh; DeepSpeed's default of 1e5 would keep whole adapters everywhere
PERSIST_NUMBERS = 10_000


# what `parallel.deepspeed` may add: keys whose effect is on speed, memory and logs alone. DeepSpeed drops a key
# that it does not know without a word, and others would change the arithmetic behind the recipe's back
_PIN = {"pin_memory": bool, "buffer_count": int, "buffer_size": int}
ALLOWED: dict[str, Any] = {
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "zero_optimization": {
        "reduce_scatter": bool,
        "allgather_partitions": bool,
        "use_multi_rank_bucket_allreduce": bool,
        "sub_group_size": int,
        "log_trace_cache_warnings": bool,
        "stage3_max_live_parameters": int,
        "stage3_max_reuse_distance": int,
        "stage3_module_granularity_threshold": int,
        "offload_param": _PIN,
        "offload_optimizer": {**_PIN, "fast_init": bool},
    },
}
_REFUSED = {
    **dict.fromkeys(
        ("bf16", "bfloat16", "fp16", "amp", "torch_autocast", "data_types", "communication_data_type"),
        "it would cast what the recipe sets with quantization.compute, packed weights included",
    ),
    "optimizer": "train.optimizer and train.learning_rate are the keys",
    "scheduler": "train.schedule is the key",
}


def make_config(
    recipe: Recipe,
    *,
    strategy: Strategy,
    batch: Batch,
    world_size: int,
    cpu_offload: bool,
    hidden: int,
) -> dict[str, Any]:
    """The JSON of strategies zero1 to zero3, with `parallel.deepspeed` merged in.

    No precision is switched on: DeepSpeed would cast every floating parameter, the packed bytes of the
    base included. Clipping is ours, because MAP's norms settle (Adapter.settling).

    Args:
        hidden: the model's width; no matrix is smaller, and none may count as small.

    Raises:
        PlanError: `parallel.deepspeed` sets what the plan sets, or a key that is not in ALLOWED.
    """
    zero: dict[str, Any] = {
        "stage": int(strategy.removeprefix("zero")),
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_bucket_size": BUCKET_NUMBERS,
    }
    if strategy == "zero3":
        zero |= {
            "stage3_param_persistence_threshold": min(PERSIST_NUMBERS, hidden),
            "stage3_prefetch_bucket_size": BUCKET_NUMBERS,
        }
    else:
        zero |= {"allgather_bucket_size": BUCKET_NUMBERS, "compute_grad_norm": False}
    if cpu_offload:
        zero |= {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    made = {
        "train_batch_size": batch.global_size,
        "train_micro_batch_size_per_gpu": batch.micro_size,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": 1_000_000_000,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    assert batch.global_size == batch.micro_size * batch.accumulation * world_size
    return _merged(made, recipe.parallel.deepspeed, ALLOWED, "parallel.deepspeed")


def _merged(
    made: Mapping[str, Any], extra: Mapping[str, Any], allowed: Mapping[str, Any], where: str
) -> dict[str, Any]:
    result = dict(made)
    for key, value in extra.items():
        path = f"{where}.{key}"
        if key in made and not isinstance(made[key], Mapping):
            if value != made[key]:
                raise PlanError(
                    f"{path}: is {value!r} in the recipe, but the plan sets it to {made[key]!r}",
                    "change the recipe's own key that it follows from (train, quantization, parallel), "
                    f"or leave {key} out",
                )
            continue
        kind = allowed.get(key)
        if kind is None:
            near = difflib.get_close_matches(key, allowed, n=1)
            raise PlanError(
                f"{path}: {_REFUSED.get(key, 'not a key that may be added')}",
                f"did you mean {near[0]}?" if near and key not in _REFUSED else _may_be_added(where, allowed),
            )
        if isinstance(kind, Mapping):
            if not isinstance(value, Mapping):
                raise PlanError(f"{path}: {value!r} is no mapping", "write it as {key: value}")
            if key.startswith("offload_") and key not in made:
                raise PlanError(
                    f"{path}: nothing is offloaded",
                    "set parallel.cpu_offload: true (zero3), which forecasts it",
                )
            else:
                result[key] = _merged(made.get(key, {}), value, kind, path)
        elif type(value) is not kind:
            raise PlanError(f"{path}: {value!r} is a {type(value).__name__}", f"it takes a {kind.__name__}")
        else:
            result[key] = value
    return result


def _may_be_added(where: str, allowed: Mapping[str, Any]) -> str:
    return f"{where} may add: {', '.join(allowed)}"
