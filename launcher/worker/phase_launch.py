"""How does LoRA-Dash (LoRA-Init, LoRA-TSD) begin its second phase in a running, sharded model?

One matrix at a time on a rank, as many at once as there are ranks: each reads its whole weight, decomposes
it, scores its directions and gives the chosen ones to all. The whole A and B of a layer are gathered for that.
A resumed run that is in the second phase already takes all from its checkpoint. No second phase begins after the
run's last step: nothing would train in it. A run that goes on from there begins it before its first step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.launched import LaunchedAdapter
from decompft.launcher.errors import AdapterError, RunFailed
from decompft.launcher.worker.base_weights import BaseWeights
from decompft.launcher.worker.running import Running


class Launch:
    """The adapters that wait for their second phase."""

    def __init__(
        self,
        layers: Mapping[str, LaunchedAdapter],
        running: Running,
        weights: BaseWeights,
        *,
        total_steps: int,
        say: Callable[[str], None],
    ) -> None:
        self._layers, self._waiting = dict(layers), dict(layers)
        self._running, self._engine, self._weights, self._say = running, running.engine, weights, say
        self._total_steps = total_steps
        name, first = next(iter(layers.items()))
        packed = [a for a in layers.values() if self._weights.is_packed(a.base)]
        if any(a.rewrites_base for a in packed):
            raise AdapterError(
                f"{name}: {first.config.method} stores another base than the checkpoint's, and this checkpoint "
                "is quantized already",
                "set adapter.options.base: exact, or name an unquantized checkpoint",
            )
        if packed:
            say(
                f"{first.config.method}: the checkpoint is quantized: directions are those of the dequantized weight"
            )
        if (last := max(a.start_step for a in layers.values())) >= total_steps:
            say(
                f"{first.config.method}: the run's {total_steps} steps end before its second phase "
                f"(adapter.options.start_step: {last}): this is LoRA"
            )

    def observe(self, step: int) -> None:
        """Nothing: scores are made of A and B, not of gradients."""

    def averages(self) -> Mapping[str, Mapping[str, Tensor]]:
        return {}

    def resume(self, step: int) -> None:
        self._waiting = {
            n: a for n, a in self._layers.items() if not bool(self._running.buffers[f"{n}.phase"])
        }
        # the run that wrote the checkpoint ended here, and did not begin what this one has steps for
        self._begin(step)

    def advance(self, step: int) -> None:
        self._begin(step + 1)

    @torch.no_grad()
    def _begin(self, num_taken: int) -> None:
        """The second phase of all adapters that are due after so many optimizer steps.

        Raises:
            RunFailed: on all ranks, if a layer's update is still 0 and points at no direction.
        """
        due = [(n, a) for n, a in self._waiting.items() if a.start_step <= num_taken]
        if not due or num_taken >= self._total_steps:
            return
        rewriting: dict[int, tuple[LaunchedAdapter, dict[str, Tensor]]] = {}
        for first in range(0, len(due), self._engine.world_size):
            group = due[first : first + self._engine.world_size]
            mine = self._directions(group)
            for owner, (name, adapter) in enumerate(group):
                found = self._engine.broadcast(mine if owner == self._engine.rank else None, owner)
                if not found["scores"].any():
                    raise _unmoved(name, adapter)
                values = adapter.launched(found)
                for own, value in values.items():
                    self._running.place(f"{name}.{own}", value)
                for own in adapter.restarts():
                    self._running.forget(f"{name}.{own}")
                if adapter.rewrites_base:
                    rewriting[id(adapter.base)] = adapter, values
                del self._waiting[name]
            done = first + len(group)
            if 10 * done // len(due) > 10 * first // len(due):
                self._say(f"after step {num_taken}: directions of {done} of {len(due)} matrices")

        def base_rows(layer: FrozenLinear, rows: Tensor, first: int) -> Tensor:
            adapter, values = rewriting[id(layer)]
            return adapter.base_rows(rows, first, values)

        if rewriting:
            self._weights.rewrite([a.base for a, _ in rewriting.values()], self._engine, base_rows)
        self._engine.after_restore()

    def _directions(self, group: list[tuple[str, LaunchedAdapter]]) -> dict[str, Tensor] | None:
        """Those of this rank's matrix of a group; None if it has none."""
        found = None
        for owner, (name, adapter) in enumerate(group):
            # all ranks gather, one after the other; one keeps
            A, B = (self._running.whole(f"{name}.{t}") for t in ("A", "B"))
            if owner == self._engine.rank:
                weight = self._weights.whole(adapter.base, self._engine.device)
                found = weight, A, B, adapter
        if found is None:
            return None
        weight, A, B, adapter = found
        return adapter.directions(weight, A, B, self._weights.cached(weight))


def _unmoved(name: str, adapter: LaunchedAdapter) -> RunFailed:
    return RunFailed(
        f"{name}: B has not moved yet after the {adapter.start_step} steps of adapter.options.start_step: all "
        f"directions of {adapter.config.method} score 0, and any choice of them would be arbitrary",
        "raise adapter.options.start_step or lower train.warmup_steps",
    )
