"""The packed 4-bit base: what is stored, what comes back, and that rows are independent."""

import pytest
import torch

from decompft.adapters.frozen.nf4 import Nf4Linear

# the 16 levels of NF4 (Dettmers et al., 2023, appendix E), written out as the reference
LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def layer(out=12, in_=256, **kw) -> Nf4Linear:
    kw = {"block_size": 64, "double_quant": False} | kw
    return Nf4Linear(in_, out, bias_dtype=None, **kw)


@pytest.fixture
def rows() -> torch.Tensor:
    return 0.02 * torch.randn(12, 256, generator=torch.Generator().manual_seed(0))


def reference(rows: torch.Tensor, block: int) -> torch.Tensor:
    """Nearest level of each block scaled by its largest magnitude, in plain torch."""
    blocks = rows.view(-1, block)
    absmax = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / absmax)[..., None] - LEVELS).abs().argmin(-1)
    return (LEVELS[nearest] * absmax).view(rows.shape)


@pytest.mark.parametrize("block", [64, 128])
def test_dequantized_rows_are_the_nearest_levels(rows, block):
    packed_layer = layer(block_size=block)
    found = packed_layer.unpack(packed_layer.pack(rows), torch.float32)
    expected = reference(rows, block)
    # a value half-way between two levels may go either way
    assert (found - expected).abs().gt(1e-6).float().mean() < 2e-3
    assert (found - rows).norm() / rows.norm() < 0.11


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


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_rank_quantizes_its_rows_as_if_it_had_all(rows, double_quant):
    packed_layer = layer(double_quant=double_quant)
    whole = packed_layer.pack(rows)
    parts = [packed_layer.pack(rows[a:b]) for a, b in ((0, 5), (5, 5), (5, 12))]
    for index, tensor in enumerate(whole):
        joined = torch.cat([p[index] for p in parts])
        assert torch.equal(joined.view(torch.uint8), tensor.view(torch.uint8))


def test_zero_rows_stay_zero(rows):
    rows[3] = 0
    for double_quant in (False, True):
        packed_layer = layer(double_quant=double_quant)
        assert torch.equal(packed_layer.unpack(packed_layer.pack(rows), torch.float32)[3], torch.zeros(256))


def test_agrees_with_bitsandbytes_functional(rows):
    import bitsandbytes.functional as bnb

    codes, state = bnb.quantize_4bit(rows, blocksize=64, quant_type="nf4")
    packed_layer = layer()
    assert torch.equal(
        packed_layer.unpack(packed_layer.pack(rows), torch.float32), bnb.dequantize_4bit(codes, state)
    )


def test_width_must_be_a_multiple_of_the_block():
    with pytest.raises(ValueError, match="96 is not a multiple"):
        layer(in_=96)
