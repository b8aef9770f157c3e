"""What the launcher must know of a method without importing it, and how its options are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, IsFinite

Shapes = dict[str, tuple[int, ...]]

# what a number among the options may be: every one has a bound, and none may be nan or infinite (see Options)
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Finite = IsFinite[float]
Count = Annotated[int, Ge(1)]
CountOrZero = Annotated[int, Ge(0)]  # seeds, too


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """One method as a recipe sets it for a layer, with the method's own typed options."""

    method: str
    rank: int
    alpha: float
    dropout: float
    options: Any  # an instance of ADAPTER_SPECS[method].options


def _nothing(out: int, in_: int, config: AdapterConfig) -> Shapes:
    return {}


def _none(config: AdapterConfig) -> tuple[str, ...]:
    return ()


def _takes_all(out: int, in_: int, config: AdapterConfig, quantizes: bool) -> str:
    return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSpec:
    """One method. Functions of (out_features, in_features, config), because options change shapes."""

    name: str  # the key in a recipe
    title: str  # one line for tables: the formula
    source: str  # paper and equation
    impl: str  # "package.module:Class", resolved on a rank
    options: type[Any]  # frozen dataclass of the method's own options
    tensors: Callable[
        [int, int, AdapterConfig], Shapes
    ]  # trained tensor -> shape; A and B first if there are any
    # what does not train but belongs in the adapter's file: norms, thin factors of the base, the phase
    buffers: Callable[[int, int, AdapterConfig], Shapes] = _nothing
    # what is in no file, because it follows from the options, name and shape: `Adapter.derived` gives the values,
    # and layers that need the same share one tensor
    derived: Callable[[int, int, AdapterConfig], Shapes] = _nothing
    # facts taken of the base while it is loaded: "frobenius_norm", "row_norms", "column_norms", "zero_fraction" of the
    # weight that is used, "full_weight": `Adapter.facts_of` is shown the full-precision weight
    needs: Callable[[AdapterConfig], tuple[str, ...]] = _none
    # trained tensors whose gradient is exactly 0 at step 1
    zero_grad_at_start: Callable[[AdapterConfig], tuple[str, ...]] = _none
    # trained tensors that are `Factors.up` or `down` as they are: where a rank has them whole, copies of them in the
    # compute dtype lie beside (decompft.adapters.copies)
    thin_factors: Callable[[AdapterConfig], tuple[str, ...]] = _none
    # columns of `Factors.up`, for the forecast: what a token's thin product keeps
    num_columns: Callable[[int, int, AdapterConfig], int] = lambda out, in_, config: config.rank
    # alpha is in the formula
    has_alpha: Callable[[AdapterConfig], bool] = lambda config: True
    # a trained scale a row: a layer's unscaled output is kept for the backward pass
    keeps_output: Callable[[AdapterConfig], bool] = lambda config: False
    # the title of a layer with these options, where they choose between formulas; "" where there is one
    chosen_title: Callable[[AdapterConfig], str] = lambda config: ""
    is_reading: bool = False  # the paper's formula could not be read; ours is an interpretation
    mergeable: bool = True
    forbids_engines: tuple[str, ...] = ()
    # (out, in, config, whether loading quantizes) -> "KEY: why these options cannot be had there; what can", or ""
    refusal: Callable[[int, int, AdapterConfig, bool], str] = _takes_all

    def num_params(self, out: int, in_: int, config: AdapterConfig) -> int:
        """Trained numbers of one layer."""
        return count(self.tensors(out, in_, config))

    def num_rounded(self, out: int, in_: int, config: AdapterConfig) -> int:
        """Numbers of one layer's `thin_factors`."""
        shapes = self.tensors(out, in_, config)
        return count({name: shapes[name] for name in self.thin_factors(config)})


def count(shapes: Shapes) -> int:
    """Numbers in all tensors of these shapes."""
    total = 0
    for shape in shapes.values():
        numbers = 1
        for size in shape:
            numbers *= size
        total += numbers
    return total


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of every method's options: keys that the method does not have are refused, and nan and inf."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "strict": True,
        "allow_inf_nan": False,
    }


@dataclass(frozen=True, kw_only=True)
class NoOptions(Options):
    """A method without options of its own."""


@dataclass(frozen=True, kw_only=True)
class WrapperOptions(Options):
    """Of a method that changes another one; a subclass says in `over` which ones it takes."""

    over: str
    # not hashed: a frozen dataclass is hashed by its fields, and a mapping cannot be
    inner: dict[str, Any] = field(
        default_factory=dict, hash=False, metadata={"doc": "options of the method named by `over`"}
    )

    def __post_init__(self) -> None:
        # its defaults are filled in, so that an adapter's file says them all; by itself, for they may depend on another
        object.__setattr__(self, "inner", asdict(inner_options(self.over, self.inner)))


def inner_options(method: str, options: Mapping[str, Any]) -> Any:
    """The options of a wrapped method as its own dataclass; the recipe has checked names and types.

    Raises:
        TypeError: the method does not have one of them.
    """
    from decompft.adapters.spec import ADAPTER_SPECS  # which is made of the files that import this one

    return ADAPTER_SPECS[method].options(**options)


def inner_config(config: AdapterConfig) -> AdapterConfig:
    """A wrapper's config -> that of the method under it, on the same layer."""
    options = inner_options(config.options.over, config.options.inner)
    return replace(config, method=config.options.over, options=options)


def inner_refusal(out: int, in_: int, config: AdapterConfig, quantizes: bool) -> str:
    """`AdapterSpec.refusal` of a wrapper: that of the method under it, with the key where it is written."""
    from decompft.adapters.spec import spec_of  # which is made of the files that import this one

    inner = inner_config(config)
    refusal = spec_of(inner).refusal(out, in_, inner, quantizes)
    return refusal.replace("adapter.options.", "adapter.options.inner.", 1)


def doc(text: str, default: Any) -> Any:
    """An option with its one line of documentation."""
    return field(default=default, metadata={"doc": text})


def low_rank(out: int, in_: int, config: AdapterConfig) -> Shapes:
    """LoRA's two factors: A (rank, in), B (out, rank)."""
    return {"A": (config.rank, in_), "B": (out, config.rank)}


def names(*tensors: str) -> Callable[[AdapterConfig], tuple[str, ...]]:
    """The same answer whatever the options."""
    return lambda config: tensors
