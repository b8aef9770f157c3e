"""What the modes of recomputation keep of a layer, in bytes for each token (docs/speed.md has them for Llama-2-7B).

Symbols: h hidden size, q and kv widths of queries and keys, i the MLP's width, e bytes of a compute number.
"""

from __future__ import annotations

from decompft.launcher.models import ModelShape

# inputs of layers that are on a GPU at once under `offloaded`: one at work, one on its way, the last layer's
ON_THE_WAY = 3


def norm_numbers(shape: ModelShape) -> int:
    """What a layer's norms read, for each token; they give as much."""
    qk = (shape.num_heads + shape.num_kv_heads) * shape.head_dim if shape.saved.qk_norm else 0
    return shape.saved.norm_inputs * shape.hidden + qk


def kept_by_norms(shape: ModelShape, e: int, *, is_fused: bool) -> int:
    """All but the norms' outputs (and float32 copies inside them); adapters' thin products apart."""
    return kept_by_selective(shape, e) + _mlp(shape, e, is_fused=is_fused)


def made_again_by_norms(shape: ModelShape, e: int, *, is_fused: bool) -> int:
    """What exists of one layer at once that `norms` has made again: a norm's output."""
    copy = 0 if is_fused or not shape.saved.has_liger else 4 * shape.hidden  # in float32
    return shape.hidden * e + copy


def kept_without_activation(shape: ModelShape, e: int, *, is_fused: bool) -> int:
    """What a layer keeps under `selective` that does not run its MLP again: no input of the MLP's last linear.

    But where it would be made of what else nobody keeps.
    """
    is_kept = is_fused and shape.saved.mlp_copies
    return kept_by_norms(shape, e, is_fused=is_fused) - shape.intermediate * e * (not is_kept)


def kept_by_selective(shape: ModelShape, e: int) -> int:
    """The inputs of norms, and what attention made; adapters' thin products apart.

    The norms' outputs are made again from their inputs, and all of the MLP but its last product.
    """
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return (norm_numbers(shape) + q + 2 * kv + q) * e + 4 * shape.num_heads


def made_again_by_selective(shape: ModelShape, e: int, *, is_fused: bool) -> int:
    """What exists of one layer at once that `selective` has made again: its norm's output, and the MLP's tensors."""
    return made_again_by_norms(shape, e, is_fused=is_fused) + _mlp(shape, e, is_fused=is_fused)


def host_bytes(input_bytes: int, num_layers: int) -> int:
    """Pinned memory for the layers' inputs: torch rounds each up to a power of two."""
    return num_layers * (1 << max(0, input_bytes - 1).bit_length())


def _mlp(shape: ModelShape, e: int, *, is_fused: bool) -> int:
    """Tensors of the MLP's width, the last linear's input among them."""
    return (shape.saved.mlp_fused if is_fused else shape.saved.mlp_eager) * shape.intermediate * e
