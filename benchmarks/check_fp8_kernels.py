"""The kernels of adapters/kernels/fp8.py, as check_kernels.py asks: do they compile, do they compute what torch does?

In the interpreter they write float32, before the rounding to e4m3, which the interpreter gets wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from decompft.adapters.frozen.fourbit import FourBitLinear, Fp4Linear, Nf4Linear
from decompft.adapters.kernels import fp8

SM = 90
SHAPES = ((1, 64), (37, 192), (130, 1472), (64, 4096))  # (O, I)
# of a quotient of float32 numbers, multiplied once more
SPACING = 2**-22


def compile_all() -> None:
    from decompft.adapters.kernels import fp8_triton

    for dtype, times, width in itertools.product(("bf16", "fp32"), (False, True), (512, 4096, 32768)):
        constants = {"TIMES": times, "COLUMNS": width} | ({} if times else {"times_ptr": None})
        types = {"x_ptr": f"*{dtype}", "times_ptr": "*fp32"}
        warps = 4 if width <= 2048 else 8 if width <= 8192 else 16
        compile_one(f"rows, {dtype}, {width} wide, times={times}", fp8_triton.rows, types, constants, warps)
    for double, inputs in itertools.product((False, True), (64, 4096, 11008)):
        blocks = inputs // 64
        padded = -(-blocks // 4) * 4
        sizes = {
            "INPUTS": inputs, "BLOCK": 64, "BLOCKS": blocks, "BLOCKS_POWER": 1 << (blocks - 1).bit_length(),
            "SCALE_BYTES": padded + 8 if double else 4 * blocks, "DOUBLE": double,
        }  # fmt: skip
        types = {"codes_ptr": "*u8", "bytes_ptr": "*u8"}
        name = f"{inputs} inputs, double={double}"
        rows = {"ROWS": fp8._ROWS, "BYTES": fp8._BYTES}
        tall = {"ROWS": fp8._TALL_ROWS, "BYTES": fp8._TALL_BYTES}
        compile_one(f"fourbit_rows, {name}", fp8_triton.fourbit_rows, types, sizes | rows)
        compile_one(f"fourbit_columns, {name}", fp8_triton.fourbit_columns, types, sizes | tall)
        high = types | {"out_ptr": "*fp32"}
        compile_one(f"block_highs, {name}", fp8_triton.block_highs, high, sizes | {"ROWS": fp8._HIGH_ROWS})


def compile_one(
    name: str, kernel: object, types: dict[str, str], constants: dict[str, object], warps: int = 4
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names  # type: ignore[attr-defined]
    known = {"out_ptr": "*fp8e4nv"} | types
    signature = {
        n: "constexpr" if n in constants else known.get(n, "*fp32" if n.endswith("_ptr") else "i32")
        for n in names
    }
    places = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    made = triton.compile(source, target=GPUTarget("cuda", SM, 32), options={"num_warps": warps})
    size, shared = len(made.asm["cubin"]), made.metadata.shared
    print(f"sm_{SM}: {name}: {size:,} bytes of machine code, {shared:,} of shared memory")


def interpret() -> None:
    torch.manual_seed(0)
    for shape, dtype in itertools.product(
        ((1, 16), (3, 48), (5, 1000)), (torch.float32, torch.bfloat16, torch.float16)
    ):
        x = torch.randn(shape[0], shape[1] + 8).to(dtype)[:, : shape[1]]
        x[0] = 0
        for times in (None, torch.randn(shape[1])):
            out, scale = torch.full(shape, torch.nan), torch.full(shape[:1], torch.nan)
            fp8.launch_rows(x, times, out, scale)
            wide = x.float() if times is None else x.float() * times
            close("rows", out, scale, wide, fp8.scale_of(wide.abs().amax(1)))
        print(f"interpreter: rows of {tuple(shape)} {str(dtype).removeprefix('torch.')}: as torch")
    for shape, layer in itertools.product(SHAPES, layers()):
        check_fourbit(shape, layer)


def layers() -> Iterator[tuple[type[FourBitLinear], bool, int]]:
    yield from itertools.product((Nf4Linear, Fp4Linear), (False, True), (64,))
    yield Nf4Linear, True, 128


def check_fourbit(shape: tuple[int, int], kind: tuple[type[FourBitLinear], bool, int]) -> None:
    """Raises: AssertionError: a kernel and bitsandbytes' operator are further apart than rounding allows."""
    num_rows, num_inputs = shape
    form, double, block = kind
    if num_inputs % block:
        return
    layer = form(num_inputs, num_rows, block_size=block, double_quant=double, bias_dtype=None)
    weight = torch.randn(shape) * torch.logspace(-3, 1, num_rows)[:, None]
    weight[-1] = 0
    storage = layer.pack(weight)
    used, given = layer.unpack(storage, torch.float32), layer.four_bit(storage)
    out, scale = torch.full(shape, torch.nan), torch.full((num_rows,), torch.nan)
    fp8.launch_fourbit_rows(given, out, scale)
    absmax = fp8.absmax(given)
    close("fourbit_rows", out, scale, used, fp8.scale_of(absmax.amax(1)))
    high = torch.full((-(-num_rows // fp8._HIGH_ROWS), num_inputs // block), torch.nan)
    fp8.launch_block_highs(given, high)
    assert torch.allclose(high.amax(0), absmax.amax(0), rtol=SPACING, atol=0), "block_highs"
    out, scale = torch.full((num_inputs, num_rows), torch.nan), torch.full((num_inputs,), torch.nan)
    fp8.launch_fourbit_columns(given, high.amax(0), out, scale)
    close("fourbit_columns", out, scale, used.T, fp8.scale_of(absmax.amax(0)).repeat_interleave(block))
    print(f"interpreter: {form.__name__}, blocks of {block}, double={double}, {shape}: as bitsandbytes")


def close(what: str, found: Tensor, scale: Tensor, values: Tensor, expected_scale: Tensor) -> None:
    assert torch.allclose(scale, expected_scale, rtol=SPACING, atol=0), f"{what}: scales"
    expected = values.double() / expected_scale.double()[:, None]
    apart = (found.double() - expected).abs()
    assert bool((apart <= 2 * SPACING * expected.abs()).all()), f"{what}: {apart.max():.3g} apart"
