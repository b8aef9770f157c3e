"""Do the Triton kernels compute what torch does, and do they compile for an H100 or H200? Asked without a GPU.

PYTHONPATH=TRITON python benchmarks/check_kernels.py

TRITON is a folder with an unpacked triton wheel (checked with 3.6.0); not needed where triton is installed. Each kernel
of adapters/kernels is compiled down to machine code for sm_90 in every variant that columns.py launches, then run in
Triton's interpreter over odd shapes and compared with torch in float64. It times nothing, and the interpreter runs
programs one after the other: a race would not show.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys

import check_fp8_kernels
import torch
from torch import Tensor

from decompft.adapters.kernels import columns

SM = 90
POINTERS = {"*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32}
VARIANTS = ((True, False), (False, True), (True, True))  # DOTS, SCALES
SHAPES = ((1, 1), (3, 129), (257, 128), (600, 300))
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
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from decompft.adapters.kernels.columns_triton import kernel

    for pointer, (dots, scales) in itertools.product(POINTERS, VARIANTS):
        constants = {
            "DOTS": dots, "SCALES": scales,
            "ROWS": columns._ROWS, "COLUMNS": columns._COLUMNS, "TILES": columns._TILES,
        } | ({} if dots else {"parts_ptr": None}) | ({} if scales else {"scale_ptr": None})  # fmt: skip
        types = {
            "a_ptr": pointer,
            "b_ptr": pointer,
            "out_ptr": pointer,
            "scale_ptr": "*fp32",
            "parts_ptr": "*fp32",
        }
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=places)
        made = triton.compile(source, target=GPUTarget("cuda", SM, 32))
        size = len(made.asm["cubin"])
        print(f"sm_{SM}: {pointer[1:]}, DOTS={dots}, SCALES={scales}: {size:,} bytes of machine code")


def interpret() -> None:
    # what sends the CPU past the kernel, and a context that only a GPU has
    columns._fits = lambda x_TC: x_TC.stride(1) == 1
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment,misc]
    torch.manual_seed(0)
    for shape, dtype in itertools.product(SHAPES, POINTERS.values()):
        # columns of a wider array: rows are further apart than they are long
        a, b = (torch.randn(shape[0], shape[1] + 4).to(dtype)[:, : shape[1]] for _ in range(2))
        scale = torch.randn(shape[1])
        check(a, b, scale)
        print(f"interpreter: {tuple(shape)} {str(dtype).removeprefix('torch.')}: as torch")


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
