"""The unquantized frozen base: the weight as it is, in one floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from decompft.adapters.frozen.base import FrozenLinear


class DenseLinear(FrozenLinear):
    """Storage: `weight` (out, in) in `dtype`; cast at use when the compute dtype differs."""

    def __init__(
        self, in_features: int, out_features: int, *, dtype: torch.dtype, bias_dtype: torch.dtype | None
    ) -> None:
        super().__init__(in_features, out_features, bias_dtype=bias_dtype)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)

    def storage_names(self) -> tuple[str, ...]:
        return ("weight",)

    def pack(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (rows.to(self.weight.dtype).contiguous(),)

    def adds(self, storage: tuple[Tensor, ...], scale: Tensor | None) -> bool:
        return super().adds(storage, scale) and (scale is None or self.is_off_grid(storage))

    def own_product(
        self,
        x_TI: Tensor,
        storage: tuple[Tensor, ...],
        scale: Tensor | None,
        weight: Tensor | None,
        into_TO: Tensor | None = None,
    ) -> Tensor:
        if scale is None or weight is not None or x_TI.dtype.itemsize > 2 or self.is_off_grid(storage):
            return super().own_product(x_TI, storage, scale, weight, into_TO)
        # scaled before it is rounded, see linear.py
        weight = storage[0].to(x_TI.dtype)
        if x_TI.is_cuda:
            wide_TO = torch.mm(x_TI, weight.T, out_dtype=torch.float32)  # which only CUDA has
        else:
            wide_TO = x_TI.float() @ weight.float().T
        return torch.mul(wide_TO, scale, out=x_TI.new_empty(wide_TO.shape))

    def unpack(self, storage: tuple[Tensor, ...], dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
        weight = storage[0]
        if scale is None:
            return weight.to(dtype)
        wide = torch.promote_types(torch.promote_types(weight.dtype, dtype), scale.dtype)
        if wide == torch.float64:
            return (weight.to(wide) * scale).to(dtype)
        return torch.mul(weight, scale, out=torch.empty(weight.shape, dtype=dtype, device=weight.device))

    def is_off_grid(self, storage: tuple[Tensor, ...]) -> bool:
        return storage[0].dtype.itemsize > 2
