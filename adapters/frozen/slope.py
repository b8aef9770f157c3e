"""The slope of an x that several linears read, summed where it lies, or in one pass over all their parts of it.

Shapes: T tokens, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from decompft.adapters.kernels import combine
from decompft.adapters.kernels.columns import dot

if TYPE_CHECKING:
    from decompft.adapters.frozen.thin import Back


class Slope:
    """dx (T, in), as the members add to it one by one; None where nobody needs it.

    In one pass at the end, there are at most `combine.MOST` parts aside: one more than where they are added at once.
    """

    def __init__(
        self, x_TI: Tensor, is_needed: bool, start_TI: Tensor | None, *, in_one_pass: bool = False
    ) -> None:
        """`start_TI` is written to; `in_one_pass`: where `combine.fits`."""
        self.x_TI = x_TI
        self.sum_TI = start_TI
        self.dots: list[Tensor] = []  # by the places of `dot_and_add`; whole after `finish`
        self._is_needed = is_needed
        self._in_one_pass = is_needed and in_one_pass
        self._aside: list[tuple[Tensor, int | None]] = []

    def add(self, product: Callable[[Tensor | None], Tensor], *, adds: bool) -> None:
        """What `product` adds to its argument, as it multiplies if it `adds`, or makes where there is none."""
        if not self._is_needed:
            return
        if self._in_one_pass and not adds:
            self.add_own(product(None))
            return
        if self.sum_TI is None:
            self._make_room()
        self.sum_TI = product(self.sum_TI)

    def add_own(self, own_TI: Tensor) -> None:
        """What has been made already; it may be written to from here on."""
        if self._in_one_pass:
            self._put_aside(own_TI, None)
        elif self._is_needed:
            self.sum_TI = own_TI if self.sum_TI is None else self.sum_TI.add_(own_TI)

    def dot_and_add(self, own_TI: Tensor) -> int:
        """`add_own`; the place in `dots` of <own, x> ()."""
        place = len(self.dots)
        if self._in_one_pass:
            self.dots.append(own_TI)  # until it is known
            self._put_aside(own_TI, place)
        else:
            self.dots.append(dot(self.x_TI, own_TI))
            self.add_own(own_TI)
        return place

    def finish(self, thin: Back | None) -> None:
        """Add the thin branches' part, too, if there is one; then all is whole."""
        if self._aside:
            self._combine(None if thin is None else thin.factors())
        elif thin is not None:
            thin.add_to(self.sum_TI)

    def _put_aside(self, own_TI: Tensor, place: int | None) -> None:
        self._make_room()
        self._aside.append((own_TI, place))

    def _make_room(self) -> None:
        if len(self._aside) + (self.sum_TI is not None) == combine.MOST:
            self._combine(None)

    def _combine(self, thin: combine.Product | None) -> None:
        parts, self._aside = self._aside, []
        if self.sum_TI is not None:
            parts.append((self.sum_TI, None))
        owns, wants_dots = [own for own, _ in parts], any(place is not None for _, place in parts)
        self.sum_TI = owns[0]
        if len(owns) == 1 and thin is None and not wants_dots:
            return
        dots = combine.add_(owns, self.x_TI if wants_dots else None, thin)
        for m, (_, place) in enumerate(parts):
            if place is not None and dots is not None:
                self.dots[place] = dots[m]
