"""Random numbers that are a pure function of a key and an index: equal on every device and with every torch."""

from __future__ import annotations

import hashlib

from torch import Tensor


def key_of(text: str) -> int:
    """A key for `uniform`: 64 bits, signed."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def uniform(index: Tensor, key: int) -> Tensor:
    """int64 (n,) -> float32 (n,) in [0, 1): splitmix64's finaliser, 24 of its bits. Overwrites `index`."""
    x = index.add_(key)
    for multiplier in (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):
        x.mul_(multiplier)
        x.bitwise_xor_((x >> 31) & 0x1FFFFFFFF)
    return ((x >> 40) & 0xFFFFFF).float().mul_(2.0**-24)
