"""How work can be spread over ranks: one torch-free description a strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Strategy = Literal["single", "ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StrategySpec:
    """What a strategy spreads over the ranks; what it does not is whole on each."""

    name: Strategy
    title: str  # one line for tables
    impl: str  # "package.module:Class", resolved on a rank
    shards_base: bool = False
    shards_gradients: bool = False
    shards_optimizer: bool = False
    may_offload: bool = False  # shards may live in host memory
    is_deepspeed: bool = False
    may_record: bool = False  # a pass holds no collective, and gradients can stay where they are


STRATEGIES: dict[str, StrategySpec] = {
    spec.name: spec
    for spec in (
        StrategySpec(
            name="single",
            title="one rank",
            impl="decompft.launcher.worker.engines.base:Engine",
            may_record=True,
        ),
        StrategySpec(
            name="ddp",
            title="the model on every rank, gradients summed",
            impl="decompft.launcher.worker.engines.ddp:DdpEngine",
            may_record=True,
        ),
        StrategySpec(
            name="fsdp",
            title="FSDP2: everything sharded over all ranks",
            impl="decompft.launcher.worker.engines.fsdp:FsdpEngine",
            shards_base=True,
            shards_gradients=True,
            shards_optimizer=True,
            may_offload=True,
        ),
        StrategySpec(
            name="hsdp",
            title="FSDP2: everything sharded within groups of parallel.shard_size ranks, groups replicated",
            impl="decompft.launcher.worker.engines.fsdp:HsdpEngine",
            shards_base=True,
            shards_gradients=True,
            shards_optimizer=True,
        ),
        StrategySpec(
            name="zero1",
            title="DeepSpeed ZeRO-1: optimizer state sharded",
            impl="decompft.launcher.worker.engines.zero:Zero12Engine",
            shards_optimizer=True,
            is_deepspeed=True,
        ),
        StrategySpec(
            name="zero2",
            title="DeepSpeed ZeRO-2: gradients and optimizer state sharded",
            impl="decompft.launcher.worker.engines.zero:Zero12Engine",
            shards_gradients=True,
            shards_optimizer=True,
            is_deepspeed=True,
        ),
        StrategySpec(
            name="zero3",
            title="DeepSpeed ZeRO-3: everything sharded over all ranks",
            impl="decompft.launcher.worker.engines.zero3:Zero3Engine",
            shards_base=True,
            shards_gradients=True,
            shards_optimizer=True,
            may_offload=True,
            is_deepspeed=True,
        ),
    )
}
