"""Which formats a frozen base can be stored in: one torch-free description a format.

The recipe is checked and the memory forecast is made from this table alone; the module that does
the arithmetic is named by string and imported only on a rank. Every storage tensor has `out` rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# double quantization: float32 offset and step of a row's scales, which are bytes padded to 4
ROW_TAIL_BYTES = 8
SCALE_ALIGN = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatSpec:
    """What the launcher must know of a storage format without importing it."""

    name: str  # the key in a recipe
    title: str  # one line for tables and plans
    impl: str  # "package.module:Class", resolved on a rank
    row_bytes: Callable[[int, int, bool], tuple[int, int]]  # (in, block size, double quant) -> codes, scales
    has_blocks: bool = False  # block_size and double_quant apply, and the block must divide every width
    has_outliers: bool = False  # outlier_threshold applies
    min_capability: tuple[int, int] | None = None  # CUDA compute capability that it needs
    is_quantized: bool = True


def _four_bit(in_: int, block_size: int, double_quant: bool) -> tuple[int, int]:
    blocks = in_ // block_size
    padded = -(-blocks // SCALE_ALIGN) * SCALE_ALIGN
    return in_ // 2, padded + ROW_TAIL_BYTES if double_quant else 4 * blocks


def _eight_bit(in_: int, block_size: int, double_quant: bool) -> tuple[int, int]:
    # a row of bytes is padded to an even number: it is stored viewed as bfloat16
    return in_ + in_ % 2, 4


def _dense(in_: int, block_size: int, double_quant: bool) -> tuple[int, int]:
    raise ValueError("the bytes of a dense row depend on its dtype")


FORMAT_SPECS: dict[str, FormatSpec] = {
    spec.name: spec
    for spec in (
        FormatSpec(
            name="none",
            title="dense",
            impl="decompft.adapters.frozen.dense:DenseLinear",
            row_bytes=_dense,
            is_quantized=False,
        ),
        FormatSpec(
            name="int8",
            title="int8, a float32 scale a row",
            impl="decompft.adapters.frozen.int8:Int8Linear",
            row_bytes=_eight_bit,
            has_outliers=True,
        ),
        FormatSpec(
            name="nf4",
            title="nf4, half a byte a weight",
            impl="decompft.adapters.frozen.fourbit:Nf4Linear",
            row_bytes=_four_bit,
            has_blocks=True,
        ),
        FormatSpec(
            name="fp4",
            title="fp4, half a byte a weight",
            impl="decompft.adapters.frozen.fourbit:Fp4Linear",
            row_bytes=_four_bit,
            has_blocks=True,
        ),
        FormatSpec(
            name="fp8",
            title="fp8 (e4m3), a float32 scale a row",
            impl="decompft.adapters.frozen.fp8:Fp8Linear",
            row_bytes=_eight_bit,
            min_capability=(8, 9),
        ),
    )
}
