"""The tensors of a model in training and what steps them, as those see it that change it between two steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from decompft.launcher.worker.engines.base import MOMENTS, Engine
from decompft.launcher.worker.optimizer import read_moments, write_moments


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A model's own tensors by name, the optimizer as the engine prepared it, and the engine."""

    trained: Mapping[str, nn.Parameter]
    buffers: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    engine: Engine

    def place(self, name: str, values: Tensor) -> None:
        """Set a trained tensor or a buffer, whole, on every rank; `Engine.after_restore` is due after the last one."""
        target = self.trained[name] if name in self.trained else self.buffers[name]
        self.engine.place(target, values)

    def whole(self, name: str) -> Tensor:
        """A trained tensor; every rank asks for the same ones in the same order."""
        return self.engine.whole(self.trained[name])

    def moments(self, name: str) -> dict[str, Tensor]:
        """Copies of AdamW's state of this rank's piece of a trained tensor, flat; empty before the first step."""
        found = read_moments(self.optimizer, self.trained[name], self.engine)
        return {kind: value.reshape(-1).clone() for kind, value in found.items()}

    def set_moments(self, name: str, moments: Mapping[str, Tensor]) -> None:
        write_moments(self.optimizer, self.trained[name], moments, self.engine)

    def forget(self, name: str) -> None:
        """Let the optimizer start anew with a trained tensor."""
        start, stop = self.engine.piece(self.trained[name])
        fresh = {kind: torch.zeros(stop - start) for kind in MOMENTS}
        self.set_moments(name, {**fresh, "step": torch.zeros(1)})
