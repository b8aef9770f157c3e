"""The slope of an x that several linears read, summed where it lies.

Shapes: T tokens, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from decompft.adapters.kernels.columns import dot

# adds to its argument and returns it, or makes what it would add
Product = Callable[[Tensor | None], Tensor]


class Slope:
    """dx (T, in), as the members add to it one by one."""

    def __init__(self, x_TI: Tensor, is_needed: bool, start_TI: Tensor | None) -> None:
        """`start_TI` is written to."""
        self.x_TI = x_TI
        self.sum_TI = start_TI
        self._is_needed = is_needed
        # <dx, x>; None where it is not known
        self._dot: Tensor | float | None = 0.0 if start_TI is None else None

    def add(self, product: Product) -> None:
        if self._is_needed:
            self.sum_TI = product(self.sum_TI)
        self._dot = None

    def add_own(self, own_TI: Tensor) -> None:
        """What has been made already; it may be written to from here on."""
        self.sum_TI, self._dot = own_TI if self.sum_TI is None else self.sum_TI.add_(own_TI), None

    def add_and_dot(self, product: Product) -> Tensor:
        """As `add`; returns <what was added, x> (), float32 or better.

        The difference between two sums, whether dx is needed or not, so that the number is the same. In bfloat16 its
        error is what rounding dx leaves, up to twice that of a product rounded by itself: 1e-3 of a slope between
        numbers that have nothing to do with each other, 1,024 inputs and 2,048 tokens.
        """
        if self._dot is None:
            own_TI = product(None)
            found = dot(self.x_TI, own_TI)
            self.add_own(own_TI)
            return found
        before = self._dot
        self.sum_TI = product(self.sum_TI)
        self._dot = dot(self.x_TI, self.sum_TI)
        return self._dot - before
