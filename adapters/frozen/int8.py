"""The int8 base: a byte a weight, a scale a row, and LLM.int8's product as an option.

Dettmers et al., 2022, arXiv:2208.07339, section 3. With `outlier_threshold` t > 0 the product is

    W x = S (Wq Xq) + W[:, o] X[o],    o: inputs with any |x| >= t, here over all tokens of the product

where Xq is x without o, per token in int8, and S the outer product of both scales. Departures:
- only the forward product runs in int8. The backward pass uses the dequantized weight, as if x had
  not been rounded: its error is that of rounding x, at most half a step of a token's int8.
- x is cast to float16 before it is quantized, on every device, and on CUDA the int8 part of the
  result is rounded to float16: bitsandbytes' CUDA operators know no other type. The outliers'
  part is computed in the compute dtype.
Finding o stops the host once a layer to wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decompft.adapters.frozen.eightbit import EightBitLinear
from decompft.adapters.frozen.rows import as_float32, load_operators


class Int8Linear(EightBitLinear):
    """w = code * absmax / 127, codes rounded to nearest: |w - w'| <= absmax / 254."""

    code = torch.int8
    largest = 127.0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias_dtype: torch.dtype | None,
        outlier_threshold: float = 0.0,
    ) -> None:
        """`outlier_threshold` 0: products with the dequantized weight in the compute dtype."""
        super().__init__(in_features, out_features, bias_dtype=bias_dtype)
        self.outlier_threshold = outlier_threshold

    def adds(self, storage: tuple[Tensor, ...], scale: Tensor | None) -> bool:
        return super().adds(storage, scale) and not self.outlier_threshold

    def own_product(
        self,
        x_TI: Tensor,
        storage: tuple[Tensor, ...],
        scale: Tensor | None,
        weight: Tensor | None,
        into_TO: Tensor | None = None,
    ) -> Tensor:
        if not self.outlier_threshold:
            return super().own_product(x_TI, storage, scale, weight, into_TO)
        load_operators()
        codes, absmax = storage
        W_OI = codes.view(torch.int8)[:, : self.in_features].contiguous()
        scale_O = as_float32(absmax).view(-1)
        if scale is not None:
            scale_O = scale_O * scale.view(-1)
        # a copy in any case: on a CPU the operator sets outliers to 0 in its input, and back
        half_TI = x_TI.to(torch.float16, copy=True)
        Xq_TI, scale_T, outliers = torch.ops.bitsandbytes.int8_vectorwise_quant(
            half_TI, self.outlier_threshold
        )
        y_TO: Tensor = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
            x_TI, Xq_TI, W_OI, scale_T, scale_O, outliers
        )[0]
        return y_TO

    def _times(self, codes: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        # one pass on CUDA: reads bytes, multiplies in the factor's dtype, writes `dtype`
        return torch.mul(codes, factor, out=torch.empty(codes.shape, dtype=dtype, device=codes.device))
