"""Data parallelism: whole parameters on every rank, one flat buffer of gradients, summed in two stretches a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn

from decompft.launcher.worker.engines.base import Engine

LAST_SHARE = 1 / 8  # of the numbers, at least: what nothing hides


class DdpEngine(Engine):
    """Gradients of the adapters are views of one float32 buffer that is summed over ranks.

    They come in the reverse of the parameters' order. Once the last micro batch has all of the upper stretch, that is
    summed while the backward pass of the first layers still runs, and the lower stretch after it. The order is the same
    on all ranks whenever each begins. Where passes are recorded (`keep_gradients`) both are summed at the end: a replay
    calls no hook, and what runs in order to record is none of the step's.

    torch's DistributedDataParallel cuts a whole model's gradients into many buckets; the adapters' alone are few.
    """

    def prepare_training(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
    ) -> torch.optim.Optimizer:
        ends = list(accumulate(p.numel() for p in parameters))
        self._flat = torch.zeros(ends[-1], dtype=torch.float32, device=self.device)
        for parameter, end in zip(parameters, ends, strict=True):
            parameter.grad = self._flat[end - parameter.numel() : end].view_as(parameter)
        num_lower = 1 + next(i for i, end in enumerate(ends) if end >= LAST_SHARE * ends[-1])
        self._lower, self._upper = self._flat.tensor_split([ends[num_lower - 1]])
        self._num_upper = len(parameters) - num_lower
        self._awaited: set[int] | None = None  # of the upper gradients; None but in the last micro batch
        self._begun: dist.Work | None = None  # the upper stretch's sum
        if self.world_size > 1:
            for index, parameter in enumerate(parameters[num_lower:]):
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, index))
        return optimizer

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        return self._accumulate(last and not self._keeps_gradients)

    @contextmanager
    def _accumulate(self, watches: bool) -> Iterator[None]:
        self._awaited = set(range(self._num_upper)) if watches else None
        yield
        self._awaited = None

    def _arrived(self, index: int, parameter: Tensor) -> None:
        """A gradient of the upper stretch is whole: autograd adds all uses of a tensor first."""
        if self._awaited is None:
            return
        assert index in self._awaited, f"a second gradient in one pass, {tuple(parameter.shape)}"
        self._awaited.remove(index)
        if not self._awaited:
            self._begun = _begin_sum(self._upper)

    def reduce_gradients(self) -> None:
        if self.world_size == 1:
            return
        works = []
        if self._num_upper:
            works.append(self._begun or _begin_sum(self._upper))
        works.append(_begin_sum(self._lower))
        for work in works:
            work.wait()
        self._begun = None

    def zero_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        self._flat.zero_()

    def gradients(self) -> Tensor:
        """The flat buffer, (total trained numbers,)."""
        return self._flat


def _begin_sum(stretch: Tensor) -> dist.Work:
    work = dist.all_reduce(stretch, async_op=True)
    assert work is not None  # as asked for
    return work
