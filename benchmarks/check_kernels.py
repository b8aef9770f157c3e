"""Do the Triton kernels compute what torch does, and do they compile for an H100 or H200? Asked without a GPU.

PYTHONPATH=TRITON python benchmarks/check_kernels.py

TRITON is a folder with an unpacked triton wheel (checked with 3.6.0); not needed where triton is installed. Each kernel
of adapters/kernels is compiled down to machine code for sm_90 in every variant that is launched, then run in
Triton's interpreter over odd shapes and compared with torch in float64, and so is its proof. It times nothing, and the
interpreter runs programs one after the other: a race would not show.
"""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
from typing import Any

import check_fp8_kernels
import torch
from torch import Tensor

from decompft.adapters.kernels import (
    columns,
    combine,
    cross_entropy,
    dequantize,
    proved,
    rms_norm,
    swiglu,
    weight_times,
)

SM = 90
POINTERS = {"*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32}
VARIANTS = ((True, False), (False, True), (True, True))  # DOTS, SCALES
SOURCES = {"codes_ptr": "*u8", "bytes_ptr": "*u8"}
FLOATS = {"eps": "fp32", "eps_over_s": "fp32", "s": "fp32", "tiny": "fp32", "limit": "fp32"}
INNERS = (16, 48, 192)  # of the thin product that `combine` adds
SHAPES = ((1, 1), (3, 129), (257, 128), (600, 300))
SWIGLU_RANKS = ((16, 16), (5, 0), (0, 48), (0, 0), (64, 3))
RMS_NORMS = ((1, 1), (7, 100), (70, 128), (3, 4096), (2, 5000), (2, 16384))
# of an element that is rounded once: Triton's interpreter cuts bfloat16 off instead of rounding to the nearest
SPACING = {torch.bfloat16: 2**-7, torch.float16: 0.0, torch.float32: 0.0}


def main() -> None:
    if sys.argv[1:] == ["interpret"]:
        interpret()
        check_fp8_kernels.interpret()
        return
    compile_all()
    check_fp8_kernels.compile_all()
    # an environment of its own: the decorator reads the variable when the kernel is imported
    again = [sys.executable, __file__, "interpret"]
    sys.exit(subprocess.run(again, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode)


def compile_all() -> None:
    from decompft.adapters.kernels import columns_triton, dequantize_triton

    tile = {"ROWS": columns._ROWS, "COLUMNS": columns._COLUMNS, "TILES": columns._TILES}
    for pointer, (dots, scales) in itertools.product(POINTERS, VARIANTS):
        left_out = ({} if dots else {"parts_ptr": None}) | ({} if scales else {"scale_ptr": None})
        types = {"a_ptr": pointer, "b_ptr": pointer, "out_ptr": pointer}
        compile_one(columns_triton.columns, types, tile | {"DOTS": dots, "SCALES": scales} | left_out)
    for pointer, double, fused, times, half in itertools.product(
        POINTERS, (True, False), (True, False), (0, 1, 2), (32, 64)
    ):
        constants = {"DOUBLE": double, "FUSED": fused, "TIMES": times, "HALF": half, "BLOCKS": 2048 // half}
        if fused and not double:
            continue
        compile_one(
            dequantize_triton.dequantize, SOURCES | {"out_ptr": pointer}, constants, enable_fp_fusion=False
        )

    from decompft.adapters.kernels import norm, norm_many, norm_many_triton, norm_triton, rows, rows_triton

    for padded in (16, 32, 64):
        sizes = {"R": padded, "SPLITS": norm._SPLITS}
        compile_one(norm_triton.gram, {}, sizes | {"CHUNK": norm.chunk_of(padded), "CHUNKS": 6})
        tables = {"addresses_ptr": "*i64", "sizes_ptr": "*i32", "starts_ptr": "*i64"}
        compile_one(norm_many_triton.gram_many, tables, sizes | {"CHUNK": norm.chunk_of(padded)})
        compile_one(norm_many_triton.finish_many, tables | FLOATS, sizes | {"STRIDE": norm._STRIDE})
        for pointer in ("*bf16", "*fp16"):
            blocks = {"STRIDE": norm._STRIDE, "BLOCK": norm_many._BLOCK}
            compile_one(norm_many_triton.up_many, tables | {"ups_ptr": pointer}, blocks)
        compile_one(norm_triton.finish, FLOATS, sizes | {"STRIDE": norm._STRIDE})
        compile_one(
            norm_triton.pull, FLOATS, {"R": padded, "CHUNK": norm.chunk_of(padded), "STRIDE": norm._STRIDE}
        )
        compile_one(rows_triton.factors, FLOATS, {"R": padded, "ROWS": rows.rows_of(padded)})
        compile_one(rows_triton.pull, FLOATS, {"R": padded, "ROWS": rows.rows_of(padded)})
    from decompft.adapters.kernels import changed, changed_triton

    tile = {"R": 16, "ROWS": changed.rows_of(16), "COLUMNS": changed._COLUMNS, "TIMES": 0}
    for pointer, double, exact, slope in itertools.product(POINTERS, *[(True, False)] * 3):
        constants = tile | {"DOUBLE": double, "FUSED": double, "EXACT": exact, "SLOPE": slope}
        compile_one(changed_triton.changed, SOURCES | FLOATS | {"out_ptr": pointer}, constants)
    compile_one(
        changed_triton.changed, SOURCES | FLOATS | {"out_ptr": "*bf16"},
        tile | {"R": 64, "ROWS": changed.rows_of(64), "DOUBLE": True, "FUSED": True, "EXACT": True, "SLOPE": True},
    )  # fmt: skip
    compile_combine()
    compile_visit()
    compile_cross_entropy()
    compile_rms_norm()
    compile_swiglu()
    compile_weight_times()


def compile_combine() -> None:
    """As y, whose thin product's right factor is transposed, and as a slope, whose is not."""
    from decompft.adapters.kernels import combine_triton

    for pointer, num, dots, inner, tall in itertools.product(
        POINTERS, (0, 1, 2, 3), (False, True), (0, *INNERS), (False, True)
    ):
        dtype, tile = POINTERS[pointer], combine.TILES[num]
        if (tall and num > 1) or ((tall or not num) and (dots or not inner)):
            continue
        if dtype == torch.float32 and inner > combine._MAX_INNER_FLOAT32:
            continue
        present = {"own_2_ptr": num > 1, "own_3_ptr": num > 2, "x_ptr": dots, "parts_ptr": dots}
        present |= {"left_ptr": inner > 0, "right_ptr": inner > 0}
        constants = {
            "M": num, "DOTS": dots, "THIN": inner > 0, "K": combine.padded(inner), "ROWS": combine.rows_of(dtype),
            "COLUMNS": tile.columns, "TILES": tile.tiles,
            "right_inner_stride" if tall else "right_column_stride": 1,
        }  # fmt: skip
        constants |= {name: None for name, is_there in present.items() if not is_there}
        types = dict.fromkeys(("own_1_ptr", *present), pointer) | {"parts_ptr": "*fp32"}
        kernel = combine_triton.combine
        compile_one(kernel, types, constants, num_warps=tile.warps, num_stages=1)


def compile_visit() -> None:
    from decompft.adapters.kernels import visit, visit_triton

    for pointer, padded, tiles in itertools.product(("*bf16", "*fp16"), (16, 32), (1, 2, 4, 8)):
        types = {name: pointer for name in ("dy_ptr", "up_ptr", "hq_ptr")}
        tile = {"R": padded, "ROWS": visit._ROWS, "COLUMNS": visit._COLUMNS, "TILES": tiles}
        compile_one(visit_triton.visit_parts, types, tile, num_warps=4, num_stages=visit._STAGES)
    for pointer in ("*bf16", "*fp16"):
        sums = {"SIZE": visit._SIZE, "PARTS": visit._PARTS}
        compile_one(visit_triton.visit_sums, {"gu_ptr": pointer, "scale": "fp32"}, sums)


def compile_cross_entropy() -> None:
    from decompft.adapters.kernels import cross_entropy_triton

    for pointer, slopes in itertools.product(POINTERS, (True, False)):
        types = {"logits_ptr": pointer, "targets_ptr": "*i64"}
        constants = {"SLOPES": slopes, "BLOCK": cross_entropy._BLOCK}
        compile_one(cross_entropy_triton.cross_entropy, types, constants, num_warps=cross_entropy._WARPS)


def compile_rms_norm() -> None:
    """Rows of heads, of models' widths and the longest."""
    from decompft.adapters.kernels import rms_norm_triton

    for pointer, width in itertools.product(POINTERS, (128, 1024, 4096, 5120, rms_norm.MAX_COLUMNS)):
        rows, columns, warps = rms_norm.tile_of(width)
        tile = {"ROWS": rows, "COLUMNS": columns}
        types = dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr"), pointer)
        compile_one(
            rms_norm_triton.rms_norm_forward,
            types | {"eps": "fp32"},
            tile,
            num_warps=warps,
            **rms_norm._OPTIONS,
        )
        types = dict.fromkeys(("dy_ptr", "x_ptr", "weight_ptr", "other_ptr", "dx_ptr"), pointer)
        for sums in (False, True):
            constants = {"SUMS": sums} | tile | ({} if sums else {"other_ptr": None})
            compile_one(
                rms_norm_triton.rms_norm_backward, types, constants, num_warps=warps, **rms_norm._OPTIONS
            )


def compile_swiglu() -> None:
    """Every pair of ranks, with and without branches."""
    from decompft.adapters.kernels import swiglu_triton

    for pointer, gate_r, up_r, dots in itertools.product(
        ("*bf16", "*fp16"), (0, 16, 64), (0, 16, 64), (False, True)
    ):
        ranks = {"GATE_R": gate_r, "UP_R": up_r}
        factors = {f"{name}_{f}_ptr": r for name, r in (("gate", gate_r), ("up", up_r)) for f in ("h", "w")}
        absent = {name: None for name, r in factors.items() if not r}
        types = dict.fromkeys(("gate_ptr", "up_ptr", "y_ptr", "dy_ptr", *factors), pointer)
        sums = {"GATE_DOTS": dots, "UP_DOTS": dots}
        for kernel, tile, own in (
            (swiglu_triton.swiglu_forward, swiglu.FORWARD, {}),
            (
                swiglu_triton.swiglu_backward,
                swiglu.BACKWARD,
                sums | ({} if dots else {"gate_dots_ptr": None, "up_dots_ptr": None}),
            ),
        ):
            sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "TILES": tile.tiles}
            if own or not dots:
                compile_one(kernel, types, ranks | own | sizes | absent, num_warps=tile.warps, num_stages=1)


def compile_weight_times() -> None:
    """Every rank, with blocks of two sizes."""
    from decompft.adapters.kernels import weight_times_triton

    for pointer, double, fused, padded, block in itertools.product(
        ("*bf16", "*fp16"), (False, True), (False, True), (16, 32, 64), (32, 64)
    ):
        if fused and not double:
            continue
        tile = {
            "ROWS": weight_times._ROWS, "COLUMNS": weight_times.columns_of(block), "TILES": weight_times._TILES
        }  # fmt: skip
        constants = {"DOUBLE": double, "FUSED": fused, "TIMES": 0, "R": padded} | tile
        compile_one(
            weight_times_triton.weight_times, SOURCES | {"a_ptr": pointer}, constants,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def compile_one(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: Any) -> None:
    """Down to machine code.

    Args:
        types: of arguments that are neither constants, float32 pointers (`_ptr`) nor int32.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def type_of(name: str) -> str:
        return (
            "constexpr" if name in constants else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        )

    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    signature = {name: type_of(name) for name in kernel.arg_names}
    # pointers of whole allocations, as they mostly are: loads and stores of 16 bytes; with sizes and strides that are
    # multiples of 16, as a model's widths are, of tiles too
    multiple, names = [["tt.divisibility", 16]], [n for n in kernel.arg_names if n not in constants]
    pointers, sizes = ([n for n in names if signature[n].startswith(kind)] for kind in ("*", "i32"))
    for aligned in ((), pointers, pointers + sizes):
        attributes = {(kernel.arg_names.index(n),): multiple for n in aligned}
        source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
        made = triton.compile(source, target=GPUTarget("cuda", SM, 32), options=options)
    module = kernel.fn.__module__.rpartition(".")[2].removesuffix("_triton")
    what = ", ".join(
        [f"{n}={v}" for n, v in constants.items() if v is not None]
        + [t for n, t in types.items() if n in kernel.arg_names]
    )
    print(
        f"sm_{SM}: {module}: {what}: {len(made.asm['cubin']):,} bytes of machine code, {made.metadata.shared} shared"
    )


def interpret() -> None:
    # what sends the CPU past the kernel, and a context that only a GPU has
    columns._fits = lambda x_TC: x_TC.stride(1) == 1
    # and a product whose sum is rounded once, which the interpreter rounds twice
    dequantize._addcmul_is_fused = lambda device: False  # type: ignore[assignment]
    torch.addcmul = lambda low, byte, step: low + byte * step  # type: ignore[assignment]
    torch.manual_seed(0)
    for name in proved._MODULES:
        if (
            name == "fp8"
        ):  # the interpreter rounds to e4m3 wrongly: check_fp8_kernels.py asks its kernels for float32
            continue
        proof = importlib.import_module(f"decompft.adapters.kernels.{name}").PROVED
        # as on a GPU before training; bfloat16 is held to exact rounding there, which is not the interpreter's
        for dtype in proof.dtypes or (torch.float16, torch.float32):
            if proof.computes is not None and dtype not in proof.computes:
                continue
            proof.example(torch.device("cpu"), dtype)
            print(f"interpreter: {name}'s own proof in {str(dtype).removeprefix('torch.')}: passed")
    check_visits()
    check_cross_entropy()
    for dtype, size in itertools.product(POINTERS.values(), RMS_NORMS):
        rms_norm.example(torch.device("cpu"), dtype, size, cut_by=SPACING[dtype])
        print(f"interpreter: rms_norm: {size} {str(dtype).removeprefix('torch.')}: as torch")
    for size, ranks in itertools.product(((1, 1), (3, 129), (300, 272)), SWIGLU_RANKS):
        # the interpreter multiplies bfloat16 as if their bits were integers
        for dtype in (torch.float16, *[torch.bfloat16] * (not any(ranks))):
            swiglu.example(torch.device("cpu"), dtype, size, ranks, cut_by=SPACING[dtype])
    for code, rank, size, double in (
        ("nf4", 64, (130, 9), False),
        ("fp4", 1, (1, 1), True),
        ("nf4", 33, (64, 8), True),
    ):
        weight_times.example(torch.device("cpu"), torch.float16, code, rank, size, double_quant=double)
    print("interpreter: weight_times: as torch")
    print(f"interpreter: swiglu of branches of ranks {SWIGLU_RANKS}: as torch")
    for dtype, num, dots, inner in itertools.product(
        POINTERS.values(), (0, 1, 2, 3), (False, True), (0, *INNERS)
    ):
        if not num and (dots or not inner):
            continue
        if dtype == torch.float16 or not inner or (dtype == torch.float32 and inner == min(INNERS)):
            combine.example(
                torch.device("cpu"), dtype, num=num, dots=dots, inner=inner, tall=num < 2, size=(70, 70)
            )
    print(f"interpreter: combine of 0 to 3 arrays, dots, inner sizes 0, {INNERS}: as torch")
    for shape, dtype in itertools.product(SHAPES, POINTERS.values()):
        # columns of a wider array: rows are further apart than they are long
        a, b = (torch.randn(shape[0], shape[1] + 4).to(dtype)[:, : shape[1]] for _ in range(2))
        scale = torch.randn(shape[1])
        check(a, b, scale)
        print(f"interpreter: {tuple(shape)} {str(dtype).removeprefix('torch.')}: as torch")


# rows, columns, rank: within one tile, odd sides, two stretches of eight tiles, more parts than are read at once
VISITS = ((1, 8, 1), (70, 300, 8), (129, 257, 16), (1030, 264, 32), (40, 4400, 3))


def check_visits() -> None:
    """Raises: AssertionError: as `check`."""
    from decompft.adapters.kernels import visit

    # the interpreter multiplies bfloat16's bits as integers; float32 is not asked for on a GPU, but is the same code
    for shape, dtype, tiles in itertools.product(VISITS, (torch.float16, torch.float32), (1, visit._TILES)):
        num_rows, num_columns, rank = shape
        dy, up = (
            torch.randn(n, width).to(dtype) for n, width in ((num_rows, num_columns), (num_columns, rank))
        )
        hq, gu = (torch.randn(num_rows, rank + 5).to(dtype)[:, 2 : 2 + rank] for _ in range(2))
        exact = torch.empty(gu.shape, dtype=torch.float64)
        exact_d_up = visit.plain(dy.double(), up.double(), hq.double(), exact, 0.7)
        d_up = visit._launch(dy, up, hq, gu, 0.7, tiles)
        bound = 2**-24 * num_columns * (dy.double().abs() @ up.double().abs())
        bound += torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal
        close("visit's gu", gu, exact, bound)
        close("visit's d_up", d_up, exact_d_up, 2**-24 * num_rows * (dy.double().abs().T @ hq.double().abs()))
        print(f"interpreter: visit: {shape} {str(dtype).removeprefix('torch.')}, {tiles} tiles: as torch")


# columns: one, less than a block, all of one, one more, several and a part
VOCABULARIES = (1, 50, cross_entropy._BLOCK, cross_entropy._BLOCK + 1, 4 * cross_entropy._BLOCK + 4097)


def check_cross_entropy() -> None:
    """Raises: WrongKernelError: as `cross_entropy.example`."""
    cpu = torch.device("cpu")
    for num_columns, dtype, slopes in itertools.product(VOCABULARIES, POINTERS.values(), (True, False)):
        # cut off, and the twin's rounded to the nearest: up to one spacing and a half
        spacing = 2 * SPACING[dtype] or None
        cross_entropy.example(cpu, dtype, size=(7, num_columns), slopes=slopes, spacing=spacing)
    print(f"interpreter: cross_entropy of {VOCABULARIES} logits: as torch")


def check(a: Tensor, b: Tensor, scale: Tensor) -> None:
    """Raises: AssertionError: a kernel and torch are further apart than rounding allows."""
    products = a.double() * b.double()
    # a float32 sum of n terms in any order: n half spacings of what was added up
    bound = 2**-24 * len(a) * products.abs().sum(0)
    scaled = (b.float() * scale).to(b.dtype)
    copy = b.clone()
    close("times_columns", columns.times_columns(b, scale), scaled, SPACING[b.dtype] * scaled.double().abs())
    close("dot_columns", columns.dot_columns(a, b), products.sum(0), bound)
    close("dot", columns.dot(a, b), products.sum(), 2**-24 * products.numel() * products.abs().sum())
    close("dot_columns_and_scale_", columns.dot_columns_and_scale_(a, copy, scale), products.sum(0), bound)
    close("dot_columns_and_scale_'s b", copy, scaled, SPACING[b.dtype] * scaled.double().abs())


def close(what: str, found: Tensor, expected: Tensor, bound: Tensor) -> None:
    apart = (found.double() - expected.double()).abs()
    assert bool((apart <= bound).all()), (
        f"{what} of {tuple(expected.shape)} {found.dtype}: {apart.max():.3g} apart"
    )


if __name__ == "__main__":
    main()
