"""Linears that read one x in one autograd node: q, k and v of an attention, gate and up of an MLP.

A model's own forward calls them one after the other. The member that is called first with an x, while the module that
holds them all is running, computes the outputs of all members; each of the others is given its own if it is called
with that very x, unchanged. In any other case a linear computes alone. What was not asked for is dropped when the
module's forward pass ends, also where it ends by an exception: then nothing of it is left to a recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, is_grad_enabled, nn

from decompft.adapters.base import Adapter
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.frozen.gated import gated
from decompft.adapters.frozen.linear import Member, frozen_linears
from decompft.adapters.spec import spec_of

_HELD = "_decompft_joints"  # attribute of a module whose children are joined


class Joint:
    """The members of one node, and their outputs between the first call and the last."""

    def __init__(self, holder: nn.Module, members: Sequence[Adapter | FrozenLinear]) -> None:
        self.members = tuple(members)
        self._holder = holder
        self.is_running = False
        self._outputs: dict[int, Tensor] = {}  # id of a member that has not been called yet -> its y
        self._x: tuple[Tensor, int, bool] | None = None
        self._hooks = (
            holder.register_forward_pre_hook(self._begin),
            holder.register_forward_hook(self._end, always_call=True),
        )
        for member in self.members:
            member.joint = self
        # found there also when the members were exchanged for others
        holder.__dict__.setdefault(_HELD, []).append(self)

    def output(self, member: nn.Module, x: Tensor) -> Tensor | None:
        """y of `member`; None where it has to compute alone."""
        if not self.is_running or x.is_inference():  # which cannot tell whether x has changed
            return None
        state = (x, x._version, is_grad_enabled())
        if self._x is None:
            if self.drops:
                return None
            ys = frozen_linears(x, [_member(m) for m in self.members])
            self._x = state
            self._outputs = {id(m): y for m, y in zip(self.members, ys, strict=True)}
        elif self._x[0] is not x or self._x[1:] != state[1:]:
            return None
        y = self._outputs.pop(id(member), None)
        if not self._outputs:
            self._x = None
        return y

    @property
    def drops(self) -> bool:
        """Whether each has a mask of its own, and computes alone."""
        return any(m.config.dropout and m.training for m in self.members if isinstance(m, Adapter))

    def part(self) -> None:
        """From now on each computes alone."""
        self._holder.__dict__[_HELD].remove(self)
        for hook in self._hooks:
            hook.remove()
        for member in self.members:
            member.joint = None
        self.drop(is_running=False)

    def _begin(self, holder: nn.Module, args: Any) -> None:
        self.drop(is_running=True)

    def _end(self, holder: nn.Module, args: Any, result: Any) -> None:
        self.drop(is_running=False)

    def drop(self, *, is_running: bool) -> None:
        """Forget x and its outputs; whether members compute together from here on."""
        self.is_running, self._x, self._outputs = is_running, None, {}


def together(
    x: Tensor, pair: tuple[Adapter | FrozenLinear, Adapter | FrozenLinear]
) -> tuple[Tensor, Callable[[], Tensor]] | None:
    """silu(gate(x)) * up(x) as `gated` where gate and up are all members of one node; None where they compute alone."""
    joint = pair[0].joint
    if joint is None or joint.members != pair or joint.drops:
        return None
    return gated(x, [_member(m) for m in pair])


@contextmanager
def running(holder: nn.Module) -> Iterator[None]:
    """Within, `holder`'s children compute together though nobody calls `holder` itself."""
    held: list[Joint] = list(holder.__dict__.get(_HELD, ()))
    before = [joint.is_running for joint in held]
    for joint in held:
        joint.drop(is_running=True)
    try:
        yield
    finally:
        for joint, was_running in zip(held, before, strict=True):
            joint.drop(is_running=was_running)


def join(model: nn.Module, groups: Sequence[tuple[str, ...]]) -> int:
    """Let members of a group that are children of one module compute together; returns how many groups there are.

    A child stays alone that is no frozen linear, or whose adapter has a forward pass of its own (LieRA) or no thin
    factors (svdiff).

    Args:
        groups: names of children, e.g. ("q_proj", "k_proj", "v_proj").
    """
    part(model)
    count = 0
    for holder in list(model.modules()):
        for names in groups:
            children: list[Any] = [getattr(holder, name, None) for name in names]
            found = [m for m in children if _can_join(m)]
            if len(found) > 1 and len({_base(m).in_features for m in found}) == 1:
                Joint(holder, found)
                count += 1
    return count


def part(model: nn.Module) -> None:
    """Undo `join`."""
    for joint in list(joints(model)):
        joint.part()


def joints(model: nn.Module) -> Iterator[Joint]:
    """Those of a model, in its order."""
    return (joint for module in model.modules() for joint in module.__dict__.get(_HELD, ()))


def _can_join(module: Any) -> bool:
    if not isinstance(module, Adapter):
        return isinstance(module, FrozenLinear)
    out, in_, config = module.base.out_features, module.base.in_features, module.config
    # factors of the whole spectrum (svdiff) are as large as a weight: stacked they would be three
    is_thin = spec_of(config).num_columns(out, in_, config) < min(out, in_)
    return is_thin and type(module).forward is Adapter.forward


def _base(module: Any) -> FrozenLinear:
    base: FrozenLinear = module.base if isinstance(module, Adapter) else module
    return base


def _member(module: Adapter | FrozenLinear) -> Member:
    if isinstance(module, FrozenLinear):
        return Member(module)
    return Member(module.base, module, module.trained(), module.fixed())
