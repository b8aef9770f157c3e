"""Claims of a drill and their verdicts, among them: does a broken run end as the unbroken one did?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from decompft.launcher.drill_adapters import compare_adapters
from decompft.launcher.drill_watch import steps
from decompft.launcher.runs import RunDir

Result = Literal["holds", "FAILS", "not applicable"]

# Largest relative difference that a GPU is allowed, where sums are added in any order, by dtype of computing.
# Of a loss: the parity tests' caps. Of a tensor: Adam turns the sign of a tiny gradient into a whole step, so
# a few steps in bfloat16 leave some percent: 14 in the farthest of 448 tensors of a 7B, resumed after 7 of 12 steps on
# two H200, with losses 3e-4 apart. Moments or a rank's part that were lost leave far more, in the losses too.
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
TENSOR_TOLERANCE = {"float32": 1e-2, "bfloat16": 3e-1}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One claim: a row of the table."""

    part: str  # of the drill: what was done to the run
    claim: str
    measured: str
    result: Result
    numbers: dict[str, float] = field(default_factory=dict)  # what was measured, units in the key


def judge(part: str, claim: str, is_true: bool, measured: str, **numbers: float) -> Verdict:
    return Verdict(
        part=part, claim=claim, measured=measured, result="holds" if is_true else "FAILS", numbers=numbers
    )


def not_applicable(part: str, claim: str, reason: str) -> Verdict:
    return Verdict(part=part, claim=claim, measured=reason, result="not applicable")


FINISHES = "the resumed run reaches its last step"
LOSSES = "the losses are the unbroken run's"
SAMPLES = "no sample is lost, seen twice or moved"
ADAPTERS = "the adapter is the unbroken run's"


def same_end(part: str, unbroken: RunDir, broken: RunDir, *, failure: str = "") -> list[Verdict]:
    """Compare a run that was broken and continued with one that was not.

    Args:
        failure: why the continued run did not finish, in words; "" when it did.
    """
    if failure:
        return [judge(part, FINISHES, False, failure), *no_end(part, "the resumed run did not finish")[1:]]
    plan = unbroken.read_plan()
    compute = plan.recipe.quantization.activations
    is_exact = plan.world.device == "cpu" or plan.recipe.train.deterministic
    return [
        judge(part, FINISHES, True, f"step {max(steps(broken), default=0)}"),
        _losses(part, unbroken, broken, 0.0 if is_exact else LOSS_TOLERANCE[compute]),
        _samples(part, unbroken, broken),
        _adapters(part, unbroken, broken, 0.0 if is_exact else TENSOR_TOLERANCE[compute]),
    ]


def no_end(part: str, reason: str) -> list[Verdict]:
    """The same rows, when nothing was resumed."""
    return [not_applicable(part, claim, reason) for claim in (FINISHES, LOSSES, SAMPLES, ADAPTERS)]


def _losses(part: str, unbroken: RunDir, broken: RunDir, tolerance: float) -> Verdict:
    before, after = steps(unbroken), steps(broken)
    if gap := _missing(before.keys(), after.keys()):
        return judge(part, LOSSES, False, gap)
    worst, at, expected, found = 0.0, 0, 0.0, 0.0
    for step, row in before.items():
        one, two = _number(row["loss"]), _number(after[step]["loss"])
        apart = abs(two - one) / abs(one) if one and math.isfinite(one + two) else math.inf
        if one != two and apart > worst:
            worst, at, expected, found = apart, step, one, two
    if not at:
        return judge(part, LOSSES, True, f"{len(before)} of {len(before)} steps bit for bit", loss_apart=0.0)
    measured = f"step {at} is the farthest: {found:.8g}, not {expected:.8g}, relative {worst:.1e}"
    measured += f" (allowed on a GPU: {tolerance:.0e})" if tolerance else " (here they are equal)"
    return judge(part, LOSSES, worst <= tolerance, measured, loss_apart=worst)


def _samples(part: str, unbroken: RunDir, broken: RunDir) -> Verdict:
    """The rows trained on, the place in the data and the number of trained tokens: equal on any device."""
    before, after = steps(unbroken), steps(broken)
    if gap := _missing(before.keys(), after.keys()):
        return judge(part, SAMPLES, False, gap)
    for step, row in before.items():
        for key in ("samples", "trained_tokens", "epoch"):
            if row.get(key) != after[step].get(key):
                return judge(
                    part, SAMPLES, False, f"step {step}: {key} {after[step].get(key)}, not {row.get(key)}"
                )
    measured = f"{len(before)} of {len(before)} steps trained on the same rows, as many tokens of them"
    return judge(part, SAMPLES, True, measured)


def _adapters(part: str, unbroken: RunDir, broken: RunDir, tolerance: float) -> Verdict:
    files = [run.path / "adapter" / "adapter.safetensors" for run in (unbroken, broken)]
    found = compare_adapters(*files)
    if found.problem:
        return judge(part, ADAPTERS, False, found.problem)
    if found.is_same:
        return judge(part, ADAPTERS, True, "the same bytes (sha256)", tensor_apart=0.0)
    measured = f"{found.tensor} is the farthest: relative {found.largest:.1e}"
    measured += f" (allowed on a GPU: {tolerance:.0e})" if tolerance else " (here they are equal)"
    return judge(part, ADAPTERS, found.largest <= tolerance, measured, tensor_apart=found.largest)


def _missing(before: Iterable[int], after: Iterable[int]) -> str:
    expected, found = set(before), set(after)
    if expected == found:
        return ""
    lost, extra = sorted(expected - found), sorted(found - expected)
    told = [
        f"{what} {', '.join(map(str, some[:5]))}" for what, some in (("lacks", lost), ("adds", extra)) if some
    ]
    return f"of the steps it {' and '.join(told)}"


def _number(value: float | None) -> float:
    return math.nan if value is None else value  # null stands for a loss that was not finite
