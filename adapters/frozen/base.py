"""What an adapter may ask of its frozen base: the one seam between methods and storage formats.

Shapes: x (..., in), weight (out, in), y (..., out). Every storage tensor of a format has `out`
rows, so that sharding, slicing and checkpoints work on dimension 0 and never know the format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from decompft.adapters.kernels.changed import Change
from decompft.adapters.kernels.fp8 import Rows, quantize_rows

if TYPE_CHECKING:
    from decompft.adapters.joint import Joint


class Products(Protocol):
    """Another way to multiply than in the activations' dtype; arguments as of `FrozenLinear.product`."""

    def forward(
        self,
        base: FrozenLinear,
        x_TI: Tensor,
        storage: tuple[Tensor, ...],
        scale: Tensor | None,
        weight: Tensor | None,
    ) -> Tensor: ...

    def backward(
        self,
        base: FrozenLinear,
        g_TO: Tensor,
        storage: tuple[Tensor, ...],
        scale: Tensor | None,
        weight: Tensor | None,
    ) -> Tensor: ...


def weight_times(weight: Tensor, A: Tensor) -> Tensor:
    """W A^T (out, rank) in A's dtype, A (rank, in) rounded to the dtype of `weight` (out, in)."""
    rounded = A.to(weight.dtype)
    if weight.is_cuda and weight.itemsize == 2:
        return torch.mm(weight, rounded.T, out_dtype=torch.float32)  # which only CUDA has
    return (weight @ rounded.T).to(A.dtype)


class FrozenLinear(nn.Module):
    """A linear layer whose weight never trains.

    A format is a subclass that says how rows are packed and unpacked; products, bias and
    adapters are the same for all.
    """

    # whether something may write over an output before its backward pass: then it is not kept by reference
    output_is_overwritten = False
    joint: Joint | None = None  # the linears that it may compute with
    # the last of a block that is run again, whose output nothing in the block saves
    ends_block = False

    def __init__(self, in_features: int, out_features: int, *, bias_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.transposed = False  # its checkpoint stores (in, out)
        self.products: Products | None = None  # None: the format's own, in the activations' dtype
        self.bias: nn.Parameter | None = None
        if bias_dtype is not None:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=bias_dtype), requires_grad=False)

    def storage_names(self) -> tuple[str, ...]:
        """Names of the parameters that hold the packed weight, in the order `unpack` takes them."""
        raise NotImplementedError

    def pack(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Dense rows (n, in) -> contiguous storage tensors of n rows each, in `storage_names` order."""
        raise NotImplementedError

    def unpack(self, storage: tuple[Tensor, ...], dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
        """Storage tensors with n rows -> dense (n, in), times `scale`, (1,) or (n, 1), rounded once to `dtype`."""
        raise NotImplementedError

    def unpack_changed(
        self, storage: tuple[Tensor, ...], dtype: torch.dtype, change: Change, slope: Tensor | None = None
    ) -> Tensor | None:
        """All rows times their change, weight by weight, in one launch; None where no kernel of ours does that.

        Args:
            slope: dL/dW* (out, in) in `dtype`, contiguous: then it becomes dL/dD, in place, and is returned.
        """
        return None

    def folds(self, storage: tuple[Tensor, ...]) -> bool:
        """Whether a scale near 1 survives when rows times it are rounded."""
        return self.products is not None or self.is_off_grid(storage)

    def is_off_grid(self, storage: tuple[Tensor, ...]) -> bool:
        """Whether rows times a scale near 1 differ from the rows once they are rounded; a quantized weight's do."""
        return True

    def adds(self, storage: tuple[Tensor, ...], scale: Tensor | None) -> bool:
        """Whether `product` without `weight` adds to `into_TO` as it multiplies, and not in a pass of its own."""
        return self.products is None

    @property
    def adds_back(self) -> bool:
        """Whether `product_back` adds to `into_TI` as it multiplies."""
        return self.products is None

    def product(
        self,
        x_TI: Tensor,
        storage: tuple[Tensor, ...],
        scale: Tensor | None,
        weight: Tensor | None = None,
        into_TO: Tensor | None = None,
    ) -> Tensor:
        """x (tokens, in) -> scale W x (tokens, out) in x's dtype, in memory of its own; not seen by autograd.

        The members of one autograd node are given the same x_TI, the very object, one after the other.

        Args:
            scale: (1,), or None for 1; (out, 1) where the format `folds` and without `weight`.
            weight: W unpacked already, in x's dtype.
            into_TO: what the product is added to, in place and returned; default memory of its own. Only where this
                `adds`.
        """
        assert into_TO is None or (weight is None and self.adds(storage, scale))
        if self.products is not None:
            return self.products.forward(self, x_TI, storage, scale, weight)
        return self.own_product(x_TI, storage, scale, weight, into_TO)

    def own_product(
        self,
        x_TI: Tensor,
        storage: tuple[Tensor, ...],
        scale: Tensor | None,
        weight: Tensor | None,
        into_TO: Tensor | None = None,
    ) -> Tensor:
        """`product` in x's dtype."""
        if weight is None:
            weight_IO = self.unpack(storage, x_TI.dtype, scale).T
            return x_TI @ weight_IO if into_TO is None else into_TO.addmm_(x_TI, weight_IO)
        y_TO = x_TI @ weight.T
        return y_TO if scale is None else y_TO.mul_(scale)

    def product_back(
        self,
        g_TO: Tensor,
        storage: tuple[Tensor, ...],
        scale: Tensor | None,
        weight: Tensor | None = None,
        into_TI: Tensor | None = None,
    ) -> Tensor:
        """g (tokens, out) -> g (scale W) (tokens, in), the backward pass of `product`; arguments as there.

        Args:
            weight: W unpacked already, in g's dtype; then `scale` is None.
            into_TI: what the product is added to, in place and returned; default memory of its own.
        """
        if self.products is not None:
            found = self.products.backward(self, g_TO, storage, scale, weight)
            return found if into_TI is None else into_TI.add_(found)
        weight = self.unpack(storage, g_TO.dtype, scale) if weight is None else weight
        return g_TO @ weight if into_TI is None else into_TI.addmm_(g_TO, weight)

    def times(self, storage: tuple[Tensor, ...], A: Tensor, dtype: torch.dtype) -> Tensor:
        """W A^T (out, rank) in A's dtype or wider, of A (rank, in) rounded to `dtype`, as W is."""
        return weight_times(self.unpack(storage, dtype), A)

    def fp8_rows(self, storage: tuple[Tensor, ...], weight: Tensor | None = None) -> Rows:
        """W (out, in) in e4m3 with a scale an output row.

        Args:
            weight: W unpacked already.
        """
        return quantize_rows(self.unpack(storage, torch.bfloat16) if weight is None else weight)

    def fp8_columns(self, storage: tuple[Tensor, ...], weight: Tensor | None = None) -> Rows:
        """W transposed (in, out), contiguous, in e4m3 with a scale an input; `weight` as in `fp8_rows`."""
        wide = self.unpack(storage, torch.bfloat16) if weight is None else weight
        tall = wide.T.contiguous()
        del wide  # one copy at a time, but for what the caller holds
        return quantize_rows(tall)

    def storage(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.storage_names())

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight that is really used, (out, in); for a quantized base the dequantized one."""
        return self.unpack(self.storage(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        # here and not at the top: linear.py needs this class
        from decompft.adapters.frozen.linear import frozen_linear

        if self.joint is not None and (y := self.joint.output(self, x)) is not None:
            return y
        return frozen_linear(x, self)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, bias={self.bias is not None}"
