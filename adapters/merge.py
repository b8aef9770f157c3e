"""A model with adapters into one without: every layer a plain weight, for as long as it is asked."""

from __future__ import annotations

import torch
from torch import nn

from decompft.adapters.base import Adapter
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.frozen.dense import DenseLinear


def make_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Merge every adapter into the weight it was trained on and unpack every quantized layer, in place.

    Outputs stay equal up to rounding; what a token costs falls to one product a layer, and the
    memory rises to that of a dense model in `dtype`.
    """
    with torch.no_grad():
        for name, module in list(model.named_modules()):
            if isinstance(module, Adapter):
                weight, base = module.merged(module.base.dense(torch.float32)), module.base
            elif isinstance(module, FrozenLinear) and not name.endswith(".base"):
                weight, base = module.dense(dtype), module
            else:
                continue
            dense = DenseLinear(base.in_features, base.out_features, dtype=dtype, bias_dtype=None)
            dense.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            dense.bias = base.bias
            model.set_submodule(name, dense)


def dense_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the weights that `make_dense` would make."""
    layers = (m for m in model.modules() if isinstance(m, FrozenLinear))
    return sum(m.in_features * m.out_features for m in layers) * dtype.itemsize
