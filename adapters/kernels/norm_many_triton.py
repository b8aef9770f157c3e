"""The Triton side of norm_many.py: imported only on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

from decompft.adapters.kernels.norm_triton import finish_layer, gram_part

# `addresses_ptr` (layers, 5) int64: of A, B, a, b and base_norm, float32
# `sizes_ptr` (layers, 3) int32: in, out, chunks in a stretch


@triton.jit  # type: ignore[untyped-decorator]
def _tensor(addresses_ptr, layer, place: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(addresses_ptr + 5 * layer + place).to(tl.pointer_type(tl.float32))


@triton.jit  # type: ignore[untyped-decorator]
def gram_many(  # type: ignore[no-untyped-def]
    addresses_ptr,
    sizes_ptr,
    parts_ptr,  # (layers, 2, SPLITS, rank, rank)
    rank,
    SPLITS: tl.constexpr,
    R: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """As `gram`, of each layer."""
    program, layer = tl.program_id(0), tl.program_id(1)
    part = parts_ptr + (layer * (2 * SPLITS) + program).to(tl.int64) * (rank * rank)
    num_in, num_out = tl.load(sizes_ptr + 3 * layer), tl.load(sizes_ptr + 3 * layer + 1)
    chunks = tl.load(sizes_ptr + 3 * layer + 2)
    if program < SPLITS:
        gram_part(_tensor(addresses_ptr, layer, 0), part, program, rank, num_in, num_in, 1, R, CHUNK, chunks)
    else:
        of_b = _tensor(addresses_ptr, layer, 1)
        gram_part(of_b, part, program - SPLITS, rank, num_out, 1, rank, R, CHUNK, chunks)


@triton.jit  # type: ignore[untyped-decorator]
def finish_many(  # type: ignore[no-untyped-def]
    addresses_ptr,
    parts_ptr,  # (layers, 2, SPLITS, rank, rank)
    grams_ptr,  # (layers, 2, rank, rank)
    found_ptr,  # (layers, 5, STRIDE)
    rank,
    eps,
    eps_over_s,
    SPLITS: tl.constexpr,
    R: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """As `finish`, of each layer."""
    layer = tl.program_id(0)
    a = tl.load(_tensor(addresses_ptr, layer, 2))
    b = tl.load(_tensor(addresses_ptr, layer, 3))
    base_norm = tl.load(_tensor(addresses_ptr, layer, 4))
    size = rank * rank
    parts = parts_ptr + layer.to(tl.int64) * (2 * SPLITS * size)
    grams, found = grams_ptr + layer * (2 * size), found_ptr + layer * (5 * STRIDE)
    finish_layer(parts, a, b, base_norm, grams, found, rank, eps, eps_over_s, SPLITS, R, STRIDE)


@triton.jit  # type: ignore[untyped-decorator]
def up_many(  # type: ignore[no-untyped-def]
    addresses_ptr,
    sizes_ptr,
    starts_ptr,  # (layers,) int64: of a layer's numbers in `ups`
    found_ptr,  # (layers, 5, STRIDE)
    ups_ptr,
    rank,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """q B of each layer."""
    layer = tl.program_id(1)
    size = tl.load(sizes_ptr + 3 * layer + 1) * rank
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    q = tl.load(found_ptr + layer * (5 * STRIDE) + 3 * STRIDE)
    B = tl.load(_tensor(addresses_ptr, layer, 1) + at, mask=mask, other=0.0)
    ups = ups_ptr + tl.load(starts_ptr + layer)
    tl.store(ups + at, (q * B).to(ups_ptr.dtype.element_ty), mask=mask)
