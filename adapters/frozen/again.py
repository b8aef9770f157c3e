"""Is a forward pass being run again in the backward pass, for what it saves and not for what it gives?

Under full recomputation a block is run again until all is there that its backward pass reads. Its last linear is then
run for its input and its thin branch alone: nobody reads its output, so that the product, a fifth of a block's, is left
out (linear.py).
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

_here = threading.local()  # a backward pass has a thread of its own


def is_running_again() -> bool:
    return getattr(_here, "depth", 0) > 0


def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """`context_fn` of torch.utils.checkpoint.checkpoint: around the first run, and around the second."""
    return nullcontext(), _Again()


class _Again:
    """May be entered several times: by a backward pass that is repeated."""

    def __enter__(self) -> None:
        _here.depth = getattr(_here, "depth", 0) + 1

    def __exit__(self, *_: object) -> None:
        _here.depth -= 1
