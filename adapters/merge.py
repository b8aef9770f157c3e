"""A model with adapters into one without: every layer a plain weight, for as long as it is asked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from decompft.adapters.base import Adapter
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.frozen.dense import DenseLinear
from decompft.adapters.spec import spec_of


def make_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Merge every adapter into the weight it was trained on and unpack every quantized layer, in place.

    Outputs stay equal up to rounding; what a token costs falls to one product a layer, and the
    memory rises to that of a dense model in `dtype`. An adapter that is no change of weights
    stays, over an unpacked base.
    """
    with torch.no_grad():
        for name, module in list(model.named_modules()):
            if isinstance(module, Adapter) and spec_of(module.config).mergeable:
                weight = module.merged(module.base.dense(torch.float32))
                model.set_submodule(name, _dense(weight, module.merged_bias(module.base.bias), dtype))
            elif isinstance(module, Adapter):
                module.base = _dense(module.base.dense(dtype), module.base.bias, dtype)
            elif isinstance(module, FrozenLinear) and not name.endswith(".base"):
                model.set_submodule(name, _dense(module.dense(dtype), module.bias, dtype))


def _dense(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> DenseLinear:
    out_features, in_features = weight.shape
    dense = DenseLinear(in_features, out_features, dtype=dtype, bias_dtype=None)
    dense.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    dense.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return dense


def dense_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the weights that `make_dense` would make."""
    layers = (m for m in model.modules() if isinstance(m, FrozenLinear))
    return sum(m.in_features * m.out_features for m in layers) * dtype.itemsize
