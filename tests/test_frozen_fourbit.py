"""The packed 4-bit base: what is stored, what comes back, and that rows are independent."""

import pytest
import torch

from decompft.adapters.frozen.fourbit import FourBitLinear, Fp4Linear, Nf4Linear

# the 16 levels of NF4 (Dettmers et al., 2023, appendix E), written out as the reference
NF4_LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip

# sign, then 2 bits of exponent and 1 of mantissa, over the largest (12); bitsandbytes reads code 1 as 0.0625
FP4_LEVELS = torch.tensor([s * v / 12 for s in (1, -1) for v in (0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)])
KINDS = {"nf4": (Nf4Linear, NF4_LEVELS), "fp4": (Fp4Linear, FP4_LEVELS)}


def layer(kind="nf4", *, out=12, in_=256, **kw) -> FourBitLinear:
    kw = {"block_size": 64, "double_quant": False} | kw
    return KINDS[kind][0](in_, out, bias_dtype=None, **kw)


@pytest.fixture
def rows() -> torch.Tensor:
    return 0.02 * torch.randn(12, 256, generator=torch.Generator().manual_seed(0))


def reference(rows: torch.Tensor, block: int, levels: torch.Tensor) -> torch.Tensor:
    """Nearest level of each block scaled by its largest magnitude, in float64."""
    blocks, levels = rows.double().view(-1, block), levels.double()
    absmax = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / absmax)[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * absmax).view(rows.shape)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.11), ("fp4", 0.14)])
def test_dequantized_rows_are_the_nearest_levels(rows, kind, error, block):
    packed_layer = layer(kind, block_size=block)
    found = packed_layer.unpack(packed_layer.pack(rows), torch.float64)
    expected = reference(rows, block, KINDS[kind][1])
    # a value half-way between two levels may go either way
    assert (found - expected).abs().gt(1e-6).float().mean() < 2e-3
    assert (found - rows).norm() / rows.norm() < error


def test_double_quantization_costs_little_and_saves_three_bytes_a_block(rows):
    plain, double = layer(in_=4096), layer(in_=4096, double_quant=True)
    wide = 0.02 * torch.randn(12, 4096, generator=torch.Generator().manual_seed(1))
    error = (plain.unpack(plain.pack(wide), torch.float32) - wide).norm()
    error_double = (double.unpack(double.pack(wide), torch.float32) - wide).norm()
    assert error_double < 1.01 * error
    assert plain.scales.shape[1] * 2 == 4 * 64
    assert double.scales.shape[1] * 2 == 64 + 8


@pytest.mark.parametrize("in_", [64, 128, 192, 576])
def test_any_number_of_blocks_a_row_packs(in_):
    packed_layer = layer(in_=in_, double_quant=True)
    rows = torch.randn(12, in_, generator=torch.Generator().manual_seed(2))
    packed = packed_layer.pack(rows)
    assert [tuple(t.shape) for t in packed] == [tuple(p.shape) for p in packed_layer.storage()]
    assert (packed_layer.unpack(packed, torch.float32) - rows).norm() / rows.norm() < 0.12


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_bitsandbytes_without_double_quantization(rows, kind, block):
    import bitsandbytes.functional as bnb

    codes, state = bnb.quantize_4bit(rows, blocksize=block, quant_type=kind)
    packed_layer = layer(kind, block_size=block)
    packed = packed_layer.pack(rows)
    for dtype in (torch.float32, torch.bfloat16):
        state.dtype = dtype
        assert torch.equal(packed_layer.unpack(packed, dtype), bnb.dequantize_4bit(codes, state))
    # and rows of a checkpoint that bitsandbytes quantized are stored as they are
    stored = packed_layer.store(codes.view(12, 128), state.absmax.view(12, -1))
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(stored, packed, strict=True)
    )


def test_width_must_be_a_multiple_of_the_block():
    with pytest.raises(ValueError, match="96 is not a multiple"):
        layer(in_=96)
