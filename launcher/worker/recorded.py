"""How do forward and backward of a micro batch run: launched kernel by kernel, or recorded once and replayed?

A model of 7B launches thousands of small kernels a pass, and the host may need longer for that than the GPU for the
work. A recording (a CUDA graph) is one launch. It holds whatever the pass did, at the addresses and with the Python
numbers of that moment, so that:
- a batch is copied into tensors that stay; the loss is read from one. One recording a shape, `MAX_SHAPES` at most.
- gradients are added to tensors that stay (`Engine.keep_gradients`).
- the loss looks at every place and counts 0 where nothing is trained; its divisor is a tensor. So do passes that are
  not recorded, that a step's result does not depend on which shapes were seen first.
- what the attributes of all modules hold is looked at before every step; where a number or a tensor's
  place has changed, all is forgotten and recorded again. Values of tensors may change freely.
- tensors that a pass leaves on modules (MAP's norm of the update) are put back after each replay.
"""

from __future__ import annotations

import gc
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
from decompft.launcher.worker.model import LossModel
from decompft.launcher.worker.pulse import Pulse
from decompft.launcher.worker.static_masks import static_masks

MAX_SHAPES = 4
# times that all is recorded again, before a run that changes with every step goes on plainly
MAX_FORGOTTEN = 8
_WARM_UPS = 3
_NUMBERS = (bool, int, float)
_CONTAINERS = (list, tuple, dict)
# of every module, and nothing of a pass
_HOUSEKEEPING = frozenset(vars(nn.Module())) - {"training"}
# how many targets there are is no shape
_NOT_READ: dict[str, Any] = {"target_index": None, "num_tokens": 0, "num_targets": 0}
_NOT_LANGUAGE: dict[str, Any] = {"attention_mask": None, "token_type_ids": None, "labels": None}

Work = Callable[[], Tensor]  # one forward and backward pass; returns its loss, without autograd's graph
Key = tuple[object, ...]


class Passes(Protocol):
    """What the training loop asks."""

    pad_multiple: int  # rows are padded to a multiple of it

    def begin_step(self) -> None:
        """Called when the adapters were told of the step, before its first pass."""

    def run(self, batch: Batch, num_targets: int) -> Tensor:
        """Add a micro batch's gradients; returns its loss sum over `num_targets`, to be used before the next."""
        ...


class Recorder(Protocol):
    """What a device does with a pass."""

    def plain(self, work: Work) -> Tensor: ...

    def record(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        """A call that does the work again, and the tensor in which its loss then is. May run the work meanwhile.

        Raises:
            RuntimeError: the work cannot be recorded.
        """
        ...

    def forget(self) -> None:
        """No recording that was made is replayed again."""


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
        is_demanded=recipe.train.cuda_graph is True,
        # one shape for rows of any length
        pad_multiple=recipe.data.sequence_length if recipe.data.packing else PlainPasses.pad_multiple,
    )  # fmt: skip


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

    def run(self, tensors: Mapping[str, Tensor], num_targets: int) -> Tensor:
        for name, place in self.inputs.items():
            place.copy_(tensors[name], non_blocking=True)
        self.divisor.fill_(num_targets)
        self.replay()
        for module, name, tensor in self.left:
            setattr(module, name, tensor)
        return self.loss


class RecordedPasses:
    """Recorded where it can be, and plainly where it cannot.

    Args:
        is_demanded: a pass that cannot be recorded ends the run, instead of running plainly.

    Raises (UserError, from `run`): that.
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
    ) -> None:
        self._model, self._engine = model, engine
        self._recorder, self._pulse, self._say = recorder, pulse, say
        self._is_demanded, self.pad_multiple = is_demanded, pad_multiple
        engine.keep_gradients(parameters)
        self._grads = [p.grad for p in parameters if p.grad is not None]
        self._recordings: dict[Key, _Recording] = {}
        self._left: set[tuple[nn.Module, str]] = set()  # attributes that passes write
        self._watched: list[tuple[dict[str, Any], str]] = []  # those that passes may read
        self._state: list[object] = []
        self._num_forgotten = 0
        self._is_off = self._is_full = False

    def begin_step(self) -> None:
        if self._is_off or not self._recordings:
            return
        if self._read_state() != self._state:
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
            with static_masks():
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
        before, kept = self._attributes(), [g.clone() for g in self._grads]
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                replay, loss = self._recorder.record(self._work(replace(batch, **inputs), divisor))
        except RuntimeError as error:
            self._give_up(str(error), error)
            return None
        finally:  # passes that were run in order to record are none of the step's
            torch._foreach_copy_(self._grads, kept)
        after = self._attributes()
        left = tuple((*key, tensor) for key, tensor in after.items() if before.get(key) is not tensor)
        self._left |= {(module, name) for module, name, _ in left}
        made = _Recording(inputs=inputs, divisor=divisor, loss=loss, replay=replay, left=left)
        self._recordings[key] = made
        self._watched = self._readable()
        self._state = self._read_state()
        self._say(
            f"recorded a micro batch of {' x '.join(map(str, batch.input_ids.shape))} as a CUDA graph "
            f"in {time.perf_counter() - began:.1f} s"
        )
        return made

    def _attributes(self) -> dict[tuple[nn.Module, str], Tensor]:
        """Tensors that lie on modules beside their parameters and buffers."""
        return {
            (module, name): value
            for module in self._model.modules()
            for name, value in vars(module).items()
            if isinstance(value, Tensor)
        }

    def _readable(self) -> list[tuple[dict[str, Any], str]]:
        """Where numbers and tensors lie, or may come to lie, that a pass reads; found once, as looking takes time."""
        return [
            (vars(module), name)
            for module in self._model.modules()
            for name, value in vars(module).items()
            if name not in _HOUSEKEEPING and (module, name) not in self._left and _may_matter(value)
        ]

    def _read_state(self) -> list[object]:
        return [_seen(attributes.get(name)) for attributes, name in self._watched]

    def _forget(self) -> None:
        self._recordings.clear()
        self._recorder.forget()
        self._is_full = False
        self._num_forgotten += 1
        if self._num_forgotten > MAX_FORGOTTEN:
            self._give_up("what adapters compute has changed between steps too often", None)

    def _give_up(self, why: str, error: RuntimeError | None) -> None:
        self._recordings.clear()
        self._recorder.forget()
        self._is_off = True
        why = why.strip().partition("\n")[0]
        if self._is_demanded:
            raise UserError(
                f"train.cuda_graph: true, but a pass cannot be recorded: {why}",
                "set train.cuda_graph: auto, which runs such passes plainly, or false",
            ) from error
        self._say(f"train.cuda_graph: passes run plainly from here on, as one cannot be recorded: {why}")


def _may_matter(value: object) -> bool:
    """Numbers, tensors, and what holds tensors or nothing yet; shapes and configurations stay as they are."""
    if isinstance(value, _CONTAINERS):
        inside = value.values() if isinstance(value, dict) else value
        return not value or any(isinstance(v, (Tensor, *_CONTAINERS)) and _may_matter(v) for v in inside)
    return value is None or isinstance(value, (*_NUMBERS, Tensor))


def _seen(value: object) -> object:
    """What a recording has of a value: a number, the place of a tensor, or those of what a container holds."""
    if type(value) in _NUMBERS:
        return value
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, _CONTAINERS):
        return [_seen(v) for v in (value.values() if isinstance(value, dict) else value)]
    return None


def _tensors_and_key(batch: Batch) -> tuple[dict[str, Tensor], Key]:
    """What a pass reads of a batch, and what must be as it was for a recording of another batch to do."""
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return tensors, tuple((values | shapes).items())


class CudaRecorder:
    """CUDA graphs of one memory pool, all on one stream beside the default one, which cannot be captured.

    Plain passes run on that stream, too: a node of autograd remembers the stream that it was made on.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def plain(self, work: Work) -> Tensor:
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            loss = work()
        here.wait_stream(self._stream)
        return loss

    def record(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        gc.collect()  # with cycles go nodes of autograd that know another stream
        for _ in range(_WARM_UPS - 1):
            self.plain(work)
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:  # what waits for the device is found here, in words, before it spoils a capture
            self.plain(work)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # other threads save checkpoints and watch collectives meanwhile: what they call is no fault of the pass
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                loss = work()
        except BaseException:
            torch.cuda.set_stream(here)  # a capture that fails leaves its own as the current one
            self._abandon(graph)
            raise
        return graph.replay, loss

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Undo for the allocator a capture that has failed, so that the run can go on without."""
        graph.reset()
        # for torch 2.11 the capture is still under way: the next shortage of memory would end the process, and the
        # pass's memory never be free (pytorch/pytorch#180395)
        device = self._stream.device_index
        try:
            torch._C._cuda_endAllocateToPool(device, self._pool)
        except RuntimeError:
            return  # it is not
        torch._C._cuda_releasePool(device, self._pool)

    def forget(self) -> None:
        torch.cuda.synchronize()  # the last replay
        self._pool = torch.cuda.graph_pool_handle()
