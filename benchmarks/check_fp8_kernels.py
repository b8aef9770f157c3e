"""The kernels of adapters/kernels/fp8.py, as check_kernels.py asks: do they compile, do they compute what torch does?

In the interpreter `rows` writes float32, before the rounding to e4m3, which the interpreter gets wrong. The kernels of
4-bit codes write bytes, which have to be torch's; their instructions for words (fp8_words.py) do not run there: `words`
runs them in Python instead.
"""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from decompft.adapters.frozen.fourbit import FourBitLinear, Fp4Linear, Nf4Linear
from decompft.adapters.kernels import fp8

SM = 90
SHAPES = ((4, 64), (37, 192), (132, 1472), (64, 4096))  # (O, I)
# what benchmarks/fp8_kernels_time.py times: warps to a row; warps and pieces of the transposing kernel
ROW_WARPS = (1, 2, 4)
TALL_TILES = ((1, 2), (2, 2), (2, 1))
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
        types = {"codes_ptr": "*i32", "bytes_ptr": "*u8", "out_ptr": "*i32"}
        name = f"{inputs} inputs, double={double}"
        for warps in ROW_WARPS:
            compile_one(
                f"fourbit_rows, {name}, {warps} warps", fp8_triton.fourbit_rows, types,
                sizes | {"THREADS": 32 * warps}, warps,
            )  # fmt: skip
        for warps, pieces in TALL_TILES:
            compile_one(
                f"fourbit_columns, {name}, {warps} warps, {pieces} pieces", fp8_triton.fourbit_columns, types,
                sizes | {"THREADS": 32 * warps, "PIECES": pieces}, warps,
            )  # fmt: skip
        compile_one(f"block_highs, {name}", fp8_triton.block_highs, types, sizes | {"ROWS": fp8._HIGH_ROWS})


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
    words()
    for shape, layer in itertools.product(SHAPES, layers()):
        check_fourbit(shape, layer)


def words() -> None:
    """Raises: AssertionError: the instructions of fp8_words.py do not do to words what is said of them."""
    from decompft.adapters.kernels import fp8_words

    draw = random.Random(0)
    for _ in range(2000):
        table, raw = draw.randbytes(16), draw.randbytes(4)
        codes = [code for byte in raw for code in (byte >> 4, byte & 15)]
        found = run(
            fp8_words._LOOK_UP.value, 2, [word_of(raw), *(word_of(table[i : i + 4]) for i in range(0, 16, 4))]
        )
        assert found == [word_of(table[c] for c in codes[:4]), word_of(table[c] for c in codes[4:])], (
            "looked_up"
        )
        rows = [draw.randbytes(4) for _ in range(4)]
        found = run(fp8_words._TRANSPOSE.value, 4, [word_of(row) for row in rows])
        assert found == [word_of(column) for column in zip(*rows, strict=True)], "transposed"
    print("words: 2,000 random tables and codes: the bytes that were meant")


def word_of(of_bytes: Iterable[int]) -> int:
    return int.from_bytes(bytes(of_bytes), "little")


def run(asm: str, num_outputs: int, inputs: list[int]) -> list[int]:
    """The instructions on words, one after the other, as the PTX ISA defines them."""
    held = {f"${num_outputs + i}": value for i, value in enumerate(inputs)}
    for line in asm.strip("{}\n").splitlines():
        name, _, rest = line.strip(" ;").partition(" ")
        if name == ".reg":
            continue
        to, *sources = rest.split(", ")
        held[to] = step(name, [held[s] if s in held else int(s, 0) for s in sources]) & 0xFFFFFFFF
    return [held[f"${i}"] for i in range(num_outputs)]


def step(name: str, sources: list[int]) -> int:
    if name == "prmt.b32":
        pool = sources[0] | sources[1] << 32
        picks = [sources[2] >> 4 * i & 15 for i in range(4)]
        assert max(picks) < 8, "a digit of 8 or more spreads a sign"
        return word_of(pool >> 8 * p & 255 for p in picks)
    if name == "lop3.b32":
        bits = [[s >> i & 1 for s in sources[:3]] for i in range(32)]
        return sum((sources[3] >> (4 * a + 2 * b + c) & 1) << i for i, (a, b, c) in enumerate(bits))
    left, right = sources
    return {"and.b32": operator.and_, "shr.b32": operator.rshift, "shl.b32": operator.lshift}[name](
        left, right
    )


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
    found = fp8._room(num_rows, num_inputs, torch.device("cpu"))
    fp8.launch_fourbit_rows(given, *found)
    same("fourbit_rows", found, fp8.fourbit_rows(given), used)
    absmax = fp8.absmax(given)
    high = torch.full((-(-num_rows // fp8._HIGH_ROWS), num_inputs // block), torch.nan)
    fp8.launch_block_highs(given, high)
    assert torch.equal(high.amax(0), absmax.amax(0)), "block_highs"
    if num_rows % 4 == 0:
        found = fp8._room(num_inputs, num_rows, torch.device("cpu"))
        fp8.launch_fourbit_columns(given, high.amax(0), *found)
        same("fourbit_columns", found, fp8.fourbit_columns(given), used.T)
    print(f"interpreter: {form.__name__}, blocks of {block}, double={double}, {shape}: torch's bits")


def same(what: str, found: fp8.Rows, expected: fp8.Rows, values: Tensor) -> None:
    """The twin's bits, and near the weight that bitsandbytes' operator makes."""
    codes = found.codes.float()
    assert torch.equal(found.scale, expected.scale) and torch.equal(codes, expected.codes.float()), what
    apart = (codes.double() * found.scale.double()[:, None] - values.double()).abs()
    near_zero = 2**-10 * found.scale.double()[:, None]
    assert bool((apart <= torch.maximum(2**-4 * values.double().abs(), near_zero) * (1 + 2**-20)).all()), what


def close(what: str, found: Tensor, scale: Tensor, values: Tensor, expected_scale: Tensor) -> None:
    assert torch.allclose(scale, expected_scale, rtol=SPACING, atol=0), f"{what}: scales"
    expected = values.double() / expected_scale.double()[:, None]
    apart = (found.double() - expected).abs()
    assert bool((apart <= 2 * SPACING * expected.abs()).all()), f"{what}: {apart.max():.3g} apart"
