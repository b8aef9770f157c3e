"""What happens between two optimizer steps to adapters that change their form while they train?

Everything is keyed on the optimizer step and done on all ranks alike; what it depends on is in a checkpoint, so that
a run resumed before or after a change goes on as an unbroken one. Parameters, their shapes and the
optimizer's groups never change. Models without such adapters pay nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from decompft.adapters.adalora import AdaLoraLinear
from decompft.adapters.base import Adapter
from decompft.adapters.flexlora import FlexLoraLinear
from decompft.adapters.inject import adapters
from decompft.adapters.launched import LaunchedAdapter
from decompft.launcher.worker.build import Built
from decompft.launcher.worker.engines.base import Engine
from decompft.launcher.worker.phase_budget import Budget
from decompft.launcher.worker.phase_exchange import Exchange
from decompft.launcher.worker.phase_launch import Launch
from decompft.launcher.worker.running import Running

A = TypeVar("A", bound=Adapter)
Averages = Mapping[str, Mapping[str, Tensor]]


class Phase(Protocol):
    """One kind of change, for all adapters that know it."""

    def observe(self, step: int) -> None: ...

    def advance(self, step: int) -> None: ...

    def averages(self) -> Averages: ...

    def resume(self, step: int) -> None: ...


class Phases:
    """The changes of a model's adapters.

    Args:
        optimizer: as `engine.prepare_training` returned it.
        total_steps: of the run.
        seed: of what is drawn in a change.
        say: takes a line for the user.

    Raises:
        AdapterError: options that do not fit the run's steps, or its checkpoint.
    """

    def __init__(
        self,
        built: Built,
        optimizer: torch.optim.Optimizer,
        engine: Engine,
        *,
        total_steps: int,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        layers = list(adapters(built.model.model))
        running = Running(trained=built.trained, buffers=built.buffers, optimizer=optimizer, engine=engine)
        launched = {n: a for n, a in layers if isinstance(a, LaunchedAdapter)}
        flexible = {n: a for n, a in layers if isinstance(a, FlexLoraLinear)}
        budgeted = {n: a for n, a in layers if isinstance(a, AdaLoraLinear) and n not in flexible}
        self._phases: list[Phase] = [
            *(
                Launch(m, running, built.weights(), total_steps=total_steps, say=say)
                for m in _by_config(launched)
            ),
            *(Exchange(m, running, total_steps=total_steps, seed=seed) for m in _by_config(flexible)),
            *(Budget(m, running, total_steps=total_steps) for m in _by_config(budgeted)),
        ]

    def observe(self, step: int) -> None:
        """Look at the gradients of optimizer step `step` (from 0), reduced and clipped, before it is taken."""
        for phase in self._phases:
            phase.observe(step)

    def advance(self, step: int) -> None:
        """Change what is due after optimizer step `step` was taken."""
        for phase in self._phases:
            phase.advance(step)

    def averages(self) -> dict[str, dict[str, Tensor]]:
        """State of trained tensors for a checkpoint: kind -> name -> this rank's `Engine.piece`, flat, in place."""
        found: dict[str, dict[str, Tensor]] = {}
        for phase in self._phases:
            for kind, tensors in phase.averages().items():
                found.setdefault(kind, {}).update(tensors)
        return found

    def resume(self, step: int) -> None:
        """Called when tensors and averages were loaded from the checkpoint after `step` optimizer steps."""
        for phase in self._phases:
            phase.resume(step)


def _by_config(layers: Mapping[str, A]) -> list[dict[str, A]]:
    """Layers of one method and with equal options: they change together, and share one budget."""
    groups: dict[tuple[str, str], dict[str, A]] = {}
    for name, adapter in layers.items():
        groups.setdefault((adapter.config.method, repr(adapter.config.options)), {})[name] = adapter
    return list(groups.values())
