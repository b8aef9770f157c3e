"""FSDP2: parameters, gradients and optimizer state sharded by rows, gathered a block at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from decompft.launcher.worker.engines.base import Engine


class FsdpEngine(Engine):
    """torch's fully_shard over each block and the root, without mixed-precision casts.

    No policy casts anything: packed bytes viewed as bfloat16 must stay the bits they are. Every matrix
    is sharded; vectors (norms, biases, MAP's scalars) stay whole on each rank, because gathering costs
    the host some 0.1 ms a tensor, whatever its size, and a third of a block's tensors are vectors.
    """

    needs_group = True

    def __init__(self, device: torch.device, *, timeout_s: float, cpu_offload: bool) -> None:
        super().__init__(device, timeout_s=timeout_s)
        self._offload = cpu_offload
        self._root: FSDPModule | None = None

    def _mesh(self) -> DeviceMesh:
        return init_device_mesh(self.device.type, (self.world_size,))

    def shard(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        mesh = self._mesh()
        pin = self.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=pin) if self._offload else OffloadPolicy()
        vectors = {p for p in model.parameters() if p.dim() == 1}
        for layer in layers:
            fully_shard(layer, mesh=mesh, offload_policy=offload, ignored_params=vectors)
        # a layer's gathering is asked for while the one before it runs: the host is not far enough ahead
        # of the GPU to do it in time by itself
        for before, after in zip(layers, layers[1:], strict=False):
            assert isinstance(before, FSDPModule) and isinstance(after, FSDPModule)
            before.set_modules_to_forward_prefetch([after])
            after.set_modules_to_backward_prefetch([before])
        fully_shard(model, mesh=mesh, offload_policy=offload, ignored_params=vectors)
        assert isinstance(model, FSDPModule)
        self._root = model
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # gradients are sums over tokens, divided once by the global count in the loss
                module.set_gradient_divide_factor(1.0)
                if self.device.type == "cpu":  # gloo has no pre-multiplied sum
                    module.set_force_sum_reduction_for_comms(True)

    def home(self, parameter: Tensor) -> torch.device:
        return torch.device("cpu") if self._offload and isinstance(parameter, DTensor) else self.device

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def span(self, parameter: Tensor) -> tuple[int, int]:
        if not isinstance(parameter, DTensor):
            return 0, parameter.numel()
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        width = math.prod(parameter.shape[1:])
        # a rank without rows has an empty shard; its offset is then past the end
        first = min(offset[0], parameter.shape[0])
        return first * width, (first + shape[0]) * width

    def whole(self, parameter: Tensor) -> Tensor:
        return (
            self._summed_from_spans(parameter) if isinstance(parameter, DTensor) else super().whole(parameter)
        )

    def owned(self, parameter: Tensor) -> tuple[int, int] | None:
        return self.span(parameter) if isinstance(parameter, DTensor) or self.rank == 0 else None

    def replicas(self, parameter: nn.Parameter) -> int:
        return 1 if isinstance(parameter, DTensor) else self.world_size

    def prepare_training(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
    ) -> torch.optim.Optimizer:
        """Let AdamW step the local rows as plain tensors: DTensor's dispatch costs it 40 ms a step of a 7B."""
        self._vectors = [p for p in parameters if not isinstance(p, DTensor)]
        self._rows: dict[nn.Parameter, nn.Parameter] = {}
        if isinstance(optimizer, torch.optim.AdamW):
            self._rows = {p: nn.Parameter(self.local(p).detach()) for p in parameters}
            for group in optimizer.param_groups:
                # a rank may hold no row of a tensor
                group["params"] = [self._rows[p] for p in group["params"] if self._rows[p].numel()]
        self._is_first = True
        return optimizer

    def reduce_gradients(self) -> None:
        grads = [p.grad for p in self._vectors if p.grad is not None]
        if grads:
            flat = self.sum_device(torch.cat(grads))
            torch._foreach_copy_(grads, flat.split([g.numel() for g in grads]))
        for parameter, rows in self._rows.items():
            if self._is_first:  # FSDP2 moves rows that it has to pad at its first forward pass
                rows.data = self.local(parameter).detach()
            rows.grad = None if parameter.grad is None else self.local(parameter.grad)
        self._is_first = False

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        rows = self._rows.get(parameter)
        return super().gradient(parameter) if rows is None else rows.grad

    def zero_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        super().zero_gradients(parameters)
        for rows in self._rows.values():
            rows.grad = None

    def moments(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
        return super().moments(optimizer, self._rows[parameter])

    def set_moments(
        self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, moments: Mapping[str, Tensor]
    ) -> None:
        if self._rows[parameter].numel():
            super().set_moments(optimizer, self._rows[parameter], moments)

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        return self._accumulate(last)

    @contextmanager
    def _accumulate(self, last: bool) -> Iterator[None]:
        assert self._root is not None
        self._root.set_requires_gradient_sync(last)
        yield

    def sum_base(self, value: Tensor) -> Tensor:
        return self.sum_device(value)

    def sum_pieces(self, value: Tensor) -> Tensor:
        return self.sum_base(value)


class HsdpEngine(FsdpEngine):
    """FSDP2 on a 2-D mesh: sharded among `shard_size` neighbouring ranks, replicated over such groups."""

    def __init__(self, device: torch.device, *, timeout_s: float, shard_size: int) -> None:
        super().__init__(device, timeout_s=timeout_s, cpu_offload=False)
        self._shard_size = shard_size

    def _mesh(self) -> DeviceMesh:
        shape = (self.world_size // self._shard_size, self._shard_size)
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))
        self._shard_group = mesh.get_group("shard")
        return mesh

    def owned(self, parameter: Tensor) -> tuple[int, int] | None:
        if not isinstance(parameter, DTensor):
            return self.span(parameter) if self.rank == 0 else None
        return self.span(parameter) if self.rank < self._shard_size else None

    def replicas(self, parameter: nn.Parameter) -> int:
        return 1 if isinstance(parameter, DTensor) else self._shard_size

    def sum_base(self, value: Tensor) -> Tensor:
        return self.sum_device(value, self._shard_group)
