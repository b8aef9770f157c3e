"""What the modes of recomputation keep of a layer, in bytes for each token (docs/speed.md has them for Llama-2-7B).

Symbols: h hidden size, q and kv widths of queries and keys, i the MLP's width, e bytes of a compute number.
"""

from __future__ import annotations

from decompft.launcher.models import ModelShape

# inputs of layers that are on a GPU at once under `offloaded`: one at work, one on its way, the last layer's
ON_THE_WAY = 3


def kept_by_selective(shape: ModelShape, e: int) -> int:
    """The inputs of norms, and what attention made; adapters' thin products apart.

    The norms' outputs are made again from their inputs, and all of the MLP but its last product.
    """
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    norms = shape.saved.norm_inputs * shape.hidden + ((q + kv) if shape.saved.qk_norm else 0)
    return (norms + q + 2 * kv + q) * e + 4 * shape.num_heads


def made_again_by_selective(shape: ModelShape, e: int, *, is_fused: bool) -> int:
    """What exists of one layer at once that `selective` has made again: its norm's output, and the MLP's tensors."""
    mlp = shape.saved.mlp_fused if is_fused else shape.saved.mlp_eager
    norm = 0 if is_fused or not shape.saved.has_liger else 4 * shape.hidden  # a float32 copy
    return shape.hidden * e + mlp * shape.intermediate * e + norm


def host_bytes(input_bytes: int, num_layers: int) -> int:
    """Pinned memory for the layers' inputs: torch rounds each up to a power of two."""
    return num_layers * (1 << max(0, input_bytes - 1).bit_length())
