"""What every adapter is: a frozen base, trained tensors, and the factors that they make of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decompft.adapters.frozen.base import FrozenLinear, weight_times
from decompft.adapters.frozen.factors import Factors, WeightTimes
from decompft.adapters.frozen.linear import frozen_linear
from decompft.adapters.spec import ADAPTER_SPECS, AdapterConfig

if TYPE_CHECKING:
    from decompft.adapters.joint import Joint

# facts of the base that a method's spec asks for -> a number, a vector, or what `facts_of` returned
Facts = Mapping[str, float | Tensor]
# (kind, k, make): what `make()` returns, or what an earlier call with the same weight, kind and k returned
Cached = Callable[[str, int, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settling:
    """A tensor's gradient is to be scaled by min(1, (size + offset) / limit).

    While that is below 1 the tensor is left out of gradient clipping as well.
    """

    size: Tensor  # (1,), on the device, where no host waits for it
    offset: float
    limit: float

    @staticmethod
    def factors(waits: Sequence[Settling]) -> Tensor:
        """(n,) float64, of all at once."""
        sizes = torch.cat([w.size for w in waits]).double()
        first, *more = {(w.offset, w.limit) for w in waits}
        if more:
            each = torch.tensor([(w.offset, w.limit) for w in waits], dtype=torch.float64)
            each = each.to(sizes.device, non_blocking=True)
            found = (sizes + each[:, 0]) / each[:, 1]
        else:
            found = (sizes + first[0]) / first[1]
        return torch.where(found < 1, found, 1.0)  # NaN is no reason to leave a tensor out of a norm


class Adapter(nn.Module):
    """A linear layer y = row * W (col * x) + q up (down x) + bias over a frozen W; subclasses give the factors.

    Shapes: x (..., in), W (out, in); the rest as in `Factors`. Trained tensors are float32 whatever
    the compute dtype, and are parameters of this module under their registry names. Buffers under
    their registry names do not train, but lie in the adapter's file.
    """

    reads_weight = False  # `note` wants products of the weight in every pass
    pulls_through_weight = False  # `pull_back` is shown the weight
    uses_products = True  # W x is its base's `product`; False: it multiplies with a W that it has changed
    note_has_slope = False  # and what it returns has a gradient, which `pull_back` carries on
    joint: Joint | None = None  # the linears that it may compute with

    def __init__(self, base: FrozenLinear, config: AdapterConfig) -> None:
        super().__init__()
        self.base = base
        self.config = config
        spec = ADAPTER_SPECS[config.method]
        # kept, because a sharded parameter may not say its whole shape
        self.shapes = spec.tensors(base.out_features, base.in_features, config)
        for name, shape in self.shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32)))
        self.fixed_shapes = spec.buffers(base.out_features, base.in_features, config)
        for name, shape in self.fixed_shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=torch.float32))
        self.derived_shapes = spec.derived(base.out_features, base.in_features, config)
        for name, shape in self.derived_shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=torch.float32), persistent=False)
        self.is_thin = spec.num_columns(base.out_features, base.in_features, config) > 0  # it has up and down
        self.num_siblings = 1  # adapters with this one's regulariser in the model, this one included
        # the part of `penalty` that one backward pass adds: 1 / (micro batches of a step, over all ranks)
        self.penalty_share = 0.0

    # -- the formula --------------------------------------------------------------------------

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        """The factors as a differentiable function, in whatever floating dtype the tensors have.

        Args:
            trained: the trained tensors in the registry's order.
            fixed: the buffers in the registry's order, then what `note` returned.
        """
        raise NotImplementedError

    def note(
        self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...], times: WeightTimes
    ) -> tuple[Tensor, ...]:
        """Small tensors that this pass needs of products of the weight that is used; constants to autograd.

        Only called where `reads_weight`.
        """
        return ()

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the trained tensors from those of the factors, and the share of the penalty's.

        The default differentiates `factors` again; a method on the fast path writes it out.

        Args:
            found: what `factors` returned in the forward pass.
            grads: a gradient in the place of each tensor of `factors`, None for what has none.
            weight: the one that is used (out, in), in the compute dtype, where `pulls_through_weight`.
        """
        with torch.enable_grad():
            leaves = tuple(t.detach().requires_grad_(True) for t in trained)
            again = self.factors(leaves, fixed)
            pairs = [(getattr(again, f.name), getattr(grads, f.name)) for f in fields(Factors)]
            pairs = [(o, g) for o, g in pairs if isinstance(o, Tensor) and g is not None and o.requires_grad]
            if self.penalty_share and (penalty := self.penalty(leaves, fixed)) is not None:
                pairs.append((penalty, torch.full_like(penalty, self.penalty_share)))
            outputs, slopes = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, leaves, slopes, allow_unused=True)

    def penalty(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Tensor | None:
        """This layer's part of a regulariser that is added to the loss of a step; None without one."""
        return None

    def live(self, fixed: tuple[Tensor, ...]) -> Tensor | None:
        """1 for rows of A, and columns of B, that exist, else 0 (rank,); None where all do."""
        return None

    # -- the start ----------------------------------------------------------------------------

    def facts_of(self, weight: Tensor, cached: Cached, generator: torch.Generator) -> dict[str, Tensor]:
        """What the start needs of the full-precision weight (out, in), float32: thin factors of it.

        Only called where the spec needs "full_weight", once, on one rank.

        Args:
            cached: through which a decomposition is made or read from disk.
            generator: as for `initial_values`, but a stream of its own.
        """
        return {}

    def initial_values(self, generator: torch.Generator, facts: Facts) -> dict[str, Tensor]:
        """Values of the trained tensors, and of buffers, at the start.

        Args:
            generator: a CPU generator seeded for this layer alone, so that the values depend on
                neither world size nor the order of layers.
            facts: what the method's spec needs of the base, e.g. {"frobenius_norm": 12.3}.
        """
        raise NotImplementedError

    def derived(self) -> dict[str, Tensor]:
        """Values of the buffers that are in no file, because they follow from options, name and shape alone."""
        return {}

    @classmethod
    def remarks(cls, layers: list[tuple[str, Adapter]]) -> list[str]:
        """Lines for the user once the layers of this class have started."""
        return []

    @property
    def rewrites_base(self) -> bool:
        """Whether `base_rows` changes anything: the base is then no one else's."""
        return False

    def base_rows(self, rows: Tensor, first: int, values: Mapping[str, Tensor]) -> Tensor:
        """Rows [first, first + n) of the full-precision weight -> those that are stored as the base.

        Args:
            values: this layer's tensors as they were at the start, or the file's.
        """
        return rows

    # -- what others do with it ---------------------------------------------------------------

    @torch.no_grad()
    def effective(self, dense: Tensor) -> Factors:
        """The factors of now, over the base weight `dense` (out, in)."""
        fixed = self.fixed_over(dense)
        if self.reads_weight:
            fixed = (*fixed, *self.note(self.trained(), fixed, partial(weight_times, dense)))
        return self.factors(self.trained(), fixed)

    @torch.no_grad()
    def merged(self, dense: Tensor) -> Tensor:
        """The one weight (out, in) that equals this layer over the base weight `dense`, in float32."""
        found, weight = self.effective(dense), dense if dense.dtype == torch.float64 else dense.float()
        if found.row is not None:
            weight = weight * found.row.view(-1, 1)
        if found.col is not None:
            weight = weight * found.col
        if found.up is not None and found.down is not None:
            weight = weight + found.q * (found.up @ found.down)
        return weight

    @torch.no_grad()
    def unmerged(self, merged: Tensor, dense: Tensor) -> Tensor:
        """The base weight (out, in) that is left in `merged` once the change is taken off again; not finite where it
        has no inverse. What of the change follows from the base's weight is taken of `dense`."""
        found, left = self.effective(dense), merged if merged.dtype == torch.float64 else merged.float()
        if found.up is not None and found.down is not None:
            left = left - found.q * (found.up @ found.down)
        if found.row is not None:
            left = left / found.row.view(-1, 1)
        return left if found.col is None else left / found.col

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias (out,) that goes with the merged weight; most methods leave the base's."""
        found = self.effective(torch.empty(0)).bias if not self.reads_weight else None
        if found is None:
            return bias
        return found if bias is None else bias.float() + found

    @torch.no_grad()
    def delta(self) -> tuple[Tensor, Tensor] | None:
        """(up, down) with W* = W + up @ down, float32; None where the base is scaled, or no low rank changes it."""
        if self.reads_weight or self.rewrites_base:
            return None
        found = self.effective(torch.empty(0))
        if found.row is not None or found.col is not None or found.bias is not None or found.relu:
            return None
        return None if found.up is None or found.down is None else (found.q * found.up, found.down)

    def change_of_checkpoint(self) -> tuple[Tensor, Tensor] | None:
        """(up, down) over the checkpoint's own weight, where quantization loses nothing; else as `delta`.

        Another matrix than `delta`'s where `rewrites_base`: what was taken out of the base belongs to it.
        """
        return self.delta()

    def on_step(self, step: int) -> None:
        """Called on all ranks before the forward passes of optimizer step `step` (from 0)."""

    def lr_scales(self) -> dict[str, float]:
        """Trained tensor -> its learning rate over the recipe's; 1 for those not named."""
        return {}

    def no_decay(self) -> tuple[str, ...]:
        """Trained matrices that weight decay must leave alone; vectors never decay."""
        return ()

    def restarts(self) -> dict[str, int]:
        """Trained tensors whose second phase begins after so many optimizer steps, with a fresh optimizer state."""
        return {}

    def asleep(self, step: int) -> tuple[str, ...]:
        """Trained tensors that have no slope yet in the passes of optimizer step `step` (from 0)."""
        return ()

    def settling(self) -> dict[str, Settling]:
        """Trained tensors whose gradient is scaled down while the layer settles."""
        return {}

    # -- the layer ----------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        if self.joint is not None and (y := self.joint.output(self, x)) is not None:
            return y
        dropped = None
        if self.config.dropout and self.training and self.is_thin:
            dropped = F.dropout(x, self.config.dropout)
        return frozen_linear(
            x, self.base, dropped=dropped, thin=self, trained=self.trained(), fixed=self.fixed()
        )

    def trained(self) -> tuple[Tensor, ...]:
        """The trained tensors in the registry's order."""
        return tuple(self.parameters(recurse=False))

    def fixed(self) -> tuple[Tensor, ...]:
        """The buffers in the registry's order."""
        return tuple(self.buffers(recurse=False))

    def fixed_over(self, dense: Tensor) -> tuple[Tensor, ...]:
        """The buffers as they would be over another base weight than the one that was trained on."""
        return self.fixed()


def kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Kaiming-uniform with a = sqrt(5), as LoRA starts A: U(-1/sqrt(in), 1/sqrt(in))."""
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
