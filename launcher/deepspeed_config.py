"""The config that DeepSpeed is given: generated from the plan, extended by the recipe."""

from __future__ import annotations

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


def make_config(
    recipe: Recipe, *, strategy: Strategy, batch: Batch, world_size: int, cpu_offload: bool
) -> dict[str, Any]:
    """The JSON of strategies zero1 to zero3, with `parallel.deepspeed` merged in.

    No precision is switched on: DeepSpeed would cast every floating parameter, the packed bytes of the
    base included. Clipping is ours, because MAP's norms settle (Adapter.settling).

    Raises:
        PlanError: `parallel.deepspeed` sets what the plan sets.
    """
    zero: dict[str, Any] = {
        "stage": int(strategy.removeprefix("zero")),
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_bucket_size": BUCKET_NUMBERS,
    }
    if strategy == "zero3":
        zero |= {
            "stage3_param_persistence_threshold": min(PERSIST_NUMBERS, _smallest_matrix(recipe)),
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
    return _merged(made, recipe.parallel.deepspeed, "parallel.deepspeed")


def _merged(made: Mapping[str, Any], extra: Mapping[str, Any], where: str) -> dict[str, Any]:
    result = dict(made)
    for key, value in extra.items():
        path = f"{where}.{key}"
        if key in _REFUSED:
            raise PlanError(f"{path}: {_REFUSED[key]}", f"leave {key} out of {where}")
        if key not in made:
            result[key] = value
        elif isinstance(made[key], Mapping) and isinstance(value, Mapping):
            result[key] = _merged(made[key], value, path)
        else:
            raise PlanError(
                f"{path}: is {value!r} in the recipe, but the plan sets it to {made[key]!r}",
                "change the recipe's own key that it follows from (train, quantization, parallel), "
                f"or leave {key} out",
            )
    return result


_REFUSED = {
    "bf16": "it casts every floating parameter, which ruins packed weights; quantization.compute is the key",
    "fp16": "it casts every floating parameter, which ruins packed weights; quantization.compute is the key",
    "optimizer": "train.optimizer and train.learning_rate are the keys",
    "scheduler": "train.schedule is the key",
    "amp": "quantization.compute is the key",
}


def _smallest_matrix(recipe: Recipe) -> int:
    """No matrix may count as small: a tiny model's would stay whole everywhere."""
    config = recipe.model.config or {}
    hidden = config.get("hidden_size", config.get("n_embd", PERSIST_NUMBERS))
    return int(hidden) if isinstance(hidden, int) else PERSIST_NUMBERS
