"""4-bit rows in one pass: plain torch beside bitsandbytes everywhere, the kernel beside both on a GPU, bit for bit."""

from __future__ import annotations

import pytest
import torch

from decompft.adapters.frozen.fourbit import FourBitLinear, Fp4Linear, Nf4Linear
from decompft.adapters.kernels import dequantize
from decompft.adapters.kernels.dequantize import plain

KINDS = {"nf4": Nf4Linear, "fp4": Fp4Linear}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def packed(kind: str, *, block: int, double: bool, out: int = 12, in_: int = 640, device: str = "cpu"):
    layer = KINDS[kind](in_, out, block_size=block, double_quant=double, bias_dtype=None)
    rows = 0.02 * torch.randn(out, in_, generator=torch.Generator().manual_seed(0))
    rows[1] = 0  # of scales 0
    return layer, layer.pack(rows.to(device))


def by_bitsandbytes(monkeypatch: pytest.MonkeyPatch, layer: FourBitLinear, *args):
    with monkeypatch.context() as patch:
        patch.setattr(dequantize, "fits", lambda *_: False)
        return layer.unpack(*args)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_is_bitsandbytes(kind: str, block: int, double: bool) -> None:
    layer, storage = packed(kind, block=block, double=double)
    for scale in (None, torch.tensor([1.7]), torch.linspace(0.5, 2, 12).view(-1, 1)):
        found = plain(*storage, layer.code, block, torch.float32, scale, double_quant=double)
        torch.testing.assert_close(found, layer.unpack(storage, torch.float32, scale), rtol=0, atol=0)


def test_a_cpu_never_asks_for_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dequantize.PROVED, "example", None)
    layer, storage = packed("nf4", block=64, double=True)
    assert not dequantize.fits(storage[0], 64, torch.bfloat16, None)
    assert layer.unpack(storage, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", [64, 128, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_is_bitsandbytes(
    kind: str, block: int, double: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_ = 3 * block if block > 128 else 11008
    layer, storage = packed(kind, block=block, double=double, out=130, in_=in_, device="cuda")
    assert dequantize.fits(storage[0], block, dtype, None), dequantize.PROVED.reason(storage[0].device, dtype)
    row_scale = torch.linspace(0.5, 2, 130, device="cuda").view(-1, 1)
    for scale in (None, row_scale[:1, 0], row_scale):
        expected = by_bitsandbytes(monkeypatch, layer, storage, dtype, scale)
        assert torch.equal(layer.unpack(storage, dtype, scale), expected)
    # some rows of it, and none
    some = tuple(s[7:20] for s in storage)
    assert torch.equal(layer.unpack(some, dtype), layer.unpack(storage, dtype)[7:20])
    assert layer.unpack(tuple(s[:0] for s in storage), dtype).shape == (0, in_)


@pytest.mark.gpu
@pytest.mark.parametrize("double", [False, True])
def test_a_storage_may_start_between_two_float32(double: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, storage = packed("nf4", block=64, double=double, device="cuda")
    flats = [torch.cat([s.new_zeros(1), s.reshape(-1)]) for s in storage]
    shifted = tuple(f[1:].view(s.shape) for f, s in zip(flats, storage, strict=True))
    expected = by_bitsandbytes(monkeypatch, layer, storage, torch.bfloat16)
    assert torch.equal(layer.unpack(shifted, torch.bfloat16), expected)
