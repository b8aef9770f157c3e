"""DeepSpeed ZeRO-1 and 2: the model on every rank, optimizer state (and gradients) in flat partitions."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from decompft.launcher.worker.engines.base import MOMENTS, Engine


class ZeroEngine(Engine):
    """What all stages share: DeepSpeed's engine around the model, driven micro batch by micro batch.

    DeepSpeed divides summed gradients by the number of ranks. That is undone on the reduced float32
    gradients: a factor on the loss would pass through bfloat16, which keeps powers of two alone exact.
    """

    needs_group = True

    def __init__(self, device: torch.device, *, timeout_s: float, config: Mapping[str, Any]) -> None:
        super().__init__(device, timeout_s=timeout_s)
        self._config = dict(config)
        self._engine: Any = None  # DeepSpeedEngine, once training is prepared
        self._pieces: dict[nn.Parameter, Tensor] = {}  # of gradients, once they are reduced

    def start(self) -> None:
        if self.device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("LOCAL_RANK", str(self.local_rank))
        os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
        super().start()
        import deepspeed  # 2 s

        # an extension for shared memory that would be compiled for a minute; gloo does the same
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # it calls collectives by names that torch 2.13 is about to drop, thousands of times
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)

    def prepare_training(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
    ) -> torch.optim.Optimizer:
        import deepspeed

        self._engine, wrapped, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self._config, dist_init_required=False
        )
        self._zero: Any = wrapped
        zero_optimizer: torch.optim.Optimizer = wrapped
        return zero_optimizer

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = model(batch) if self._engine is None else self._engine(batch)
        return loss

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        return self._accumulate(last)

    @contextmanager
    def _accumulate(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        yield

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def reduce_gradients(self) -> None:
        self._pieces = self._find_pieces()
        if self.world_size > 1:
            torch._foreach_mul_(list(self._pieces.values()), float(self.world_size))

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        piece = self._pieces.get(parameter)
        return parameter.new_empty(0) if piece is None else piece

    def zero_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        self._pieces = {}
        self._zero.zero_grad(set_to_none=True)

    def sum_pieces(self, value: Tensor) -> Tensor:
        return self.sum_device(value)

    def owned_piece(self, parameter: nn.Parameter) -> tuple[int, int] | None:
        return self.piece(parameter)

    def moments(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
        master, start, numel = self._home(parameter)
        state = self._zero.optimizer.state.get(master, {})
        if not state:
            return {}
        values = {name: state[name].narrow(0, start, numel) for name in MOMENTS}
        return {**values, "step": torch.tensor([float(state["step"])])}

    def set_moments(
        self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, moments: Mapping[str, Tensor]
    ) -> None:
        master, start, numel = self._home(parameter)
        state = self._zero.optimizer.state[master]
        for name in MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(master)
            state[name].narrow(0, start, numel).copy_(moments[name].view(-1))
        state["step"] = torch.tensor(float(moments["step"]), dtype=torch.float32, device=master.device)

    def after_restore(self) -> None:
        self._zero.refresh_fp32_params()

    def _find_pieces(self) -> dict[nn.Parameter, Tensor]:
        """Where the reduced gradients are, as views that the optimizer's step reads."""
        raise NotImplementedError

    def _home(self, parameter: nn.Parameter) -> tuple[Tensor, int, int]:
        """The flat float32 tensor that holds a parameter's piece, its first number there, and how many."""
        raise NotImplementedError


class Zero12Engine(ZeroEngine):
    """Parameters are whole on each rank; pieces of gradients and moments are cut from flattened groups."""

    def prepare_training(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
    ) -> torch.optim.Optimizer:
        wrapped = super().prepare_training(model, optimizer, parameters)
        self._groups = {p: k for k, members in enumerate(self._zero.bit16_groups) for p in members}
        return wrapped

    def piece(self, parameter: nn.Parameter) -> tuple[int, int]:
        link = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
        if link is None:
            return 0, 0
        at = link.lp_fragment_address
        return at.start, at.start + at.numel

    def _find_pieces(self) -> dict[nn.Parameter, Tensor]:
        pieces: dict[nn.Parameter, Tensor] = {}
        for index, group in enumerate(self._zero.bit16_groups):
            # in the partition's order, with tensors of zeros where groups are padded
            starts, at = {}, 0
            for tensor in self._zero.averaged_gradients[index]:
                starts[at] = tensor
                at += tensor.numel()
            for parameter in group:
                link = parameter._hp_mapping
                if link is not None:
                    found = starts[link.hp_fragment_address.start]
                    assert found.numel() == link.hp_fragment_address.numel
                    pieces[parameter] = found
        return pieces

    def _home(self, parameter: nn.Parameter) -> tuple[Tensor, int, int]:
        master: Tensor = self._zero.single_partition_of_fp32_groups[self._groups[parameter]]
        link = parameter._hp_mapping  # type: ignore[attr-defined]
        if link is None:  # no number of it is in this rank's partition
            return master, 0, 0
        return master, link.hp_fragment_address.start, link.hp_fragment_address.numel
