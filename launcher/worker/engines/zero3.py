"""DeepSpeed ZeRO-3: every parameter in flat pieces, gathered module by module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from decompft.adapters.base import Adapter
from decompft.launcher.worker.engines.zero import ZeroEngine


class Zero3Engine(ZeroEngine):
    """Parameters are cut one at a time while the model is made, so that no rank ever holds it whole.

    deepspeed.zero.Init as a context would see modules built from real tensors; here they come from
    meta, and each parameter is given empty memory, cut, and freed again before the next one.
    """

    gathers_by_module = True

    def materialize(self, model: nn.Module) -> None:
        import deepspeed

        self._cutter = deepspeed.zero.Init(config_dict_or_path=self._config)
        super().materialize(model)
        # an adapter reads its base's storage without calling the base: both are gathered together
        for module in model.modules():
            if isinstance(module, Adapter):
                for parameter in module.base.parameters():
                    deepspeed.zero.register_external_parameter(module, parameter)

    def allocate(self, parameter: nn.Parameter) -> nn.Parameter:
        made = super().allocate(parameter)
        self._cutter._convert_to_deepspeed_param(made)
        made.partition()  # type: ignore[attr-defined]  # DeepSpeed has just added it
        return made

    def local(self, tensor: Tensor) -> Tensor:
        if not hasattr(tensor, "ds_tensor"):
            return tensor
        start, stop = self.span(tensor)
        piece: Tensor = tensor.ds_tensor.narrow(0, 0, stop - start)
        return piece

    def span(self, parameter: Tensor) -> tuple[int, int]:
        if not hasattr(parameter, "ds_tensor"):
            return 0, parameter.numel()
        numel: int = parameter.ds_numel  # type: ignore[attr-defined]
        size: int = parameter.ds_tensor.ds_numel
        start = min(numel, self.rank * size)
        return start, min(numel, start + size)

    def whole(self, parameter: Tensor) -> Tensor:
        is_cut = hasattr(parameter, "ds_tensor")
        return self._summed_from_spans(parameter) if is_cut else super().whole(parameter)

    def owned(self, parameter: Tensor) -> tuple[int, int] | None:
        return self.span(parameter)

    def sum_base(self, value: Tensor) -> Tensor:
        return self.sum_pieces(value)

    def prepare_training(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
    ) -> torch.optim.Optimizer:
        wrapped = super().prepare_training(model, optimizer, parameters)
        # of each trained parameter: its group, its place there, its first number in the group's flat tensor
        self._places: dict[nn.Parameter, tuple[int, int, int]] = {}
        for group, members in enumerate(self._zero.fp16_groups):
            at = 0
            for k, parameter in enumerate(members):
                self._places[parameter] = group, k, at
                at += parameter.ds_tensor.ds_numel
        return wrapped

    def after_restore(self) -> None:
        super().after_restore()
        # small parameters stay gathered from step to step: what was gathered before is stale
        if kept := self._zero.persistent_parameters:
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    def _find_pieces(self) -> dict[nn.Parameter, Tensor]:
        pieces = {}
        for parameter, (group, k, at) in self._places.items():
            start, stop = self.span(parameter)
            if self._zero.offload_optimizer:
                flat = self._zero.fp32_partitioned_groups_flat[group].grad
                pieces[parameter] = flat.narrow(0, at, stop - start)
            else:
                pieces[parameter] = self._zero.averaged_gradients[group][k].view(-1)[: stop - start]
        return pieces

    def _home(self, parameter: nn.Parameter) -> tuple[Tensor, int, int]:
        group, _, at = self._places[parameter]
        start, stop = self.span(parameter)
        return self._zero.fp32_partitioned_groups_flat[group], at, stop - start
