"""Attention masks whose making reads no value of a tensor on the host.

transformers looks into positions and padding to find a mask that may be left out, but not where it believes to be
traced, and it believes so while a CUDA stream is captured: there it would make the mask even of rows without padding,
which then lose flash attention. Here it looks nowhere, and leaves out what is known without looking.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def static_masks(*, is_packed: bool) -> Iterator[None]:
    """In this block masks depend on shapes alone, captured or not.

    Args:
        is_packed: the positions that are given are those of packed documents. Otherwise rows are of one document each
            and need no mask; a padding mask is taken to hide something.
    """
    from transformers import masking_utils, modeling_utils  # 2 s

    # GPT-2's warning of padding that no mask hides looks into the tokens
    modules = (masking_utils, modeling_utils)
    before = [m.is_tracing for m in modules]
    find = masking_utils.find_packed_sequence_indices
    if not is_packed:  # a model that is given no positions makes its own, and would look into those
        masking_utils.find_packed_sequence_indices = _none_is_packed
    for module in modules:
        # asked with a tensor, it decides whether that is read; without one, whether a mask may be left out
        module.is_tracing = _would_be_read
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find
        for module, tracing in zip(modules, before, strict=True):
            module.is_tracing = tracing


def _none_is_packed(position_ids: Tensor) -> None:
    return None


def _would_be_read(tensor: Tensor | None = None) -> bool:
    return tensor is not None
