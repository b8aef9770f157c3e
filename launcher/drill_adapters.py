"""Do two adapters hold the same numbers, and if not, how far apart are they? Without torch."""

from __future__ import annotations

import hashlib
import math
import operator
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path

from decompft.launcher.errors import ModelError
from decompft.launcher.safetensors_header import Stored, read_header


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Between two adapter files."""

    is_same: bool  # byte for byte
    largest: float = 0.0  # norm of a tensor's difference over its norm, of the worst tensor
    tensor: str = ""  # the worst one
    problem: str = ""  # they cannot be compared, in words


def compare_adapters(expected: Path, found: Path) -> Difference:
    """Compare two adapter.safetensors."""
    for path in (expected, found):
        if not path.is_file():
            return Difference(is_same=False, problem=f"{path} is missing")
    if _sha256(expected) == _sha256(found):
        return Difference(is_same=True)
    try:
        before, after = read_header(expected), read_header(found)
    except ModelError as error:
        return Difference(is_same=False, problem=error.message)
    odd = sorted(before.keys() ^ after.keys())
    if odd:
        return Difference(is_same=False, problem=f"only one of them has {odd[0]}")
    worst = Difference(is_same=False)
    for name, stored in before.items():
        other = after[name]
        if (stored.dtype, stored.shape) != (other.dtype, other.shape):
            return Difference(is_same=False, problem=f"{name} differs in shape or dtype")
        distance = _distance(stored, other)
        if distance > worst.largest:
            worst = Difference(is_same=False, largest=distance, tensor=name)
    return worst


def _distance(stored: Stored, other: Stored) -> float:
    first, second = _bytes(stored), _bytes(other)
    if first == second:
        return 0.0
    a, b = _numbers(first, stored.dtype), _numbers(second, stored.dtype)
    if a is None or b is None:
        return math.inf  # whole numbers: they should not move at all
    gap = list(map(operator.sub, b, a))
    norm = math.sqrt(sum(map(operator.mul, a, a)))
    distance = math.sqrt(sum(map(operator.mul, gap, gap))) / norm if norm else math.inf
    return math.inf if math.isnan(distance) else distance


def _numbers(data: bytes, dtype: str) -> array[float] | None:
    if dtype == "BF16":
        # the upper half of a float32
        wide = bytearray(2 * len(data))
        wide[2::4], wide[3::4] = data[0::2], data[1::2]
        data, dtype = bytes(wide), "F32"
    if dtype not in ("F32", "F64"):
        return None
    numbers = array("f" if dtype == "F32" else "d", data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _bytes(stored: Stored) -> bytes:
    with stored.path.open("rb") as file:
        file.seek(stored.start)
        return file.read(stored.num_bytes)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
