"""Launches are quick where nothing that machine code depends on has changed, and Triton's own otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from decompft.adapters.kernels import launch as launches
from decompft.adapters.kernels.launch import launch

CPU = torch.device("cpu")
STREAM = 7


class Kernel:
    """Notes how it was launched."""

    arg_names = ("x_ptr", "y_ptr", "size", "scale", "FLAG")

    def __init__(self) -> None:
        self.plain: list[tuple[Any, ...]] = []
        self.quick: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **named: Any) -> Any:
            self.plain.append((grid, args, named))
            return SimpleNamespace(
                run=lambda *a: self.quick.append(a), function="machine code", packed_metadata="packed"
            )

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launches, "_stream", lambda device: STREAM)
    monkeypatch.setattr(launches, "_compiled", {})
    return Kernel()


def counts(kernel: Kernel) -> tuple[int, int]:
    return len(kernel.plain), len(kernel.quick)


def test_the_second_launch_of_a_kind_is_quick(kernel: Kernel) -> None:
    x, y = torch.zeros(64), torch.zeros(64)
    for _ in range(2):
        launch(kernel, (3,), CPU, x, None, 64, scale=0.5, FLAG=True, num_warps=4)
    assert kernel.plain == [((3,), (x, None, 64), {"scale": 0.5, "FLAG": True, "num_warps": 4})]
    assert kernel.quick == [
        (3, 1, 1, STREAM, "machine code", "packed", None, None, None, x.data_ptr(), None, 64, 0.5, True)
    ]
    # another tensor of the same kind, and another grid
    launch(kernel, (2, 5), CPU, y, None, 64, scale=0.5, FLAG=True, num_warps=4)
    assert counts(kernel) == (1, 2)
    assert kernel.quick[1][:3] == (2, 5, 1) and kernel.quick[1][9:] == (y.data_ptr(), None, 64, 0.5, True)


@pytest.mark.parametrize(
    "change",
    [
        {0: torch.zeros(65)[1:]},  # not a multiple of 16
        {0: torch.zeros(64, dtype=torch.bfloat16)},
        {1: torch.zeros(64)},
        {2: 1},
        {2: 65},
        {3: 1},
        {"FLAG": False},
        {"num_warps": 8},
        {"num_stages": 1},
    ],
)
def test_what_machine_code_depends_on_is_looked_at(kernel: Kernel, change: dict[Any, Any]) -> None:
    usual: list[Any] = [torch.zeros(64), None, 64, 1.0]
    named = {name: value for name, value in change.items() if isinstance(name, str)}
    changed = [change.get(k, value) for k, value in enumerate(usual)]
    for expected in ((2, 0), (2, 2)):
        for args, options in ((usual, {}), (changed, named)):
            launch(kernel, (1,), CPU, *args, **({"FLAG": True, "num_warps": 4} | options))
        assert counts(kernel) == expected


def test_kernels_are_apart_and_what_is_known_has_an_end(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "_MOST_KINDS", 2)
    other = Kernel()
    for each in (kernel, other, kernel):
        launch(each, (1,), CPU, None, None, 64, 0.5, True)
    assert counts(kernel) == (1, 1) and counts(other) == (1, 0)
    launch(kernel, (1,), CPU, None, None, 128, 0.5, True)
    assert len(launches._compiled) == 1, "all is forgotten, as a run with ever new shapes would keep them all"


def test_without_a_stream_triton_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    for _ in range(2):
        launch(kernel, (1,), CPU, None, None, 64, 0.5, True)
    assert counts(kernel) == (2, 0)


@pytest.mark.parametrize(
    ("release", "known"),
    [("3.5.1", False), ("3.6.0", True), ("3.8.0+git1", True), ("3.9.0", False), ("4.0.0", False)],
)
def test_releases_of_triton(release: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "triton", SimpleNamespace(__version__=release))
    launches._is_known.cache_clear()
    try:
        assert launches._is_known() is known
    finally:
        launches._is_known.cache_clear()


@pytest.mark.gpu
def test_on_a_gpu_both_ways_make_the_same_bits() -> None:
    from decompft.adapters.kernels import dequantize

    device = torch.device("cuda", torch.cuda.current_device())
    assert launches._is_known(), "this release of Triton is launched by itself each time"
    codes, scales = dequantize.example_storage(device, double_quant=True)
    given = (codes, scales, "nf4", 64, torch.bfloat16)
    launches._compiled.clear()
    first = dequantize.dequantize(*given, double_quant=True)
    assert len(launches._compiled) == 1
    again = dequantize.dequantize(*given, double_quant=True)
    assert len(launches._compiled) == 1 and torch.equal(first, again)
