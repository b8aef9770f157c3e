"""How do forward and backward of a micro batch run: launched kernel by kernel, or recorded once and replayed?

A model of 7B launches thousands of small kernels a pass, and the host may need longer for that than the GPU for the
work. A recording (a CUDA graph) is one launch. It holds whatever the pass did, at the addresses and with the Python
numbers of that moment, so that:
- a batch is copied into tensors that stay; the loss is read from one. One recording a shape, `MAX_SHAPES` at most.
- gradients are added to tensors that stay (`Engine.keep_gradients`); or, where a step has one micro batch and no engine
  has a place for them, each recording has its own, which a replay writes over: nothing is cleared, nothing is added.
- the loss looks at every place and counts 0 where nothing is trained; its divisor is a tensor. So do passes that are
  not recorded, that a step's result does not depend on which shapes were seen first.
- what the attributes of all modules hold is looked at before every step; where a number or a tensor's place has
  changed, all is forgotten and recorded again. Values of tensors may change freely.
- tensors that a pass leaves on modules (MAP's norm of the update) are put back after each replay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from decompft.launcher.errors import UserError
from decompft.launcher.plan import Plan
from decompft.launcher.worker.data.batches import Batch
from decompft.launcher.worker.engines.base import Engine
from decompft.launcher.worker.graph_recorder import CudaRecorder, Recorder, Work
from decompft.launcher.worker.model import LossModel
from decompft.launcher.worker.module_state import ModuleState, tensors_on
from decompft.launcher.worker.pulse import Pulse
from decompft.launcher.worker.static_masks import static_masks

MAX_SHAPES = 4
# times that all is recorded again, before a run that changes with every step goes on plainly
MAX_FORGOTTEN = 8
# how many targets there are is no shape; nor is where documents end, so that packed rows attend under a mask made of
# their positions
_NOT_READ: dict[str, Any] = {"target_index": None, "num_tokens": 0, "num_targets": 0, "documents": None}
_NOT_LANGUAGE: dict[str, Any] = {"attention_mask": None, "token_type_ids": None, "labels": None}

Key = tuple[object, ...]


class Passes(Protocol):
    """What the training loop asks."""

    pad_multiple: int  # rows are padded to a multiple of it

    def begin_step(self) -> None:
        """Called when the adapters were told of the step, before its first pass."""

    def run(self, batch: Batch, num_targets: int) -> Tensor:
        """Add a micro batch's gradients; returns its loss sum over `num_targets`, to be used before the next."""
        ...


def make_passes(
    plan: Plan,
    model: LossModel,
    engine: Engine,
    parameters: Sequence[nn.Parameter],
    *,
    pulse: Pulse,
    say: Callable[[str], None],
) -> Passes:
    """As the plan has it.

    Args:
        parameters: all that trains.
        say: takes a line for the user.
    """
    if not plan.cuda_graph:
        return PlainPasses(model, engine, pulse)
    recipe = plan.recipe
    return RecordedPasses(
        model, engine, parameters, CudaRecorder(engine.device), pulse=pulse, say=say,
        adds=adds_gradients(plan),
        is_demanded=recipe.train.cuda_graph is True,
        # one shape for rows of any length
        pad_multiple=recipe.data.sequence_length if recipe.data.packing else PlainPasses.pad_multiple,
    )  # fmt: skip


def adds_gradients(plan: Plan) -> bool:
    """Whether a pass finds gradients to add to: of other micro batches, or an engine's buffer."""
    return plan.strategy != "single" or plan.batch.accumulation > 1


class PlainPasses:
    """Kernel by kernel."""

    pad_multiple = 8

    def __init__(self, model: LossModel, engine: Engine, pulse: Pulse) -> None:
        self._model, self._engine, self._pulse = model, engine, pulse

    def begin_step(self) -> None:
        """Nothing is kept from step to step."""

    def run(self, batch: Batch, num_targets: int) -> Tensor:
        self._pulse.at("forward")
        loss = self._engine.forward(self._model, batch.to(self._engine.device)) / num_targets
        self._pulse.at("backward")
        self._engine.backward(loss)
        return loss.detach()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Recording:
    inputs: Mapping[str, Tensor]  # the batch's tensors
    divisor: Tensor  # ()
    loss: Tensor  # ()
    replay: Callable[[], None]
    left: tuple[tuple[nn.Module, str, Tensor], ...]  # what the pass put on modules
    made: tuple[tuple[nn.Parameter, Tensor | None], ...]  # gradients that it writes; none where it adds

    def run(self, tensors: Mapping[str, Tensor], num_targets: int) -> Tensor:
        for name, place in self.inputs.items():
            place.copy_(tensors[name], non_blocking=True)
        self.divisor.fill_(num_targets)
        self.replay()
        for module, name, tensor in self.left:
            setattr(module, name, tensor)
        for parameter, gradient in self.made:
            parameter.grad = gradient
        return self.loss


class RecordedPasses:
    """Recorded where it can be, and plainly where it cannot.

    Args:
        is_demanded: a pass that cannot be recorded is a UserError of `run`, instead of running plainly.
        adds: a micro batch's gradients are added to those that are there; False: there are none.
    """

    def __init__(
        self,
        model: LossModel,
        engine: Engine,
        parameters: Sequence[nn.Parameter],
        recorder: Recorder,
        *,
        pulse: Pulse,
        say: Callable[[str], None],
        is_demanded: bool,
        pad_multiple: int,
        adds: bool = True,
    ) -> None:
        self._model, self._engine = model, engine
        self._recorder, self._pulse, self._say = recorder, pulse, say
        self._is_demanded, self.pad_multiple = is_demanded, pad_multiple
        self._written = [] if adds else list(parameters)  # parameters whose gradients a pass makes anew
        if adds:
            engine.keep_gradients(parameters)
        self._grads = [p.grad for p in parameters if adds and p.grad is not None]
        self._recordings: dict[Key, _Recording] = {}
        self._left: set[tuple[nn.Module, str]] = set()  # attributes that passes write
        self._state: ModuleState | None = None  # as the newest recording found it
        self._num_forgotten = 0
        self._is_off = self._is_full = False

    def begin_step(self) -> None:
        if self._recordings and self._state is not None and self._state.has_changed():
            self._forget()

    def run(self, batch: Batch, num_targets: int) -> Tensor:
        batch = replace(batch, **_NOT_READ, **(_NOT_LANGUAGE if self._model.task == "causal-lm" else {}))
        tensors, key = _tensors_and_key(batch)
        self._pulse.at("forward")
        recording = self._recordings.get(key)
        if recording is None and not self._is_off:
            recording = self._record(key, batch, num_targets)
        if recording is not None:
            return recording.run(tensors, num_targets)
        divisor = torch.full((), float(num_targets), device=self._engine.device)
        return self._recorder.plain(self._work(batch.to(self._engine.device), divisor))

    def _work(self, batch: Batch, divisor: Tensor) -> Work:
        def work() -> Tensor:
            self._clear()
            # positions are given exactly where rows are packed
            with static_masks(is_packed=batch.position_ids is not None):
                loss = self._engine.forward(self._model, batch) / divisor
                self._engine.backward(loss)
            # autograd's graph ends here: kept alive, its nodes would bring this pass's stream into the next
            return loss.detach()

        return work

    def _record(self, key: Key, batch: Batch, num_targets: int) -> _Recording | None:
        if len(self._recordings) == MAX_SHAPES:
            if not self._is_full:
                self._is_full = True
                self._say(
                    f"train.cuda_graph: {MAX_SHAPES} shapes of micro batches are recorded; others run plainly"
                )
            return None
        began, device = time.perf_counter(), self._engine.device
        # in memory of its own also where the batch is on the device already
        inputs: dict[str, Any] = {n: t.to(device, copy=True) for n, t in _tensors_and_key(batch)[0].items()}
        divisor = torch.full((), float(num_targets), device=device)
        before, kept = tensors_on(self._model), [g.clone() for g in self._grads]
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                replay, loss = self._recorder.record(self._work(replace(batch, **inputs), divisor))
        except RuntimeError as error:
            self._give_up(str(error), error)
            return None
        finally:  # passes that were run in order to record are none of the step's
            if self._grads:
                torch._foreach_copy_(self._grads, kept)
            gradients = tuple((p, p.grad) for p in self._written)
            self._clear()
        after = tensors_on(self._model)
        left = tuple((*place, tensor) for place, tensor in after.items() if before.get(place) is not tensor)
        self._left |= {(module, name) for module, name, _ in left}
        made = _Recording(inputs=inputs, divisor=divisor, loss=loss, replay=replay, left=left, made=gradients)
        self._recordings[key] = made
        self._state = ModuleState(self._model, but=self._left)
        self._say(
            f"recorded a micro batch of {' x '.join(map(str, batch.input_ids.shape))} as a CUDA graph "
            f"in {time.perf_counter() - began:.1f} s"
        )
        return made

    def _clear(self) -> None:
        for parameter in self._written:
            parameter.grad = None

    def _forget(self) -> None:
        self._recorder.forget()  # which waits for the last replay
        self._recordings.clear()
        self._is_full = False
        self._num_forgotten += 1
        if self._num_forgotten > MAX_FORGOTTEN:
            self._give_up("what adapters compute has changed between steps too often", None)

    def _give_up(self, why: str, error: RuntimeError | None) -> None:
        self._recorder.forget()  # which waits for the last replay
        self._recordings.clear()
        self._is_off = True
        why = why.strip().partition("\n")[0]
        if self._is_demanded:
            raise UserError(
                f"train.cuda_graph: true, but a pass cannot be recorded: {why}",
                "set train.cuda_graph: auto, which runs such passes plainly, or false",
            ) from error
        self._say(f"train.cuda_graph: passes run plainly from here on, as one cannot be recorded: {why}")


def _tensors_and_key(batch: Batch) -> tuple[dict[str, Tensor], Key]:
    """What a pass reads of a batch, and what must be as it was for a recording of another batch to do."""
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return tensors, tuple((values | shapes).items())
