"""Data parallelism: whole parameters on every rank, one all-reduce of one flat buffer a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from decompft.launcher.worker.engines.base import Engine


class DdpEngine(Engine):
    """Gradients of the adapters are views of one float32 buffer that is summed over ranks.

    torch's DistributedDataParallel buckets and overlaps a whole model's gradients; here they are
    the adapters' alone, so that one collective after the last micro batch costs less than its hooks.
    """

    def prepare_training(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
    ) -> torch.optim.Optimizer:
        total = sum(p.numel() for p in parameters)
        self._flat = torch.zeros(total, dtype=torch.float32, device=self.device)
        start = 0
        for parameter in parameters:
            parameter.grad = self._flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        return optimizer

    def reduce_gradients(self) -> None:
        if self.world_size > 1:
            dist.all_reduce(self._flat)

    def zero_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        self._flat.zero_()

    def gradients(self) -> Tensor:
        """The flat buffer, (total trained numbers,)."""
        return self._flat
