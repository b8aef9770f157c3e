"""What stands in for CUDA graphs on a CPU, and what refuses a host that reads tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from decompft.adapters.base import Adapter
from decompft.launcher.worker import train
from decompft.launcher.worker.graph_recorder import Work
from decompft.launcher.worker.pulse import Pulse
from decompft.launcher.worker.recorded import RecordedPasses, adds_gradients

# by these the host learns a value, or a shape that follows from values
_READS = (
    "_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "nonzero_static", "masked_select", "unique",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "allclose",
)  # fmt: skip


class NoHostReads(TorchDispatchMode):
    """Raises where a pass on a GPU would make the host wait, or would depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        repeats = name == "repeat_interleave" and func._overloadname == "Tensor"
        if name in _READS or masks or repeats:
            raise RuntimeError(f"the host reads a tensor: {func}")
        return func(*args, **(kwargs or {}))


class FakeRecorder:
    """Runs the work again, with the numbers and at the places of the time when it was recorded.

    As a graph does: an adapter's Python numbers and tensors that changed since are not seen, and a parameter, buffer
    or gradient that moved fails the test.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._layers = model, [m for m in model.modules() if isinstance(m, Adapter)]
        self.recorded = self.replayed = self.forgotten = self.plain_runs = 0

    def plain(self, work: Work) -> Tensor:
        self.plain_runs += 1
        return work()

    def record(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        torch.rand(3)  # a recording may draw, or not
        before = self._state()
        work()
        loss = work()
        # what the pass itself put there is its output, not what it was recorded with
        left = {
            key: v for key, v in self._state().items() if isinstance(v, Tensor) and before.get(key) is not v
        }
        baked = {key: value for key, value in self._state().items() if key not in left}
        places, written = self._places(), [(p, p.grad) for p in self._model.parameters()]

        def replay() -> None:
            adds = any(p.grad is not None for p, _ in written)
            assert self._places() == places[: None if adds else len(self._places())], (
                "a tensor that the recording knows has moved"
            )
            self.replayed += 1
            now = self._state()
            self._set(baked)
            loss.copy_(work())
            for parameter, gradient in () if adds else written:
                assert (gradient is None) == (parameter.grad is None)
                if gradient is not None and parameter.grad is not None:
                    gradient.copy_(parameter.grad)
            for key, tensor in left.items():
                tensor.copy_(self._state()[key])
            self._set({key: value for key, value in now.items() if key in baked})

        return replay, loss

    def forget(self) -> None:
        self.forgotten += 1

    def _state(self) -> dict[tuple[int, str], Any]:
        kinds = (bool, int, float, Tensor)
        return {
            (i, name): value
            for i, layer in enumerate(self._layers)
            for name, value in vars(layer).items()
            if isinstance(value, kinds)
        }

    def _set(self, state: dict[tuple[int, str], Any]) -> None:
        for (i, name), value in state.items():
            setattr(self._layers[i], name, value)

    def _places(self) -> list[int]:
        tensors = [*self._model.parameters(), *self._model.buffers()]
        return [t.data_ptr() for t in tensors] + [p.grad.data_ptr() for p in tensors if p.grad is not None]


class Unable(FakeRecorder):
    """Can record nothing: every pass runs plainly, in the form that recorded ones have."""

    def record(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        work()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def recorded_by(
    kind: type[FakeRecorder], made: list[FakeRecorder] | None = None, *, pad_multiple: int = 256
) -> Callable[[], None]:
    """A patch for `run_ranks`: the loop's passes are recorded by such a recorder."""

    def make_passes(
        plan: Any, model: Any, engine: Any, parameters: Any, *, pulse: Pulse, say: Any
    ) -> RecordedPasses:
        recorder = kind(model)
        if made is not None:
            made.append(recorder)
        return RecordedPasses(
            model, engine, parameters, recorder, pulse=pulse, say=say, is_demanded=False,
            pad_multiple=pad_multiple, adds=adds_gradients(plan),
        )  # fmt: skip

    def patch() -> None:
        train.make_passes = make_passes

    return patch
