"""What every format of the frozen base holds: bytes, independent rows, zeros, dtypes, gradients."""

import pytest
import torch

from decompft.adapters.formats import FORMAT_SPECS
from decompft.adapters.frozen import rows as packed_rows
from decompft.adapters.frozen.base import FrozenLinear
from decompft.launcher.errors import AdapterError
from decompft.launcher.recipe import QuantizationSection
from decompft.launcher.worker.build import frozen_maker

CASES = {
    "none": {"format": "none"},
    "int8": {"format": "int8"},
    "int8-outliers": {"format": "int8", "outlier_threshold": 6.0},
    "nf4": {"format": "nf4", "double_quant": False},
    "nf4-double": {"format": "nf4", "double_quant": True},
    "nf4-double-128": {"format": "nf4", "double_quant": True, "block_size": 128},
    "fp4": {"format": "fp4", "double_quant": False},
    "fp4-double": {"format": "fp4", "double_quant": True},
    "fp8": {"format": "fp8"},
}
QUANTIZED = [name for name in CASES if name != "none"]
ODD = ["none", "int8", "int8-outliers", "fp8"]  # formats that pack any width
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def layer(case: str, *, in_: int = 256, out: int = 12, bias: torch.dtype | None = None) -> FrozenLinear:
    return frozen_maker(QuantizationSection(**CASES[case]), torch.float32)("layer", in_, out, bias)


def filled(case: str, rows: torch.Tensor) -> FrozenLinear:
    made = layer(case, in_=rows.shape[1], out=rows.shape[0])
    for parameter, values in zip(made.storage(), made.pack(rows), strict=True):
        parameter.copy_(values)
    return made


def some_rows(out: int = 12, in_: int = 256) -> torch.Tensor:
    return 0.02 * torch.randn(out, in_, generator=torch.Generator().manual_seed(0))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def assert_same_bits(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def test_every_format_is_tested_here():
    assert {case["format"] for case in CASES.values()} == set(FORMAT_SPECS)


@pytest.mark.parametrize(("case", "in_"), [*((c, 640) for c in QUANTIZED), ("int8", 639), ("fp8", 639)])
def test_storage_has_the_bytes_that_a_plan_counts(case, in_):
    section = QuantizationSection(**CASES[case])
    real = [p.numel() * p.element_size() for p in layer(case, in_=in_, out=10).storage()]
    counted = FORMAT_SPECS[section.format].row_bytes(in_, section.block_size, section.double_quant)
    assert real == [10 * counted[0], 10 * counted[1]]


@pytest.mark.parametrize(("case", "in_"), [*((c, 256) for c in CASES), *((c, 127) for c in ODD)])
def test_a_rank_packs_its_rows_as_if_it_had_all(case, in_):
    rows, made = some_rows(12, in_), layer(case, in_=in_)
    whole = made.pack(rows)
    assert [(t.shape, t.dtype) for t in whole] == [(p.shape, p.dtype) for p in made.storage()]
    parts = [made.pack(rows[a:b]) for a, b in ((0, 5), (5, 5), (5, 12))]
    assert_same_bits(tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True)), whole)
    ends = torch.cat([made.unpack(p, torch.float32) for p in parts])
    assert torch.equal(ends, made.unpack(whole, torch.float32))


@pytest.mark.parametrize("case", CASES)
def test_transposed_rows_pack_like_others(case):
    """As GPT-2's checkpoints store them: a view of (in, rows)."""
    rows, made = some_rows(), layer(case)
    packed = made.pack(rows.T.contiguous().T)
    assert_same_bits(packed, made.pack(rows))
    assert all(t.is_contiguous() for t in packed)


@pytest.mark.parametrize("case", QUANTIZED)
def test_a_large_matrix_is_packed_in_pieces(case, monkeypatch):
    rows, made = some_rows(), layer(case)
    whole = made.pack(rows)
    monkeypatch.setattr(packed_rows, "CHUNK_NUMBERS", 5 * 256 + 1)
    sizes = [chunk.shape[0] for _, chunk in packed_rows.float_chunks(rows)]
    assert sizes == [5, 5, 2]
    assert_same_bits(made.pack(rows), whole)
    monkeypatch.setattr(packed_rows, "CHUNK_NUMBERS", 1)  # a row is never cut
    assert_same_bits(made.pack(rows), whole)


@pytest.mark.parametrize("case", QUANTIZED)
def test_rows_read_as_bfloat16_pack_like_the_same_numbers_in_float32(case):
    rows, made = some_rows().bfloat16(), layer(case)
    assert_same_bits(made.pack(rows), made.pack(rows.float()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case", "in_"), [*((c, 256) for c in CASES), *((c, 127) for c in ODD)])
def test_rows_of_zeros_stay_zero_and_their_neighbours_are_not_moved(case, in_, dtype):
    rows, made = some_rows(12, in_), layer(case, in_=in_)
    before = made.unpack(made.pack(rows), dtype)
    rows[3] = rows[11] = 0
    after = made.unpack(made.pack(rows), dtype)
    assert not after[[3, 11]].any()
    kept = [i for i in range(12) if i not in (3, 11)]
    assert torch.equal(after[kept], before[kept]) and after.isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_numbers_beyond_float32_s_normal_range_do_no_harm(case):
    rows, made = some_rows(), layer(case)
    rows[0] *= 1e-41
    rows[1] *= 1e37
    found = made.unpack(made.pack(rows), torch.float32)
    assert found.isfinite().all()
    assert found[0].abs().max() < 1e-38
    assert torch.linalg.norm(found[1].double() / 1e37 - rows[1].double() / 1e37) < 0.15 * 0.02 * 16
    rows[2, 7] = torch.nan  # a damaged weight is not repaired in silence
    assert not made.unpack(made.pack(rows), torch.float32)[2].isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_unpacked_dtypes_agree(case):
    made = layer(case)
    packed = made.pack(some_rows())
    exact = made.unpack(packed, torch.float64)
    assert exact.dtype == torch.float64
    single = made.unpack(packed, torch.float32)
    # a float32 factor, a float32 product
    torch.testing.assert_close(single.double(), exact, rtol=2**-22, atol=0)
    rounded = made.unpack(packed, torch.bfloat16)
    # rounded once
    torch.testing.assert_close(rounded.double(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_a_scale_multiplies_the_weight(case, dtype):
    made = layer(case)
    packed = made.pack(some_rows())
    found = made.unpack(packed, dtype, torch.tensor([-1.75]))
    assert found.dtype == dtype
    close = {"rtol": 2**-7 if dtype == torch.bfloat16 else 1e-6, "atol": 0}
    torch.testing.assert_close(found, -1.75 * made.unpack(packed, dtype), **close)


@pytest.mark.parametrize("case", QUANTIZED)
def test_storage_may_be_a_piece_of_a_flat_buffer(case):
    """As a gather leaves it: a view that starts at any number of the buffer's dtype, odd ones too."""
    made = layer(case)
    packed = made.pack(some_rows())
    shifted = tuple(
        torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)  # float32 would need an even offset
        for t in packed
    )
    assert all(t.storage_offset() == 1 for t in shifted)
    assert torch.equal(made.unpack(shifted, torch.float32), made.unpack(packed, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("case", "in_"), [*((c, 256) for c in CASES if c != "int8-outliers"), ("int8", 127), ("fp8", 127)]
)
def test_forward_is_the_product_with_the_unpacked_weight(case, in_, dtype):
    made = filled(case, some_rows(12, in_))
    x = torch.randn(2, 3, in_, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = made(x)
    assert y.dtype == dtype and y.shape == (2, 3, 12)
    # sums of 256 products of size 0.02: eps * sqrt(256) * 0.02, times a few; in bfloat16 weight and result are rounded
    atol = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(y.double(), x.double() @ made.dense(torch.float64).T, rtol=2**-8, atol=atol)


@pytest.mark.parametrize(("case", "in_"), [*((c, 128) for c in CASES if c != "int8-outliers"), ("fp8", 33)])
def test_input_gradients_match_finite_differences(case, in_):
    made = filled(case, some_rows(6, in_))
    x = torch.randn(3, in_, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(made, (x.requires_grad_(True),))


@pytest.mark.parametrize(
    ("fields", "width", "advice"),
    [
        ({"format": "nf4"}, 96, "use quantization.format: int8, fp8 or none"),
        ({"format": "fp4", "block_size": 128}, 96, "use quantization.format: int8, fp8 or none"),
        (
            {"format": "nf4", "block_size": 128},
            192,
            "use quantization.block_size: 64, or quantization.format",
        ),
    ],
)
def test_a_width_that_the_block_does_not_divide_is_refused_by_name(fields, width, advice):
    make = frozen_maker(QuantizationSection(**fields), torch.float32)
    block = fields.get("block_size", 64)
    with pytest.raises(AdapterError) as error:
        make("model.layers.0.mlp.down_proj", width, 8, None)
    place = "model.layers.0.mlp.down_proj: width"
    assert error.value.message == f"{place} {width} is not a multiple of quantization.block_size {block}"
    assert error.value.hint.startswith(advice) and "adapter.targets does not matter" in error.value.hint


def test_the_recipe_s_keys_arrive():
    made = frozen_maker(QuantizationSection(format="int8", outlier_threshold=5.0), torch.float32)(
        "x", 8, 4, None
    )
    assert made.outlier_threshold == 5.0
    made = frozen_maker(QuantizationSection(format="fp4", block_size=128, double_quant=False), torch.float32)(
        "x", 128, 4, torch.bfloat16
    )
    assert (made.code, made.block_size, made.double_quant, made.bias.dtype) == (
        "fp4",
        128,
        False,
        torch.bfloat16,
    )
    made = frozen_maker(QuantizationSection(format="none"), torch.bfloat16)("x", 8, 4, None)
    assert made.weight.dtype == torch.bfloat16
