"""How long a run takes: known where it was measured, and nowhere else; and the table of more GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_forecast import layout, work

from decompft.launcher.cli import main
from decompft.launcher.errors import UserError
from decompft.launcher.machine import Machine
from decompft.launcher.plan import StepTime, World
from decompft.launcher.planner import make
from decompft.launcher.recompute import MODES
from decompft.launcher.scale import parse_counts, planned_machine, scale, table_rows
from decompft.launcher.shipped import find
from decompft.launcher.source import load
from decompft.launcher.speed import run_seconds, step_time

SEVEN_B = "meta-llama/Llama-2-7b-hf"


def time_of(model: Any = SEVEN_B, gpu: str | None = "NVIDIA H200", **changes: Any) -> StepTime | None:
    world = World(nodes=1, ranks_per_node=1, device=changes.get("device", "cuda"))
    return step_time(work(model), layout(**changes), world, 1, Machine(num_gpus=1, gpu_name=gpu))


def term_of(time: StepTime, name: str) -> float:
    return sum(term.seconds for term in time.terms if term.name == name)


@pytest.mark.parametrize(
    "changes, gpu", [({}, "NVIDIA A100"), ({}, None), ({"device": "cpu"}, "NVIDIA H200")]
)
def test_speed_is_unknown_where_nothing_was_measured(changes: dict[str, Any], gpu: str | None) -> None:
    assert time_of(**changes) is None or not changes
    assert time_of(gpu=gpu, **changes) is None
    assert time_of() is not None


def test_what_was_not_timed_lies_between_what_was() -> None:
    """Selective runs gate and up again; full all but down, and offloaded's copies cost a little."""
    none, norms, selective, full, offloaded = (time_of(recompute=mode) for mode in MODES)
    assert none and norms and selective and full and offloaded
    linears = {x.name.rpartition(".")[2]: x.num_weights for x in work(SEVEN_B).shape.linears}
    share = (linears["gate_proj"] + linears["up_proj"]) / (sum(linears.values()) - linears["down_proj"])
    expected = none.seconds + share * (full.seconds - none.seconds)
    assert selective.seconds == pytest.approx(expected, rel=0.01)
    some = time_of(recompute="selective", recompute_blocks=8)
    assert some and term_of(some, "recomputation") == pytest.approx(term_of(selective, "recomputation") / 4)
    # 64 of the 65 norms whose forward pass was timed at 2.31 ms
    assert term_of(norms, "recomputation") == pytest.approx(2.31e-3 * 64 / 65)
    assert none.seconds < norms.seconds < selective.seconds
    assert full.seconds < offloaded.seconds <= 1.03 * full.seconds


def test_speed_of_a_small_model_and_of_offload_is_unknown() -> None:
    assert time_of(model={"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}) is None
    assert time_of(strategy="fsdp", world_size=2, cpu_offload=True) is None


def recipe(*overrides: str) -> Any:
    return load(find("llama7b_map"), list(overrides))


def test_a_run_is_its_steps_and_its_saves() -> None:
    found = recipe("train.epochs=null", "train.max_steps=100", "checkpoint.every_steps=30")
    plan = make(found, machine=planned_machine(found, "H200", None))
    assert plan.time is not None and plan.seconds_per_step == plan.time.seconds
    assert run_seconds(plan) == (
        100,
        100 * plan.time.seconds,
        4 * plan.save_pause_s,
    )  # 30, 60, 90 and the end


def test_table_grows_the_batch_and_leaves_the_recipes_where_it_divides() -> None:
    found = recipe()
    machine = planned_machine(found, "H200", None)
    rows = scale(found, machine, [8, 16, 1024])
    assert [row.grown.batch.global_size for row in rows if row.grown] == [64, 128, 8192]
    assert [row.same is not None for row in rows] == [True, True, False]
    assert table_rows(rows)[0][0] == "8" and table_rows(rows)[0][5] == "100.0%"


def test_a_slower_network_makes_the_table_slower() -> None:
    found = recipe("parallel.strategy=fsdp", "train.micro_batch_size=1")
    fast, slow = (
        scale(found, replace(planned_machine(found, "H200", None), network_gbit_per_s=gbit), [64])[0].same
        for gbit in (3200.0, 10.0)
    )
    assert fast and slow and fast.time and slow.time and slow.time.seconds > fast.time.seconds
    assert slow.time.limit == "links"


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: parse_counts("8,x"), "list of numbers"),
        (lambda: planned_machine(recipe(), "A100", None), "not measured"),
        (lambda: planned_machine(recipe(), "H200", 0.0), "carry nothing"),
        (lambda: scale(recipe(), planned_machine(recipe(), "H200", None), [12]), "whole nodes"),
        (lambda: scale(recipe(), Machine(num_cores=2), [8]), "no speed was measured"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_words(call: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        call()


def test_verb_prints_time_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama7b_map", "--gpu", "H200"]) == 0
    assert "tokens/s a GPU: simulated" in capsys.readouterr().out
    assert main(["plan", "llama7b_map", "--gpu", "H200", "--network", "400", "--scale", "8,1024"]) == 0
    told = capsys.readouterr().out
    assert "1,024" in told and "400 Gbit/s" in told


def test_a_network_that_is_not_used_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DECOMPFT_DEVICE", "cpu")
    assert main(["plan", "tiny_map", "--network", "400"]) == 0
    assert "--network says nothing here" in capsys.readouterr().err
