"""What was decided: the resolved plan, which is all that a rank reads."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from decompft.launcher.recipe import Recipe
from decompft.launcher.recompute import Recompute
from decompft.launcher.strategies import Strategy

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


# terms that no tensor allocator counts
RUNTIME, RECORDED = "runtime context", "recorded passes"


class Forecast(Frozen):
    """Memory of the fullest rank, term by term; on a CPU the device's memory is the host's."""

    terms: tuple[Term, ...]
    capacity_bytes: int | None  # of one device, None when unknown
    host_terms: tuple[Term, ...] = ()  # beside a GPU
    host_capacity_bytes: int | None = None  # a rank's part of the node's memory

    @property
    def total_bytes(self) -> int:
        return sum(t.num_bytes for t in self.terms)

    @property
    def allocated_bytes(self) -> int:
        """What torch.cuda.max_memory_allocated should show: all but the runtime's own."""
        return sum(t.num_bytes for t in self.terms if t.name not in (RUNTIME, RECORDED))

    @property
    def host_total_bytes(self) -> int:
        return sum(t.num_bytes for t in self.host_terms)


class TimeTerm(Frozen):
    """One named part of the time of a step."""

    name: str
    seconds: float
    note: str = ""


class StepTime(Frozen):
    """The time forecast of an optimizer step, by what it goes to."""

    device: str  # whose measured rates it was made with
    terms: tuple[TimeTerm, ...]
    limit: str  # what more of would make it faster

    @property
    def seconds(self) -> float:
        return sum(t.seconds for t in self.terms)


class Plan(Frozen):
    """Everything a run needs to know, with nothing left open."""

    version: int = 1
    name: str
    recipe: Recipe  # paths made absolute, otherwise as written
    shape_source: str  # where the model's shape was read
    model_dir: str | None  # local folder of the checkpoint, when it is known already
    base_config: dict[str, Any] = {}  # the transformers config that the shape was made from
    world: World
    strategy: Strategy
    strategy_reason: str
    shard_size: int = 1  # ranks that share one copy of the base
    cpu_offload: bool = False  # fsdp and zero3; the ladder may choose it unasked
    deepspeed: dict[str, Any] | None = None  # zero1 to zero3: the config that DeepSpeed is given
    recompute: Recompute
    # of selective: the first so many, the others norms and activations alone; None: all
    recompute_blocks: int | None = None
    cuda_graph: bool = False  # passes are recorded
    cuda_graph_reason: str = ""  # where that was asked for
    batch: Batch
    num_base_params: int
    num_adapter_params: int
    num_module_params: int = (
        0  # of what trains beside adapters: train_modules, train_tokens, a new classification head
    )
    forecast: Forecast
    checkpoint_bytes: int = 0  # of one checkpoint on disk
    steps_per_epoch: float | None = None  # None where it is known only once the data is tokenized
    seconds_per_step: float | None = None  # None when no speed is known for this device
    time: StepTime | None = None  # the same, by what it goes to
    save_pause_s: float = 0.0  # what a save adds to the steps around it
    warnings: tuple[str, ...] = ()


def to_json(plan: Plan) -> str:
    """The plan as text: sorted and indented, so that equal plans are equal bytes."""
    return json.dumps(plan.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"
