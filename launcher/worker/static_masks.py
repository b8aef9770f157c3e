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
def static_masks() -> Iterator[None]:
    """In this block masks depend on shapes alone, captured or not.

    Rows of one document each still need no mask. Positions are taken to be those of packed documents, as in a batch
    they are; a padding mask is taken to hide something.
    """
    from transformers import masking_utils, modeling_utils  # 2 s

    # GPT-2's warning of padding that no mask hides looks into the tokens
    modules = (masking_utils, modeling_utils)
    before = [m.is_tracing for m in modules]
    for module in modules:
        # asked with a tensor, it decides whether that is read; without one, whether a mask may be left out
        module.is_tracing = _would_be_read
    try:
        yield
    finally:
        for module, tracing in zip(modules, before, strict=True):
            module.is_tracing = tracing


def _would_be_read(tensor: Tensor | None = None) -> bool:
    return tensor is not None
