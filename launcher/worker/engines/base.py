"""What the worker may ask of a parallel runtime."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load as parse
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine:
    """Who this rank is, and how parameters and gradients are spread over the ranks.

    The base class is the runtime without spreading, on any number of ranks; `single` is exactly
    that. A subclass overrides what differs, so that loop and checkpoints never ask which it is.
    """

    needs_group = False  # a process group even of one rank
    gathers_by_module = False  # a module's parameters are there while that module runs, and no longer

    def __init__(self, device: torch.device, *, timeout_s: float) -> None:
        self.device = device
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._cpu_group: dist.ProcessGroup | None = None
        self._keeps_gradients = False
        self._timeout = datetime.timedelta(seconds=timeout_s)

    def start(self) -> None:
        """Join the process group. A second, CPU group carries decisions without touching the device."""
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if self.world_size == 1:
            if self.needs_group:
                dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
            return
        device_id = self.device if backend == "nccl" else None
        dist.init_process_group(backend, timeout=self._timeout, device_id=device_id)
        self._cpu_group = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo")

    def stop(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    # -- parameters ---------------------------------------------------------------------------

    def shard(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        """Spread a model that is still on meta; `layers` are its repeated blocks."""

    def materialize(self, model: nn.Module) -> None:
        """Give the local part of every parameter and buffer memory, uninitialised; ties stay tied."""
        made: dict[int, nn.Parameter] = {}
        buffers: dict[int, Tensor] = {}
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    made[id(parameter)] = self.allocate(parameter)
                module._parameters[name] = made[id(parameter)]
            for name, buffer in list(module._buffers.items()):
                if buffer is None:
                    continue
                if id(buffer) not in buffers:
                    buffers[id(buffer)] = torch.empty_like(buffer, device=self.device)
                module._buffers[name] = buffers[id(buffer)]

    def allocate(self, parameter: nn.Parameter) -> nn.Parameter:
        """A parameter on meta, with memory for what lives here."""
        empty = torch.empty_like(parameter, device=self.home(parameter))
        return nn.Parameter(empty, requires_grad=parameter.requires_grad)

    def home(self, parameter: Tensor) -> torch.device:
        """Where a parameter lives between uses."""
        return self.device

    def local(self, tensor: Tensor) -> Tensor:
        """The part of a parameter that lives here, as a plain tensor: whole rows, or a flat piece of `span`."""
        return tensor

    def span(self, parameter: Tensor) -> tuple[int, int]:
        """First and one past the last number of the flattened parameter that live here."""
        return 0, parameter.numel()

    def rows(self, *parameters: Tensor) -> tuple[int, int]:
        """The rows of dimension 0, equal in number for all, that cover what lives here of each."""
        covers = [_covering_rows(full_shape(p), self.span(p)) for p in parameters]
        return min(c[0] for c in covers), max(c[1] for c in covers)

    def place(self, parameter: Tensor, values: Tensor, first: int = 0) -> None:
        """Copy what lives here out of `values`, which are rows from `first` on: all of `rows`, or some of them."""
        start, stop = self.span(parameter)
        begin = first * math.prod(full_shape(parameter)[1:])
        low, high = max(start, begin), min(stop, begin + values.numel())
        if low < high:
            local = self.local(parameter).detach().view(-1)
            local[low - start : high - start].copy_(values.reshape(-1)[low - begin : high - begin])

    def whole(self, parameter: Tensor) -> Tensor:
        """All of a parameter, on the device; every rank asks for the same ones in the same order."""
        return parameter.detach().to(self.device)

    def _summed_from_spans(self, parameter: Tensor) -> Tensor:
        """`whole` of a parameter that is cut: every rank puts in what it has, and 0 for the rest."""
        shape = full_shape(parameter)
        flat = torch.zeros(math.prod(shape), dtype=parameter.dtype, device=self.device)
        start, stop = self.span(parameter)
        flat[start:stop] = self.local(parameter).detach().view(-1).to(self.device)
        return self.sum_base(flat).view(shape)

    def owned(self, parameter: Tensor) -> tuple[int, int] | None:
        """The span that this rank writes into a checkpoint; over all ranks each number once."""
        return self.span(parameter) if self.rank == 0 else None

    def sum_base(self, value: Tensor) -> Tensor:
        """Sum a value that each rank computed from its own rows of the base; identity where rows are whole."""
        return value

    # -- training -----------------------------------------------------------------------------

    def prepare_training(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
    ) -> torch.optim.Optimizer:
        """Called once, when the trained parameters are known; returns the optimizer to step."""
        return optimizer

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro batch; `last` of its step."""
        return nullcontext()

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss sum of a micro batch, in training or evaluation."""
        loss: Tensor = model(batch)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Of one micro batch's loss, already divided by the step's tokens over all ranks."""
        loss.backward()

    def reduce_gradients(self) -> None:
        """After the last micro batch: every gradient becomes the sum over ranks."""

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The piece of a reduced gradient that lives here, to read or scale in place; None without any."""
        return None if parameter.grad is None else self.local(parameter.grad)

    def keep_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """From now on each gradient is one tensor that stays where it is; of strategies that `may_record`."""
        self._keeps_gradients = True
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def zero_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        if self._keeps_gradients:
            torch._foreach_zero_([p.grad for p in parameters if p.grad is not None])
            return
        for parameter in parameters:
            parameter.grad = None

    def sum_pieces(self, value: Tensor) -> Tensor:
        """Sum a value that each rank computed from its pieces of gradients; identity where they are whole."""
        return value

    def replicas(self, parameter: nn.Parameter) -> int:
        """How many of the ranks that `sum_pieces` sums over hold the same piece of its gradient."""
        return 1

    # -- optimizer state ----------------------------------------------------------------------

    def piece(self, parameter: nn.Parameter) -> tuple[int, int]:
        """The span of a parameter whose gradient and optimizer state live here."""
        return self.span(parameter)

    def owned_piece(self, parameter: nn.Parameter) -> tuple[int, int] | None:
        """The piece whose optimizer state this rank writes into a checkpoint."""
        return self.owned(parameter)

    def moments(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
        """AdamW's state of `piece`: exp_avg, exp_avg_sq and step; empty before the first step."""
        state = optimizer.state.get(parameter, {})
        if not state:
            return {}
        values = {name: state[name].detach() for name in MOMENTS}
        return {**values, "step": torch.tensor([float(state["step"])])}

    def set_moments(
        self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, moments: Mapping[str, Tensor]
    ) -> None:
        """Set AdamW's state of `piece`."""
        state = optimizer.state[parameter]
        state["step"] = torch.tensor(float(moments["step"]), dtype=torch.float32, device=parameter.device)
        for name in MOMENTS:
            state[name] = moments[name].to(parameter.device, copy=True).view(parameter.shape)

    def after_restore(self) -> None:
        """Called when trained parameters or moments were set: from a checkpoint, or between two steps."""

    # -- agreement ----------------------------------------------------------------------------

    def sum_ranks(self, values: Sequence[float]) -> list[float]:
        """Host numbers summed over ranks (float64, CPU group)."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._cpu_group)
        return tensor.tolist()

    def max_rank(self, value: float) -> float:
        """The largest of one host number a rank."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._cpu_group)
        return float(tensor.item())

    def sum_device(self, value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """Sum a tensor over the ranks of `group`, on the device; default all."""
        if self.world_size > 1:
            value = value.to(self.device)
            dist.all_reduce(value, group=group)
        return value

    def broadcast(self, tensors: Mapping[str, Tensor] | None, source: int) -> dict[str, Tensor]:
        """What rank `source` gives, on every rank's CPU; the others give None."""
        if self.world_size == 1:
            assert tensors is not None
            return {n: t.detach().cpu() for n, t in tensors.items()}
        content = b""
        if tensors is not None:
            content = serialize({n: t.detach().cpu().contiguous() for n, t in tensors.items()})
        size = torch.tensor([len(content)])
        dist.broadcast(size, source, group=self._cpu_group)
        raw = torch.empty(int(size), dtype=torch.uint8)
        if tensors is not None:
            raw = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        dist.broadcast(raw, source, group=self._cpu_group)
        return parse(raw.numpy().tobytes())

    def any_rank(self, flag: bool) -> bool:
        return self.sum_ranks([float(flag)])[0] > 0

    def all_ranks(self, flag: bool) -> bool:
        return not self.any_rank(not flag)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self._cpu_group)


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape over all ranks: DeepSpeed leaves a cut parameter empty and keeps its shape beside it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _covering_rows(shape: tuple[int, ...], span: tuple[int, int]) -> tuple[int, int]:
    width = max(1, math.prod(shape[1:]))
    return span[0] // width, -(-span[1] // width)
