"""Recipes and machines for tests of the planner: nothing is read, built or started."""

from __future__ import annotations

from typing import Any

from decompft.launcher import planner
from decompft.launcher.families import shape_of
from decompft.launcher.machine import Machine
from decompft.launcher.model_source import find_config
from decompft.launcher.models import ModelShape
from decompft.launcher.plan import Plan
from decompft.launcher.recipe import Recipe

GIB = 1 << 30
TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 512,
}  # fmt: skip
LLAMA_7B, LLAMA_70B = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-70b-hf"
ALONE = {"parallel": {"strategy": "single"}}
DENSE = {**ALONE, "quantization": {"format": "none"}}
CPU = Machine(num_cores=2, host_memory_bytes=16 * GIB)


def read_shape(recipe: Recipe) -> ModelShape:
    """Of the recipe's model."""
    return shape_of(find_config(recipe).config, recipe.model.task, recipe.model.num_labels)


def gpus(
    count: int,
    gib: float | None,
    *,
    host_gib: int = 512,
    name: str | None = None,
    capability: tuple[int, int] | None = None,
) -> Machine:
    return Machine(
        num_gpus=count,
        gpu_memory_bytes=int(gib * GIB) if gib is not None else None,
        gpu_name=name,
        compute_capability=capability,
        host_memory_bytes=host_gib * GIB,
    )


def recipe(model: str | dict[str, Any] = LLAMA_7B, **sections: Any) -> Recipe:
    source: dict[str, Any] = (
        {"id": model} if isinstance(model, str) else {"config": model, "weights": "random"}
    )
    source |= {key: sections.pop(key) for key in ("attention", "task") if key in sections}
    data = {"train": [{"path": "/data/train.jsonl"}], "sequence_length": 2048 if model is not TINY else 256}
    train = {"max_steps": 100, "global_batch_size": 16}
    return Recipe.model_validate(
        {
            "name": "planned",
            "model": source,
            "adapter": {"method": "map", "targets": "all-linear"} | sections.pop("adapter", {}),
            "data": data | sections.pop("data", {}),
            "train": train | sections.pop("train", {}),
            **sections,
        }
    )


def make(machine: Machine, model: str | dict[str, Any] = LLAMA_7B, **sections: Any) -> Plan:
    return planner.make(recipe(model, **sections), machine=machine)
