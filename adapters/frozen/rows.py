"""How packed rows are held: bytes viewed as bfloat16, so that every engine can shard them by rows.

FSDP2 of torch 2.11 refuses integer parameters, so bytes are stored under a floating dtype. Their
bits may spell NaN: these tensors take part in no arithmetic, cast or finite check.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

# numbers quantized at once: the temporaries of quantizing them (CPU, fp4, the worst) come to 43 MiB
CHUNK_NUMBERS = 1 << 20


def bytes_parameter(num_rows: int, row_bytes: int) -> nn.Parameter:
    """A frozen parameter of `num_rows` rows; `row_bytes` is even."""
    return nn.Parameter(torch.empty(num_rows, row_bytes // 2, dtype=torch.bfloat16), requires_grad=False)


def as_bytes(tensor: Tensor) -> Tensor:
    """Any rows (n, k) -> the same bits as storage."""
    return tensor.contiguous().view(torch.bfloat16)


def as_float32(storage: Tensor) -> Tensor:
    """Storage of float32 numbers -> (n, k) float32, a view where it can be one."""
    # a slice of a flat buffer may start between two float32
    aligned = storage.storage_offset() % 2 == 0
    return (storage if aligned else storage.clone()).view(torch.float32)


def float_chunks(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Whole rows in chunks of at most CHUNK_NUMBERS (or one row), in float32, and where they lie."""
    size = max(1, CHUNK_NUMBERS // rows.shape[1])
    for first in range(0, rows.shape[0], size):
        where = slice(first, first + size)
        yield where, rows[where].float().contiguous()


def load_operators() -> None:
    import bitsandbytes  # noqa: F401  registers torch.ops.bitsandbytes; 3 s, so only where it is used
