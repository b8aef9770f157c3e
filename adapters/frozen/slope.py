"""The slope of an x that several linears read, summed where it lies.

Shapes: T tokens, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Slope:
    """dx (T, in), as the members add to it one by one; None where nobody needs it."""

    def __init__(self, x_TI: Tensor, is_needed: bool, start_TI: Tensor | None) -> None:
        """`start_TI` is written to."""
        self.x_TI = x_TI
        self.sum_TI = start_TI
        self._is_needed = is_needed

    def add(self, product: Callable[[Tensor | None], Tensor]) -> None:
        """What `product` adds to its argument, or makes where there is none."""
        if self._is_needed:
            self.sum_TI = product(self.sum_TI)

    def add_own(self, own_TI: Tensor) -> None:
        """What has been made already; it may be written to from here on."""
        if self._is_needed:
            self.sum_TI = own_TI if self.sum_TI is None else self.sum_TI.add_(own_TI)
