"""What was decided: the resolved plan, which is all that a rank reads."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from decompft.launcher.recipe import Recipe

Strategy = Literal["single", "ddp", "fsdp"]
Device = Literal["cuda", "cpu"]


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class World(Frozen):
    """Who takes part."""

    nodes: int
    ranks_per_node: int
    device: Device

    @property
    def size(self) -> int:
        return self.nodes * self.ranks_per_node


class Batch(Frozen):
    """The batch law: global_size = micro_size * accumulation * world.size, exactly."""

    global_size: int  # rows
    micro_size: int  # rows
    accumulation: int  # micro batches a rank and step
    tokens_per_step: int  # upper bound: rows * sequence_length


class Term(Frozen):
    """One named part of the memory forecast of a rank."""

    name: str
    num_bytes: int
    note: str = ""


class Forecast(Frozen):
    """Memory of the fullest rank, term by term."""

    terms: tuple[Term, ...]
    capacity_bytes: int | None  # of one device, None when unknown

    @property
    def total_bytes(self) -> int:
        return sum(t.num_bytes for t in self.terms)


class Plan(Frozen):
    """Everything a run needs to know, with nothing left open."""

    version: int = 1
    name: str
    recipe: Recipe  # paths made absolute, otherwise as written
    shape_source: str  # where the model's shape was read
    model_dir: str | None  # local folder of the checkpoint, when it is known already
    world: World
    strategy: Strategy
    strategy_reason: str
    recompute: Literal["none", "full"]
    batch: Batch
    num_base_params: int
    num_adapter_params: int
    forecast: Forecast
    warnings: tuple[str, ...] = ()
