"""A kernel proves itself before it is used; one that fails, or is wrong, leaves its place to its twin."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from decompft.adapters.kernels import proved
from decompft.adapters.kernels.fp8 import reason_without_triton
from decompft.adapters.kernels.proved import Proved, close_to, prove_all

CPU = torch.device("cpu")


class Fake:
    """A kernel that adds `wrong` to what it should make, or cannot be compiled."""

    def __init__(self, wrong: float = 0.0, error: Exception | None = None) -> None:
        self.wrong, self.error, self.runs = wrong, error, 0

    def example(self, device: torch.device, dtype: torch.dtype) -> None:
        self.runs += 1
        if self.error is not None:
            raise self.error
        expected = torch.ones(3, device=device, dtype=dtype)
        close_to(expected + self.wrong, expected, 0.1)

    def proved(self) -> Proved:
        return Proved(name="fake", instead="its twin", example=self.example)


def test_a_right_kernel_is_proved_once(caplog: pytest.LogCaptureFixture) -> None:
    fake = Fake(wrong=0.05)
    kernel = fake.proved()
    assert all(kernel.runs(CPU, torch.float32) for _ in range(3))
    assert kernel.reason(CPU, torch.float32) == ""
    assert fake.runs == 1
    assert kernel.runs(CPU, torch.float64) and fake.runs == 2, "each dtype is compiled anew"
    assert not caplog.records


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        (Fake(wrong=0.5), "it computes something else, by up to 0.5"),
        (Fake(wrong=float("nan")), "it computes something else, by up to nan"),
        (Fake(error=RuntimeError("no sm_90\nat line 3")), "RuntimeError: no sm_90"),
        (Fake(error=ModuleNotFoundError("No module", name="triton")), "triton is not installed"),
        (Fake(error=AssertionError()), "AssertionError: "),
    ],
    ids=["wrong", "nan", "raises", "missing", "silent"],
)
def test_a_kernel_that_fails_is_not_used_and_said_once(
    fake: Fake, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = fake.proved()
    with caplog.at_level(logging.WARNING):
        assert not any(kernel.runs(CPU, torch.bfloat16) for _ in range(3))
    assert fake.runs == 1
    assert kernel.reason(CPU, torch.bfloat16) == words
    (record,) = caplog.records
    assert record.getMessage() == f"kernel fake (bfloat16 on cpu) is not used: {words}; its twin runs instead"


def test_all_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(proved.SWITCH, "0")
    fake = Fake()
    assert fake.proved().reason(CPU, torch.float32) == "DECOMPFT_TRITON=0" and fake.runs == 0


def test_another_shape_or_dtype_is_wrong() -> None:
    with pytest.raises(proved.WrongKernelError, match=r"it makes \(2,\) float32, not \(3,\) float32"):
        close_to(torch.ones(2), torch.ones(3), 1.0)
    with pytest.raises(proved.WrongKernelError, match="float64"):
        close_to(torch.ones(3).double(), torch.ones(3), 1.0)


def test_nothing_is_proved_while_a_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    kernel = fake.proved()
    monkeypatch.setattr(proved, "_is_recording", lambda device: True)
    assert not kernel.runs(CPU, torch.float32) and fake.runs == 0
    monkeypatch.undo()
    assert kernel.runs(CPU, torch.float32), "and nothing was decided by it"


def test_the_start_line_of_a_machine_without_a_gpu() -> None:
    assert prove_all(CPU, torch.float32, ["map"], "nf4", "llama") == "torch (no GPU)"


def test_the_start_line_names_what_runs_and_why_not_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kernels that this run's methods, format, family and dtype want; the others are not even compiled."""
    unwanted = Fake()
    found = {
        "right": Proved(name="right", instead="torch", example=Fake().example, formats=("nf4",)),
        "wrong": Proved(name="wrong", instead="its twin", example=Fake(wrong=1.0).example, methods=("map",)),
        "dora's": Proved(name="dora's", instead="torch", example=unwanted.example, methods=("dora",)),
        "fp4's": Proved(name="fp4's", instead="torch", example=unwanted.example, formats=("fp4",)),
        "phi's": Proved(name="phi's", instead="torch", example=unwanted.example, families=("phi",)),
        "half's": Proved(
            name="half's", instead="torch", example=unwanted.example, computes=(torch.bfloat16,)
        ),
    }
    for proved_one in found.values():  # there is no GPU here: a fake needs none
        example = proved_one.example
        proved_one.example = lambda _, dtype, example=example: example(CPU, dtype)
    monkeypatch.setattr(proved, "_MODULES", tuple(found))
    monkeypatch.setattr(proved, "_is_recording", lambda device: False)
    monkeypatch.setattr(
        proved, "import_module", lambda n: SimpleNamespace(PROVED=found[n.rpartition(".")[2]])
    )
    line = prove_all(torch.device("cuda", 0), torch.float32, ["map"], "nf4", "llama")
    assert (
        line
        == "triton for right (proved in 0.0 s); its twin for wrong (it computes something else, by up to 1)"
    )
    assert unwanted.runs == 0


def test_every_kernel_is_known_to_prove_all() -> None:
    """A file with a kernel's twin has a `PROVED`, and is in the list."""
    from importlib import import_module
    from pathlib import Path

    folder = Path(proved.__file__).parent
    twins = {p.name.removesuffix("_triton.py") for p in folder.glob("*_triton.py")}
    assert twins and twins == set(proved._MODULES)
    assert all(isinstance(import_module(f"decompft.adapters.kernels.{m}").PROVED, Proved) for m in twins)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_kernel_runs_on_this_gpu(dtype: torch.dtype) -> None:
    line = prove_all(torch.device("cuda"), dtype, ["map", "dora", "liera"], "nf4", "llama")
    # fp8 is asked for, others are for tensor cores or for copies that are shorter
    left_out = {"fp8"} | (
        set() if dtype == torch.bfloat16 else {"visit", "swiglu", "weight_times", "norm_many"}
    )
    wanted = ", ".join(m for m in proved._MODULES if m not in left_out)
    assert line.startswith(f"triton for {wanted} (") and ";" not in line, line
    assert not reason_without_triton(torch.device("cuda", 0))
