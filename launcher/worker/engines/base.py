"""What the worker may ask of a parallel runtime."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Engine:
    """Who this rank is, and how parameters and gradients are spread over the ranks.

    The base class is the runtime without spreading, on any number of ranks; `single` is exactly
    that. A subclass overrides what differs, so that loop and checkpoints never ask which it is.
    """

    def __init__(self, device: torch.device, *, timeout_s: float) -> None:
        self.device = device
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._cpu_group: dist.ProcessGroup | None = None
        self._timeout = datetime.timedelta(seconds=timeout_s)

    def start(self) -> None:
        """Join the process group. A second, CPU group carries decisions without touching the device."""
        if self.world_size == 1:
            return
        backend = "nccl" if self.device.type == "cuda" else "gloo"
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
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    empty = torch.empty_like(parameter, device=self.storage_device)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device=self.device)

    @property
    def storage_device(self) -> torch.device:
        """Where parameters live between uses."""
        return self.device

    def local(self, tensor: Tensor) -> Tensor:
        """The rows of a parameter, gradient or optimizer moment that live here, as a plain tensor."""
        return tensor

    def rows(self, parameter: Tensor) -> tuple[int, int]:
        """First and one past the last row of dimension 0 that live here."""
        return 0, parameter.shape[0]

    def like(self, local: Tensor, parameter: Tensor) -> Tensor:
        """A local tensor of this rank's rows, as the kind of tensor that `parameter` is."""
        return local

    def owned_rows(self, parameter: Tensor) -> tuple[int, int] | None:
        """The rows that this rank writes into a checkpoint; over all ranks each row once."""
        return self.rows(parameter) if self.rank == 0 else None

    # -- gradients ----------------------------------------------------------------------------

    def prepare_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Called once, when the trained parameters are known."""

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro batch; `last` of its step."""
        return nullcontext()

    def reduce_gradients(self) -> None:
        """After the last micro batch: every gradient becomes the sum over ranks."""

    def zero_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.grad = None

    def sum_shards(self, value: Tensor) -> Tensor:
        """Sum a value that each rank computed from its own rows; identity where rows are whole."""
        return value

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

    def any_rank(self, flag: bool) -> bool:
        return self.sum_ranks([float(flag)])[0] > 0

    def all_ranks(self, flag: bool) -> bool:
        return not self.any_rank(not flag)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self._cpu_group)
