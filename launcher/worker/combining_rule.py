"""How do task vectors become one, and what do the flags of `decompft combine` say of it?"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Literal

from decompft.launcher.errors import UserError

Method = Literal["average", "task-arithmetic", "ties", "dare"]
METHODS = ("nan", "average", "task-arithmetic", "ties", "dare")
LINEAR = ("average", "task-arithmetic")  # those that are sums of task vectors

# the fraction of a task vector's elements that is kept: k = 20 % in TIES, p = 0.9 in DARE
_DENSITY = {"ties": 0.2, "dare": 0.1}
# times n coefficients that sum to 1: task arithmetic is usually run with 0.3 for each part
_SCALE = {"average": "none", "task-arithmetic": "0.3n", "ties": "none", "dare": "0.3n"}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How task vectors become one."""

    method: Method
    weights: Literal["nan"] | tuple[float, ...]  # one a part, before `scale`
    scale: float = 1.0  # times the coefficients
    norm_of: Literal["task_vector", "full"] = "task_vector"  # of nan
    granularity: Literal["tensor", "model"] = "tensor"  # of nan
    density: float = 1.0  # of ties and dare: the fraction of elements that is kept
    seed: int = 0  # of dare


def rule_of(args: argparse.Namespace, num_parts: int) -> Rule:
    """The rule that the flags describe; `--method nan` is an average with NAN's coefficients.

    Raises:
        UserError: a value is out of range, or a flag does not belong to the method.
    """
    if num_parts < 2:
        raise UserError("only one adapter is given", "combine takes two or more")
    method: Method = "average" if args.method == "nan" else args.method
    given = args.coefficients or ("nan" if args.method == "nan" else "equal")
    if args.method == "nan" and given != "nan":
        raise UserError(
            f"--coefficients {given}: --method nan is an average with NAN's coefficients",
            "use --method average for other coefficients",
        )
    for name in ("norm_of", "granularity"):
        if getattr(args, name) is not None and given != "nan":
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag}: is NAN's", "add --coefficients nan, or leave it out")
    if args.density is not None and method not in _DENSITY:
        raise UserError(f"--density: is of ties and dare; {args.method} keeps every element", "leave it out")
    if args.density is not None and not 0 < args.density <= 1:
        raise UserError(f"--density {args.density:g}: must be above 0 and at most 1")
    if args.seed is not None and method != "dare":
        raise UserError(f"--seed: nothing in {args.method} is random", "leave it out")
    weights: Literal["nan"] | tuple[float, ...]
    weights = "nan" if given == "nan" else _weights(given, num_parts, method)
    default = _SCALE[method] if given in ("equal", "nan") else "none"
    return Rule(
        method=method,
        weights=weights,
        scale=_scale(args.scale or default, num_parts),
        norm_of=args.norm_of or "task_vector",
        granularity=args.granularity or "tensor",
        density=_DENSITY.get(method, 1.0) if args.density is None else args.density,
        seed=args.seed or 0,
    )


def _weights(given: str, num_parts: int, method: str) -> tuple[float, ...]:
    if given == "equal":
        return (1 / num_parts,) * num_parts
    try:
        weights = tuple(float(word) for word in given.split(","))
    except ValueError:
        weights = ()
    if not weights or not all(map(math.isfinite, weights)):
        raise UserError(f"--coefficients {given}: not equal, nan, or numbers like 0.3,0.7")
    if len(weights) != num_parts:
        raise UserError(
            f"--coefficients {given}: {len(weights)} numbers for {num_parts} adapters", "one each"
        )
    if method == "ties" and (min(weights) < 0 or not any(weights)):
        raise UserError(f"--coefficients {given}: ties weighs votes: none may be negative, nor all 0")
    if not any(weights):
        raise UserError(f"--coefficients {given}: all are 0: that is the base")
    if method != "average":
        return weights
    total = sum(weights)
    if total <= 0:
        raise UserError(
            f"--coefficients {given}: an average divides by their sum, which must be above 0",
            "use --method task-arithmetic for numbers that are taken as they are",
        )
    return tuple(weight / total for weight in weights)


def _scale(given: str, num_parts: int) -> float:
    """`none` is 1, `n` the number of parts, `0.3n` that many times 0.3, else a number."""
    number, parts = (given[:-1] or "1", num_parts) if given.endswith("n") else (given, 1)
    try:
        scale = 1.0 if given == "none" else float(number) * parts
    except ValueError:
        scale = math.nan
    if not (math.isfinite(scale) and scale > 0):
        raise UserError(f"--scale {given}: not none, n, or a number above 0 like 0.5 or 0.3n")
    return scale
