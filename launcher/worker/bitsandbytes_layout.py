"""How is a quantized weight written so that bitsandbytes, and through it transformers, reads it?

4 bits: codes (out * in / 2, 1) bytes, absmax a block in float32, the 16 levels, and a JSON of the rest.
8 bits: codes (out, in) int8, `SCB` (out,) float32, and a byte that says the rows are in order. Scales are
not quantized a second time: ours are a row's own, bitsandbytes' cross rows, so that one of the two
roundings would be on top of the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.frozen.fourbit import FourBitLinear
from decompft.adapters.frozen.int8 import Int8Linear
from decompft.adapters.frozen.rows import as_float32
from decompft.launcher.quantized_checkpoint import STATE
from decompft.launcher.recipe import QuantizationSection
from decompft.launcher.worker.tensorfile import DTYPE_NAMES, Entry

_LLM_INT8_THRESHOLD = 6.0  # transformers' own default


def writable(layer: FrozenLinear) -> FrozenLinear:
    """A layer on meta that packs rows as bitsandbytes' files hold them: like `layer`, scales in float32."""
    if isinstance(layer, FourBitLinear):
        with torch.device("meta"):
            return type(layer)(
                layer.in_features,
                layer.out_features,
                block_size=layer.block_size,
                double_quant=False,
                bias_dtype=None,
            )
    return layer


def is_written(layer: FrozenLinear) -> bool:
    """Whether bitsandbytes has the layer's format."""
    return isinstance(layer, FourBitLinear | Int8Linear)


def packed_entries(
    name: str, layer: FrozenLinear, dtype: torch.dtype, pack: Callable[[], tuple[Tensor, ...]]
) -> Iterator[Entry]:
    """The tensors of one weight; codes and scales lie next to each other in a file.

    Args:
        name: of the weight, ending in ".weight".
        layer: as `writable` gives it.
        dtype: what bitsandbytes dequantizes to.
        pack: gives the layer's storage tensors of all rows; called for codes and for scales.
    """
    height, width = layer.out_features, layer.in_features
    if isinstance(layer, FourBitLinear):
        state = {
            "quant_type": layer.code,
            "blocksize": layer.block_size,
            "dtype": DTYPE_NAMES[dtype],
            "shape": [height, width],
        }
        text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        kind, blocks = layer.code, height * layer.num_blocks
        yield Entry(
            key=name, shape=(height * width // 2, 1), dtype=torch.uint8, multiple=4,
            read=lambda: pack()[0].view(torch.uint8).reshape(-1, 1),
        )  # fmt: skip
        yield _float32(f"{name}.absmax", blocks, lambda: as_float32(pack()[1]))
        yield _float32(f"{name}.quant_map", 16, lambda: _levels(kind))
        yield Entry(key=f"{name}{STATE}{kind}", shape=tuple(text.shape), dtype=torch.uint8, read=lambda: text)
        return
    module = name.removesuffix(".weight")
    yield Entry(
        key=name, shape=(height, width), dtype=torch.int8, multiple=1 if height * width % 4 else 4,
        read=lambda: pack()[0].view(torch.int8)[:, :width],
    )  # fmt: skip
    yield _float32(f"{module}.SCB", height, lambda: as_float32(pack()[1]))
    yield Entry(
        key=f"{module}.weight_format",
        shape=(),
        dtype=torch.uint8,
        read=lambda: torch.zeros((), dtype=torch.uint8),
    )


def quantization_config(quantization: QuantizationSection, skipped: list[str]) -> dict[str, Any]:
    """`quantization_config` of a config.json.

    Args:
        skipped: linear layers that stay in plain floats.
    """
    is_8bit = quantization.format == "int8"
    found: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": is_8bit,
        "load_in_4bit": not is_8bit,
        "llm_int8_skip_modules": skipped,
    }
    if is_8bit:
        return found | {"llm_int8_threshold": quantization.outlier_threshold or _LLM_INT8_THRESHOLD}
    return found | {
        "bnb_4bit_quant_type": quantization.format,
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": quantization.activations,
        "bnb_4bit_quant_storage": "uint8",
    }


def _float32(key: str, length: int, read: Callable[[], Tensor]) -> Entry:
    return Entry(key=key, shape=(length,), dtype=torch.float32, read=lambda: read().reshape(-1))


def _levels(kind: str) -> Tensor:
    from bitsandbytes.functional import get_4bit_type  # 3 s, so only where it is used

    levels: Tensor = get_4bit_type(kind, device="cpu")
    return levels
