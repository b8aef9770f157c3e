"""Liger's kernels write over what they are given: its rotary over q and k, its activation's gradient over gate and up.

That is harmless unless somebody keeps those arrays, as the linears of a row-scaled adapter do for the gradient of
their scales (adapters/frozen/linear.py). Then the kernels get copies: of q and k, which live on, and of gate and up in
the backward pass, which do not.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

# module under liger_kernel.ops -> function -> how many leading arrays it writes over
_OVERWRITE = {
    "rope": {"rope_forward": 2},
    "swiglu": {"swiglu_backward": 2},
    "geglu": {"geglu_backward": 2},
}
_wrapped: set[str] = set()
_keeps = False


def keep_outputs(keeps: bool) -> bool:
    """From now on in this process; False where it is asked for and Liger is not as it was when this was written."""
    global _keeps
    _keeps = keeps
    if not keeps:
        return True
    try:
        found = [
            (importlib.import_module(f"liger_kernel.ops.{module}"), name, count)
            for module, names in _OVERWRITE.items()
            for name, count in names.items()
        ]
        functions = [getattr(module, name) for module, name, _ in found]
    except (ImportError, AttributeError):
        return False
    for (module, name, count), function in zip(found, functions, strict=True):
        if name not in _wrapped:
            setattr(module, name, _on_copies(function, count))
            _wrapped.add(name)
    return True


def _on_copies(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if _keeps:
            args = (*(a.clone() for a in args[:count]), *args[count:])
        return function(*args, **kwargs)

    return call
