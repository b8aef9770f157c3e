"""The flags of combine: what they stand for, and which of them nothing would read."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from decompft.launcher.errors import UserError
from decompft.launcher.worker.combining_rule import Rule, rule_of
from decompft.launcher.worker.tools.combine import main


def rule(method, num_parts=2, **given):
    names = ("coefficients", "norm_of", "granularity", "scale", "density", "seed")
    return rule_of(argparse.Namespace(method=method, **dict.fromkeys(names) | given), num_parts)


def test_defaults_are_those_of_the_papers():
    assert rule("nan") == Rule(method="average", weights="nan", scale=1.0)
    assert rule("average", 4) == Rule(method="average", weights=(0.25,) * 4, scale=1.0)
    found = rule("task-arithmetic", 8)
    assert [found.scale * weight for weight in found.weights] == pytest.approx([0.3] * 8)
    assert rule("ties").density == 0.2 and rule("ties").scale == 1.0
    assert rule("dare").density == 0.1 and rule("dare").scale == 0.6
    found = rule("ties", coefficients="nan")
    assert (found.weights, found.norm_of, found.granularity) == ("nan", "task_vector", "tensor")


def test_numbers_are_an_average_s_shares_and_the_coefficients_of_the_others():
    assert rule("average", coefficients="1,3").weights == (0.25, 0.75)
    found = rule("task-arithmetic", coefficients="-1,0.5")
    assert found.weights == (-1.0, 0.5) and found.scale == 1.0
    assert rule("dare", coefficients="1,2", scale="0.5").scale == 0.5


@pytest.mark.parametrize(
    ("text", "value"), [("none", 1.0), ("n", 3.0), ("0.3n", 0.9), ("2", 2.0), ("1e-1", 0.1)]
)
def test_scale_is_a_number_or_a_multiple_of_the_parts(text, value):
    assert rule("average", 3, scale=text).scale == pytest.approx(value)


@pytest.mark.parametrize("text", ["x", "0", "-1", "nan", "inf", "", "none n", "nn"])
def test_a_scale_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="--scale"):
        rule("average", scale=text or " ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a", "--method", "nan"], "only one adapter"),
        (["a", "b", "--method", "nan", "--coefficients", "equal"], "--method nan is an average"),
        (["a", "b", "--method", "average", "--norm-of", "full"], "--norm-of: is NAN's"),
        (["a", "b", "--method", "ties", "--granularity", "model"], "--granularity: is NAN's"),
        (["a", "b", "--method", "average", "--density", "0.5"], "--density: is of ties and dare"),
        (["a", "b", "--method", "ties", "--density", "0"], "--density 0: must be above 0"),
        (["a", "b", "--method", "ties", "--seed", "1"], "--seed: nothing in ties is random"),
        (["a", "b", "--method", "ties", "--coefficients", "1,2,3"], "3 numbers for 2 adapters"),
        (["a", "b", "--method", "ties", "--coefficients=-1,2"], "none may be negative"),
        (["a", "b", "--method", "average", "--coefficients=-1,1"], "an average divides by their sum"),
        (["a", "b", "--method", "dare", "--coefficients", "0,0"], "that is the base"),
        (["a", "b", "--method", "dare", "--coefficients", "much"], "not equal, nan, or numbers"),
        (["a", "b", "--method", "nan", "--rank", "0"], "--rank 0: must be at least 1"),
        (["a", "b", "--method", "nan", "--rank", "4", "--into", "dense"], "a dense model has no rank"),
        (["a", "b", "--method", "nan", "--limit", "4"], "--limit 4: nothing is scored"),
        (["a", "b", "--method", "nan", "--task", "x", "--batch-size", "0"], "--batch-size 0"),
    ],
)  # fmt: skip
def test_a_flag_that_cannot_work_is_refused(argv, message):
    with pytest.raises(UserError, match=message):
        main([*argv, "--out", "never"])


@pytest.mark.dist
def test_the_command_passes_its_flags_on_and_ends_with_2():
    command = [sys.executable, "-m", "decompft.launcher.cli", "combine", "a", "b", "--method", "average"]
    flags = ["--out", "never", "--coefficients=-1,1", "--scale", "n"]
    found = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert found.returncode == 2 and "--coefficients -1,1: an average divides" in found.stderr
    assert "Traceback" not in found.stderr
