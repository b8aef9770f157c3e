"""Words of four e4m3 bytes: fp8_triton.py's inner steps as instructions, and in Triton's words for its interpreter.

`prmt d, a, b, s` makes four bytes: each of the four low hexadecimal digits of s picks one of the eight bytes of b and
a, a digit below 8 by its number (PTX ISA 9, "prmt"). The instructions exist on every GPU that multiplies in float8.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # which runs no instructions

_PACK = tl.constexpr("""{
.reg .b16 low, high;
cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
mov.b32 $0, {low, high};
}""")

# $2: eight codes. A byte's first code is in its high half, and a selector's first digit is its lowest. A digit's three
# low bits pick out of each half of the table, its fourth which half
_LOOK_UP = tl.constexpr("""{
.reg .b32 down, up, code, pick, half, a, b, c, d;
shr.b32 down, $2, 4;
shl.b32 up, $2, 4;
lop3.b32 code, down, up, 0x0f0f0f0f, 0xe4;
and.b32 pick, code, 0x77777777;
shr.b32 half, code, 1;
lop3.b32 half, half, 0x44444444, 0x32103210, 0xea;
prmt.b32 a, $3, $4, pick;
prmt.b32 b, $5, $6, pick;
shr.b32 pick, pick, 16;
prmt.b32 c, $3, $4, pick;
prmt.b32 d, $5, $6, pick;
prmt.b32 $0, a, b, half;
shr.b32 half, half, 16;
prmt.b32 $1, c, d, half;
}""")

_TRANSPOSE = tl.constexpr("""{
.reg .b32 a, b, c, d;
prmt.b32 a, $4, $5, 0x5140;
prmt.b32 b, $6, $7, 0x5140;
prmt.b32 c, $4, $5, 0x7362;
prmt.b32 d, $6, $7, 0x7362;
prmt.b32 $0, a, b, 0x5410;
prmt.b32 $1, a, b, 0x7632;
prmt.b32 $2, c, d, 0x5410;
prmt.b32 $3, c, d, 0x7632;
}""")


@triton.jit
def packed(a, b, c, d):  # type: ignore[no-untyped-def]
    """Four float32 -> e4m3, a in the lowest byte; nearest, ties to even, what is too large is 448, NaN stays."""
    if INTERPRETED:
        return e4m3(a) | (e4m3(b) << 8) | (e4m3(c) << 16) | (e4m3(d) << 24)
    else:
        return tl.inline_asm_elementwise(_PACK, "=r,r,r,r,r", [a, b, c, d], tl.int32, is_pure=True, pack=1)


@triton.jit
def looked_up(codes, t0, t1, t2, t3):  # type: ignore[no-untyped-def]
    """Eight codes of a word -> two words, of the first four codes and the others, out of a table of 16 bytes."""
    if INTERPRETED:
        first = byte_of(codes >> 4, t0, t1, t2, t3) | (byte_of(codes, t0, t1, t2, t3) << 8)
        first |= (byte_of(codes >> 12, t0, t1, t2, t3) << 16) | (byte_of(codes >> 8, t0, t1, t2, t3) << 24)
        second = byte_of(codes >> 20, t0, t1, t2, t3) | (byte_of(codes >> 16, t0, t1, t2, t3) << 8)
        second |= (byte_of(codes >> 28, t0, t1, t2, t3) << 16) | (byte_of(codes >> 24, t0, t1, t2, t3) << 24)
        return first, second
    else:
        return tl.inline_asm_elementwise(
            _LOOK_UP, "=r,=r,r,r,r,r,r", [codes, t0, t1, t2, t3], (tl.int32, tl.int32), is_pure=True, pack=1
        )


@triton.jit
def transposed(a, b, c, d):  # type: ignore[no-untyped-def]
    """Four words -> their lowest bytes, their second, their third, their highest."""
    if INTERPRETED:
        return nth(a, b, c, d, 0), nth(a, b, c, d, 8), nth(a, b, c, d, 16), nth(a, b, c, d, 24)
    else:
        return tl.inline_asm_elementwise(
            _TRANSPOSE, "=&r,=&r,=&r,=&r,r,r,r,r", [a, b, c, d], (tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def e4m3(x):  # type: ignore[no-untyped-def]
    """float32 -> the byte, as int32."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # from 2^-6 on three bits of mantissa remain of 23, and the exponent's offset is 7 in place of 127
    large = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
    # below it, multiples of 2^-9: a sum with 2^23 has no bits for less than one
    small = (size.to(tl.float32, bitcast=True) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xFF
    found = tl.where(size < 0x3C800000, small, tl.minimum(large, 0x7E))
    return tl.where(size > 0x7F800000, 0x7F, found) | ((bits >> 24) & 0x80)


@triton.jit
def byte_of(code, t0, t1, t2, t3):  # type: ignore[no-untyped-def]
    is_odd = (code & 4) != 0
    word = tl.where((code & 8) != 0, tl.where(is_odd, t3, t2), tl.where(is_odd, t1, t0))
    return (word >> ((code & 3) * 8)) & 0xFF


@triton.jit  # type: ignore[untyped-decorator]
def nth(a, b, c, d, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    low = ((a >> SHIFT) & 0xFF) | (((b >> SHIFT) & 0xFF) << 8)
    return low | (((c >> SHIFT) & 0xFF) << 16) | (((d >> SHIFT) & 0xFF) << 24)
