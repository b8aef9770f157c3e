"""How do FlexLoRA's matrices hand directions to each other in a running, sharded model?

e is small and known whole on every rank; rows of A, columns of B and the optimizer's moments of a direction are changed
where they live. What a new direction starts from is drawn from (seed, layer, step), on all ranks alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from decompft.adapters.allocation import exchange, num_exchanged
from decompft.adapters.flexlora import FlexLoraLinear
from decompft.adapters.window import window
from decompft.launcher.errors import AdapterError
from decompft.launcher.worker.engines.base import MOMENTS, full_shape
from decompft.launcher.worker.load import generator_for
from decompft.launcher.worker.running import Running


class Exchange:
    """The adapters that share one number of directions."""

    def __init__(
        self,
        layers: Mapping[str, FlexLoraLinear],
        running: Running,
        *,
        total_steps: int,
        seed: int,
    ) -> None:
        self._layers, self._running, self._engine, self._seed = dict(layers), running, running.engine, seed
        self._options = options = next(iter(layers.values())).config.options
        try:
            self._window = window(options.init_warmup, options.final_warmup, options.interval, total_steps)
        except ValueError as error:
            raise AdapterError(f"adapter.options: {error}", "lower them, or raise train.max_steps") from error

    def observe(self, step: int) -> None:
        """Nothing: importance is a matter of e alone."""

    def averages(self) -> Mapping[str, Mapping[str, Tensor]]:
        return {}

    def resume(self, step: int) -> None:
        """Nothing: what lives is in the masks."""

    @torch.no_grad()
    def advance(self, step: int) -> None:
        most = num_exchanged(self._options.exchange, self._window, step)
        if not self._window.is_due(step) or not most:
            return
        names = list(self._layers)
        e = [self._running.whole(f"{n}.e").cpu() for n in names]
        masks = [self._running.buffers[f"{n}.mask"].cpu() for n in names]
        ends, begins = exchange(e, masks, most)
        for index, direction in ends:
            self._end(names[index], direction)
            masks[index][direction] = 0
        for index, direction in begins:
            self._begin(names[index], direction, step)
            masks[index][direction] = 1
        for name, mask in zip(names, masks, strict=True):
            self._running.place(f"{name}.mask", mask)
        self._engine.after_restore()

    def _end(self, name: str, direction: int) -> None:
        base = self._layers[name].base
        self._set(name, direction, torch.zeros(base.in_features), torch.zeros(base.out_features))

    def _begin(self, name: str, direction: int, step: int) -> None:
        row, column = self._layers[name].grown(generator_for(self._seed, f"{name}:grown:{step}"))
        self._set(name, direction, row, column)

    def _set(self, name: str, direction: int, row: Tensor, column: Tensor) -> None:
        """A's row, B's column and e = 0 of a direction, and no moments of theirs."""
        for own, values in (("A", row), ("B", column), ("e", torch.zeros(1))):
            parameter = self._running.trained[f"{name}.{own}"]
            numbers = _numbers(full_shape(parameter), direction, is_column=own == "B")
            local = self._engine.local(parameter).detach().view(-1)
            _fill(local, self._engine.span(parameter), numbers, values)
            if moments := self._running.moments(f"{name}.{own}"):
                piece = self._engine.piece(parameter)
                for kind in MOMENTS:
                    _fill(moments[kind], piece, numbers, torch.zeros_like(values))
                self._running.set_moments(f"{name}.{own}", moments)


def _numbers(shape: tuple[int, ...], direction: int, *, is_column: bool) -> Tensor:
    """Places of a direction's numbers in the flattened tensor."""
    if is_column:
        return torch.arange(shape[0]) * shape[1] + direction
    width = math.prod(shape[1:])
    return torch.arange(direction * width, (direction + 1) * width)


def _fill(flat: Tensor, span: tuple[int, int], numbers: Tensor, values: Tensor) -> None:
    """Set those of `numbers` that lie in `span`, of which `flat` are the contents."""
    here = (numbers >= span[0]) & (numbers < span[1])
    flat[(numbers[here] - span[0]).to(flat.device)] = values[here].to(flat.device)
