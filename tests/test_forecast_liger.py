"""The memory forecast where Liger's kernels are not: torch's own norms and activations keep more."""

from __future__ import annotations

import dataclasses
from io import StringIO

import pytest
from planning import CPU, LLAMA_7B, TINY, gpus, make
from rich.console import Console
from test_forecast import run, work

from decompft.launcher.plan_view import show

ADVICE = "liger-kernel is not installed here"
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256}


@pytest.mark.parametrize("mode", ["none", "norms", "selective", "full"])
def test_without_liger_a_gpu_keeps_what_a_cpu_keeps(mode: str) -> None:
    """What a CPU keeps was counted in tensors (tests/test_recompute.py)."""
    parts = ("activations", "recomputed norm", "recomputed MLP", "recomputed layer")
    known = work()
    without = dataclasses.replace(known, has_liger=False)
    fused, eager, cpu = (
        run(known, recompute=mode), run(without, recompute=mode), run(without, recompute=mode, device="cpu"),
    )  # fmt: skip
    assert [eager.get(n) for n in parts] == [cpu.get(n) for n in parts] != [fused.get(n) for n in parts]


def test_a_family_that_liger_does_not_know_is_the_same_without_it() -> None:
    known = work(GPT2)
    assert run(known) == run(dataclasses.replace(known, has_liger=False))


def test_the_command_is_printed_whole() -> None:
    """decompft[gpu] is no markup."""
    printed = StringIO()
    show(make(dataclasses.replace(gpus(1, 80), has_liger=False), LLAMA_7B), Console(file=printed, width=160))
    assert "pip install 'decompft[gpu]'" in printed.getvalue()


def test_a_plan_without_liger_counts_more_and_says_so() -> None:
    machine = gpus(1, 80)
    asked = {"train": {"micro_batch_size": 4, "recompute": "none"}, "quantization": {"format": "nf4"}}
    known = make(machine, LLAMA_7B, **asked)
    without = make(dataclasses.replace(machine, has_liger=False), LLAMA_7B, **asked)
    # a token and layer: two norms' inputs in float32 instead of bfloat16, and one more tensor of the MLP's width
    more = 4 * 2048 * 32 * (2 * 4096 * 2 + 11008 * 2)
    assert without.forecast.total_bytes - known.forecast.total_bytes == more
    assert [ADVICE in w for w in without.warnings if "liger" in w] == [True]
    assert not any("liger" in w for w in known.warnings)


def test_a_machine_without_gpus_knows_nothing_of_those_it_plans_for() -> None:
    asked = {"parallel": {"gpu_memory_gib": 80.0, "gpus_per_node": 1}}
    here, bare = (
        make(CPU, LLAMA_7B, **asked),
        make(dataclasses.replace(CPU, has_liger=False), LLAMA_7B, **asked),
    )
    assert here.world.device == "cuda" and here.forecast == bare.forecast and here.warnings == bare.warnings


def test_liger_is_not_missed_where_it_would_not_run() -> None:
    on_cpu = make(dataclasses.replace(CPU, has_liger=False), TINY)
    unknown = make(dataclasses.replace(gpus(1, 80), has_liger=False), GPT2, data={"sequence_length": 512})
    assert not any("liger" in w for w in (*on_cpu.warnings, *unknown.warnings))
