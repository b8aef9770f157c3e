"""A method's option out of its range, or without effect, is refused before anything starts, where it is written."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

import planning
import pytest
from annotated_types import Ge, Gt, Interval, Le, Lt, Predicate
from planning import DENSE, TINY
from test_recipe_source import GOOD, error, of

from decompft.adapters.spec import ADAPTER_SPECS
from decompft.launcher.errors import PlanError

BOUNDS = (Ge, Gt, Le, Lt, Interval, Predicate)


def numbers(annotation: Any, marks: tuple[Any, ...] = ()) -> list[tuple[type, tuple[Any, ...]]]:
    """The number types that an option may be, with what is annotated to each."""
    if typing.get_origin(annotation) is typing.Annotated:
        return numbers(annotation.__origin__, (*marks, *annotation.__metadata__))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [found for branch in typing.get_args(annotation) for found in numbers(branch, marks)]
    return [(annotation, marks)] if annotation in (int, float) else []


OPTIONS = [
    (name, field.name, kind, marks)
    for name, spec in ADAPTER_SPECS.items()
    for hints in [typing.get_type_hints(spec.options, include_extras=True)]
    for field in dataclasses.fields(spec.options)
    for kind, marks in numbers(hints[field.name])
]


def test_every_number_among_the_options_has_a_bound() -> None:
    assert {("map", "eps"), ("mpc_o", "weight"), ("svft", "off_diag")} <= {(o[0], o[1]) for o in OPTIONS}
    bare = [
        f"{name}.{option}"
        for name, option, _, marks in OPTIONS
        if not any(isinstance(m, BOUNDS) for m in marks)
    ]
    assert bare == []


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_no_number_among_the_options_may_be_infinite_or_nan(value: str) -> None:
    for name, option, kind, _ in OPTIONS:
        told = error(GOOD, f"adapter.method={name}", f"adapter.options.{option}={value}").message
        words = "a finite number" if kind is float else "a whole number"
        assert f": adapter.options.{option}: found " in told and f"expected {words}" in told


@pytest.mark.parametrize(
    ("method", "option", "value", "bound"),
    [
        ("lora", "lr_ratio", "0", "more than 0"),
        ("lora", "loftq_iterations", "0", "at least 1"),
        ("hira", "lr_ratio", "-1.0", "more than 0"),
        ("liera", "clamp", "0", "more than 0"),
        ("vera", "seed", "-1", "at least 0"),
        ("vera", "d_init", "0", "more than 0"),
        ("delora", "lambda_init", "0", "more than 0"),
        ("delora", "eps", "0", "more than 0"),
        ("delora", "lambda_lr_ratio", "-2", "more than 0"),
        ("dora", "lr_ratio", "-1", "more than 0"),
        ("dora", "magnitude_lr_ratio", "0", "more than 0"),
        ("map", "eps", "-1e-6", "more than 0"),
        ("map", "b_warmup_steps", "-1", "at least 0"),
        ("map", "settle_norm", "-1.0", "at least 0"),
        ("map", "lr_ratio", "-1.0", "more than 0"),
        ("map", "magnitude_lr_ratio", "0", "more than 0"),
        ("mpc_o", "weight", "-0.1", "at least 0"),
        ("mpc_d", "weight", "-0.1", "at least 0"),
        ("speclora", "k", "0", "at least 1"),
        ("speclora", "m_lr_ratio", "0", "more than 0"),
        ("svft", "k", "-1", "at least 0"),
    ],
)
def test_an_option_out_of_its_range_is_refused(method: str, option: str, value: str, bound: str) -> None:
    told = error(GOOD, f"adapter.method={method}", f"adapter.options.{option}={value}").message
    found = int(value) if value.lstrip("-").isdigit() else float(value)
    words = f": adapter.options.{option}: {found} is out of range, it must be {bound}"
    assert told.removesuffix(".0").endswith(words)


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [("map", "settle_norm", "0"), ("mpc_o", "weight", "0"), ("svft", "k", "0")],
)
def test_what_is_on_the_bound_is_taken(method: str, option: str, value: str) -> None:
    section = of(GOOD, f"adapter.method={method}", f"adapter.options.{option}={value}").adapter
    assert getattr(section.typed_options(), option) == 0


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["adapter.options.inner.lr_ratio=-1.0"],
            "adapter.options.inner.lr_ratio: -1.0 is out of range, it must be more than 0.0",
        ),
        (
            ["adapter.method=mpc_o", "adapter.options={over: map, inner: {over: dora, inner: {lr_ratio: .nan}}}"],
            "adapter.options.inner.inner.lr_ratio: found nan, expected a finite number",
        ),
        (
            ["adapter.overrides=[{targets: q_proj, method: delora, options: {eps: 0.0}}]"],
            "adapter.overrides[0].options.eps: 0.0 is out of range, it must be more than 0.0",
        ),
        (  # without a method of its own: the section's
            ["adapter.overrides=[{targets: k_proj, rank: 2}, {targets: q_proj, options: {eps: -1.0}}]"],
            "adapter.overrides[1].options.eps: -1.0 is out of range, it must be more than 0.0",
        ),
        (
            ["adapter.options.over=dora",
             "adapter.overrides=[{targets: q_proj, options: {inner: {magnitude_lr_ratio: text}}}]"],
            "adapter.overrides[0].options.inner.magnitude_lr_ratio: found the text 'text', expected a number",
        ),
    ],
)  # fmt: skip
def test_below_other_options_the_place_is_named_whole(overrides: list[str], told: str) -> None:
    assert error(GOOD, *overrides).message.endswith(f": {told}")


def test_an_option_of_an_override_is_found_in_the_file() -> None:
    text = GOOD.replace("  rank: 8\n", "  overrides:\n    - targets: q_proj\n      options: {eps: 0}\n")
    assert error(text).message.startswith("r.yaml:7:22: adapter.overrides[0].options.eps: 0 is out of range")


def test_a_clamp_of_the_first_order_is_refused() -> None:
    liera = ("adapter.method=liera", "adapter.options.clamp=3.0")
    assert "adapter.options: clamp has no effect without order: exact" in error(GOOD, *liera).message
    assert of(GOOD, *liera, "adapter.options.order=exact").adapter.typed_options().clamp == 3.0


@pytest.mark.parametrize("method", ["mpc_o", "mpc_d"])
def test_what_the_method_below_refuses_is_refused_when_planning(method: str) -> None:
    adapter = {"method": method, "options": {"inner": {"init": "loftq"}}}
    refused = r"adapter.options.inner.init: loftq .* loses nothing \(model.layers.0"
    with pytest.raises(PlanError, match=refused):
        planning.make(planning.CPU, TINY, adapter=adapter, **DENSE)
    quantized = DENSE | {"quantization": {"format": "nf4"}}
    assert planning.make(planning.CPU, TINY, adapter=adapter, **quantized)
