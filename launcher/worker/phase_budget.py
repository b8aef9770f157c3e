"""How does AdaLoRA score its directions from sharded gradients, and set the unimportant ones to 0?

Importance of a number p is the mean of |p grad p| times the mean of its deviation from that mean (exponential means;
Zhang et al., 2023, eq. 8-10); of a direction, e's plus the mean of A's row plus that of B's column. p and grad p
are those before the optimizer step, as in the paper's Algorithm 1 (peft takes p after it). The means live where
gradients live, on each rank for its own numbers; only sums over rows and columns are exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from decompft.adapters.adalora import AdaLoraLinear
from decompft.adapters.allocation import budget, keep_largest
from decompft.adapters.window import window
from decompft.launcher.errors import AdapterError
from decompft.launcher.worker.engines.base import MOMENTS, full_shape
from decompft.launcher.worker.running import Running

TENSORS = ("A", "B", "e")


class Budget:
    """The adapters that share one number of directions."""

    def __init__(
        self,
        layers: Mapping[str, AdaLoraLinear],
        running: Running,
        *,
        total_steps: int,
    ) -> None:
        self._layers, self._running, self._engine = dict(layers), running, running.engine
        self._parameters = {f"{n}.{t}": running.trained[f"{n}.{t}"] for n in layers for t in TENSORS}
        self._options = next(iter(layers.values())).config.options
        options = self._options
        try:
            self._window = window(options.init_warmup, options.final_warmup, options.interval, total_steps)
        except ValueError as error:
            raise AdapterError(f"adapter.options: {error}", "lower them, or raise train.max_steps") from error
        self._start = sum(a.config.rank for a in layers.values())
        self._target = sum(a.target_rank for a in layers.values())
        self._importance = {n: self._zeros(p) for n, p in self._parameters.items()}
        self._uncertainty = {n: self._zeros(p) for n, p in self._parameters.items()}
        self._is_over = False

    def averages(self) -> Mapping[str, Mapping[str, Tensor]]:
        return {} if self._is_over else {"importance": self._importance, "uncertainty": self._uncertainty}

    def resume(self, step: int) -> None:
        self._is_over = any(bool(self._running.buffers[f"{n}.phase"]) for n in self._layers)

    @torch.no_grad()
    def observe(self, step: int) -> None:
        if self._is_over or step >= self._window.last:
            return
        now, means, deviations = [], [], []
        for name, parameter in self._parameters.items():
            mean = self._importance[name]
            grad = self._engine.gradient(parameter)
            if grad is None or not mean.numel():
                continue
            now.append((self._piece(parameter) * grad.reshape(-1).to(mean.device)).abs_())
            means.append(mean)
            deviations.append(self._uncertainty[name])
        if not now:  # a rank of ZeRO may hold none
            return
        options = self._options
        torch._foreach_lerp_(means, now, 1 - options.beta1)
        torch._foreach_sub_(now, means)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(deviations, now, 1 - options.beta2)

    @torch.no_grad()
    def advance(self, step: int) -> None:
        if self._is_over or step > self._window.last or not self._window.is_due(step):
            return
        num_kept = budget(self._start, self._target, self._window, step)
        scores = self._scores()
        # sums may differ in their last bits from rank to rank (hsdp): one rank's word counts
        decided = {"kept": keep_largest(scores, num_kept)} if self._engine.rank == 0 else None
        kept = self._engine.broadcast(decided, 0)["kept"]
        ranks = [a.config.rank for a in self._layers.values()]
        self._is_over = step == self._window.last
        for name, mask in zip(self._layers, kept.split(ranks), strict=True):
            self._running.place(f"{name}.e", self._running.whole(f"{name}.e").cpu() * mask)
            if self._is_over:
                self._fix(name, mask)
        self._engine.after_restore()
        if self._is_over:
            self._importance, self._uncertainty = {}, {}

    def _fix(self, name: str, mask: Tensor) -> None:
        """The last allocation: what is 0 has no slope any more, and no momentum either."""
        self._running.place(f"{name}.mask", mask)
        self._running.place(f"{name}.phase", torch.ones(1))
        if moments := self._running.moments(f"{name}.e"):
            start, stop = self._engine.piece(self._parameters[f"{name}.e"])
            for kind in MOMENTS:
                moments[kind] *= mask[start:stop].to(moments[kind].device)
            self._running.set_moments(f"{name}.e", moments)

    def _scores(self) -> Tensor:
        """Importance of every direction of every layer in turn (sum of ranks,), on the CPU."""
        parts = []
        for name in self._layers:
            total = self._means(f"{name}.e", along=None)
            total = total + self._means(f"{name}.A", along=1)
            parts.append(total + self._means(f"{name}.B", along=0))
        return self._engine.sum_pieces(torch.cat(parts)).cpu()

    def _means(self, name: str, *, along: int | None) -> Tensor:
        """This rank's part of the mean importance of a tensor's numbers along a dimension, (r,)."""
        parameter = self._parameters[name]
        shape = full_shape(parameter)
        start, stop = self._engine.piece(parameter)
        values = self._importance[name] * self._uncertainty[name]
        values = values.to(self._engine.device) / self._engine.replicas(parameter)
        if along is None:
            return nn.functional.pad(values, (start, shape[0] - stop))
        # whole rows that cover the piece: sums in a fixed order, unlike scattered additions on a GPU
        width = shape[1]
        first, last = start // width, -(-stop // width)
        rows = nn.functional.pad(values, (start - first * width, last * width - stop)).view(-1, width)
        if along == 0:
            return rows.sum(0) / shape[0]
        return nn.functional.pad(rows.sum(1) / width, (first, shape[0] - last))

    def _piece(self, parameter: nn.Parameter) -> Tensor:
        """The numbers whose gradients live here, flat."""
        begin, _ = self._engine.span(parameter)
        start, stop = self._engine.piece(parameter)
        return self._engine.local(parameter).detach().reshape(-1)[start - begin : stop - begin]

    def _zeros(self, parameter: nn.Parameter) -> Tensor:
        return torch.zeros_like(self._piece(parameter))
