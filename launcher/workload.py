"""What is forecast: a model with its trained part, and how its work is laid out over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from decompft.adapters.formats import FORMAT_SPECS
from decompft.adapters.spec import AdapterConfig, spec_of
from decompft.adapters.specs.base import count
from decompft.launcher.models import LinearShape, ModelShape, adapted_linears, trained_modules, trained_rows
from decompft.launcher.plan import Device
from decompft.launcher.recipe import Recipe
from decompft.launcher.recompute import Recompute
from decompft.launcher.strategies import STRATEGIES, Strategy, StrategySpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How one forecast spreads the work."""

    device: Device
    strategy: Strategy
    world_size: int
    micro_size: int  # rows
    recompute: Recompute
    # of selective: the first so many, the others norms and activations alone; None: all
    recompute_blocks: int | None = None
    group_size: int | None = None  # ranks that share one copy of what is sharded; None: all
    cpu_offload: bool = False

    @property
    def spec(self) -> StrategySpec:
        return STRATEGIES[self.strategy]

    @property
    def shard_size(self) -> int:
        """Ranks over which the base is cut."""
        return self._shards(self.spec.shards_base)

    @property
    def gradient_shards(self) -> int:
        return self._shards(self.spec.shards_gradients)

    @property
    def optimizer_shards(self) -> int:
        return self._shards(self.spec.shards_optimizer)

    def _shards(self, is_sharded: bool) -> int:
        return (self.group_size or self.world_size) if is_sharded else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What does not depend on the layout, counted once and forecast many times."""

    shape: ModelShape
    recipe: Recipe
    adapted: tuple[tuple[str, int, int, AdapterConfig], ...]  # (name, out, in, adapter)
    num_adapter_params: int
    num_adapter_fixed: int  # numbers of adapters that do not train: norms, thin factors of the base
    num_adapter_derived: int  # random ones of theirs that are in no file: once for layers of one shape
    num_module_params: int  # of modules trained whole
    num_token_params: int  # of rows of tokens, beside the frozen ones
    has_liger: bool = True  # Liger is installed where it runs

    @property
    def num_trained(self) -> int:
        return self.num_adapter_params + self.num_module_params + self.num_token_params


def workload(shape: ModelShape, recipe: Recipe) -> Workload:
    """Resolve targets and modules trained whole against the model.

    Raises:
        AdapterError: a target or a module pattern matches nothing, or modules trained whole are train_tokens' own.
    """
    modules = dict(trained_modules(shape, recipe.adapter.train_modules))
    num_token_params = trained_rows(shape, recipe.adapter.train_tokens, list(modules))
    if shape.task == "sequence-classification":
        # no checkpoint has this head: it starts random and must learn
        modules[shape.head.name] = shape.head.num_weights + shape.head.num_biases
    adapted = tuple(adapted_linears(shape, recipe.adapter))
    return Workload(
        shape=shape,
        recipe=recipe,
        adapted=adapted,
        num_adapter_params=sum(spec_of(c).num_params(out, in_, c) for _, out, in_, c in adapted),
        num_adapter_fixed=sum(count(spec_of(c).buffers(out, in_, c)) for _, out, in_, c in adapted),
        num_adapter_derived=_num_derived(adapted),
        num_module_params=sum(modules.values()),
        num_token_params=num_token_params,
    )


def _num_derived(adapted: tuple[tuple[str, int, int, AdapterConfig], ...]) -> int:
    shared = {
        (c.method, repr(c.options), name, shape)
        for _, out, in_, c in adapted
        for name, shape in spec_of(c).derived(out, in_, c).items()
    }
    return sum(math.prod(shape) for *_, shape in shared)


def quantized_linears(shape: ModelShape, recipe: Recipe) -> tuple[LinearShape, ...]:
    """The linears stored in a quantized format: all but the head, adapted or not."""
    return shape.linears if FORMAT_SPECS[recipe.quantization.format].is_quantized else ()


def weight_bytes(part: LinearShape, recipe: Recipe) -> tuple[int, int]:
    """(codes, scales) of one linear's weight as it is stored; a dense weight has no scales."""
    q = recipe.quantization
    spec = FORMAT_SPECS[q.format]
    if not spec.is_quantized:
        return part.num_weights * storage_bytes(recipe), 0
    codes, scales = spec.row_bytes(part.in_, q.block_size, q.double_quant)
    return part.out * codes, part.out * scales


def compute_bytes(recipe: Recipe) -> int:
    """Of a number that matrix products work with."""
    return 4 if recipe.quantization.compute == "float32" else 2


def storage_bytes(recipe: Recipe) -> int:
    """Of a number of a dense linear weight."""
    dtype = recipe.model.dtype
    return compute_bytes(recipe) if dtype == "auto" else 4 if dtype == "float32" else 2
