"""What the planner decides, what it refuses, and how it says so."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from planning import ALONE, CPU, DENSE, GIB, LLAMA_7B, LLAMA_70B, TINY, gpus, make, recipe

from decompft.adapters.spec import ADAPTER_SPECS
from decompft.launcher import planner
from decompft.launcher.errors import PlanError
from decompft.launcher.machine import Machine
from decompft.launcher.plan import Plan

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def no_hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)


# --- goldens ---


@pytest.mark.parametrize(
    "name, machine, model, sections",
    [
        ("llama7b_one_gpu_24gib", gpus(1, 24), LLAMA_7B, {}),
        ("llama7b_two_gpus_80gib", gpus(2, 80, name="NVIDIA H100"), LLAMA_7B, {}),
        ("tiny_cpu", CPU, TINY, {}),
    ],
)
def test_plan_equals_its_golden(
    name: str, machine: Machine, model: str | dict[str, Any], sections: dict[str, Any], update_golden: bool
) -> None:
    text = planner.to_json(make(machine, model, **sections))
    path = GOLDEN / f"{name}.plan.json"
    if update_golden:
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"{path} is missing; pytest --update-golden writes it"
    assert text == path.read_text(encoding="utf-8")


def test_plan_survives_json() -> None:
    plan = make(gpus(2, 80))
    text = planner.to_json(plan)
    assert Plan.model_validate_json(text) == plan
    assert list(json.loads(text)) == sorted(json.loads(text))


# --- strategy, recomputation, micro batch ---


def test_one_rank_is_single() -> None:
    plan = make(CPU, TINY)
    assert (plan.strategy, plan.world.size, plan.world.device, plan.recompute) == ("single", 1, "cpu", "none")
    assert plan.batch.micro_size == 8 and plan.batch.accumulation == 2


@pytest.mark.parametrize(
    "model, gib, strategy, recompute, offload",
    [
        (LLAMA_7B, 80, "ddp", "none", False),
        (LLAMA_7B, 9, "ddp", "full", False),
        (LLAMA_70B, 80, "ddp", "norms", False),
        (LLAMA_70B, 70, "ddp", "selective", False),
        (LLAMA_70B, 24, "fsdp", "full", False),
        (LLAMA_70B, 10, "fsdp", "full", True),
    ],
)
def test_auto_descends_the_ladder(model: str, gib: int, strategy: str, recompute: str, offload: bool) -> None:
    plan = make(gpus(4, gib), model, train={"micro_batch_size": 1})
    assert (plan.strategy, plan.recompute, plan.cpu_offload) == (strategy, recompute, offload)
    assert plan.forecast.total_bytes <= gib * GIB
    assert f"{gib:.1f} GiB" in plan.strategy_reason
    if (strategy, recompute) != ("ddp", "none"):
        assert "would need" in plan.strategy_reason


def test_micro_batch_is_the_largest_that_fits() -> None:
    plan = make(gpus(1, 24))
    machine = gpus(1, 24)
    assert plan.recompute == "none"
    larger = plan.batch.micro_size * 2
    with pytest.raises(PlanError, match="needs"):
        make(machine, train={"micro_batch_size": larger, "recompute": "none"})


def test_inputs_of_layers_on_the_host_are_forecast_there() -> None:
    full, away = (
        make(gpus(1, 80), train={"micro_batch_size": 4, "recompute": m}) for m in ("full", "offloaded")
    )
    inputs = 4 * 2048 * 4096 * 2
    assert full.forecast.total_bytes - away.forecast.total_bytes == (32 - 3) * inputs
    assert away.forecast.host_total_bytes - full.forecast.host_total_bytes == 32 * inputs
    on_cpu = make(CPU, TINY, train={"recompute": "offloaded"})
    assert any("saves nothing on a CPU" in w for w in on_cpu.warnings)


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_named_strategy_is_kept_on_one_rank(strategy: str) -> None:
    assert make(gpus(1, 80), parallel={"strategy": strategy}).strategy == strategy


def test_unknown_capacity_takes_the_fastest_and_warns() -> None:
    plan = make(gpus(2, None))
    assert (plan.strategy, plan.recompute) == ("ddp", "none")
    assert any("gpu_memory_gib" in w for w in plan.warnings)
    assert plan.forecast.capacity_bytes is None


def test_stated_gpu_memory_wins_over_the_found() -> None:
    assert make(gpus(1, 24), parallel={"gpu_memory_gib": 80.0}).forecast.capacity_bytes == 80 * GIB


def test_login_node_plans_for_the_stated_gpus() -> None:
    sections = {"parallel": {"gpu_memory_gib": 80.0, "gpus_per_node": 8, "nodes": 2}}
    plan = make(CPU, **sections)
    assert (plan.world.device, plan.world.size) == ("cuda", 16)
    assert any("no GPU" in w for w in plan.warnings)
    forced = Machine(num_cores=2, host_memory_bytes=1024 * GIB, is_cpu_forced=True)
    assert make(forced, **sections).world.device == "cpu"


def test_cpu_ranks_share_the_host() -> None:
    plan = make(CPU, TINY, parallel={"gpus_per_node": 4})
    assert plan.forecast.capacity_bytes == 4 * GIB


def test_plan_knows_the_time_where_a_speed_was_measured() -> None:
    plan = make(gpus(1, 140, name="NVIDIA H200"), train={"micro_batch_size": 4, "recompute": "none"})
    assert plan.seconds_per_step == pytest.approx(16 * 2048 / 19_141, rel=0.05)  # the simulator's bound
    assert make(gpus(1, 80, name="NVIDIA H100")).seconds_per_step is None


# --- the batch law ---


@pytest.mark.parametrize("size, micro, near", [(18, 4, "16 or 24"), (6, 4, "8"), (7, "auto", "6 or 8")])
def test_batch_that_does_not_divide_names_the_nearest(size: int, micro: int | str, near: str) -> None:
    with pytest.raises(PlanError, match=str(size)) as error:
        make(gpus(2, 80), train={"global_batch_size": size, "micro_batch_size": micro})
    assert near in error.value.hint


@pytest.mark.parametrize("size", [4, 12, 36, 100, 1022])
@pytest.mark.parametrize("num_gpus", [1, 2])
def test_batch_law_holds_exactly(size: int, num_gpus: int) -> None:
    plan = make(gpus(num_gpus, 40), train={"global_batch_size": size})
    batch = plan.batch
    assert batch.micro_size * batch.accumulation * plan.world.size == batch.global_size == size
    assert batch.tokens_per_step == size * 2048


# --- too little memory ---


@pytest.mark.parametrize(
    "machine, model, sections, hint",
    [
        (
            gpus(1, 24),
            LLAMA_7B,
            {**ALONE, "train": {"micro_batch_size": 4, "recompute": "none"}},
            "train.recompute: selective",
        ),
        (
            gpus(1, 36),
            LLAMA_7B,
            {**ALONE, "train": {"micro_batch_size": 4, "recompute": "none"}},
            "train.recompute: norms",
        ),
        (
            gpus(1, 12),
            LLAMA_7B,
            {**ALONE, "train": {"micro_batch_size": 4, "recompute": "selective"}},
            "train.recompute: full",
        ),
        (
            gpus(1, 12),
            LLAMA_7B,
            {**ALONE, "train": {"micro_batch_size": 16, "recompute": "full"}},
            "micro_batch_size: 1",
        ),
        (gpus(1, 12), LLAMA_7B, DENSE, "fits: quantization.format: int8"),
        (gpus(1, 7), LLAMA_7B, DENSE | {"train": {"micro_batch_size": 1}}, "fits: quantization.format: nf4"),
        (
            gpus(1, 7),
            LLAMA_7B,
            {**ALONE, "quantization": {"format": "int8"}},
            "fits: quantization.format: nf4",
        ),
        (gpus(4, 24), LLAMA_70B, {"parallel": {"strategy": "ddp"}}, "parallel.strategy: fsdp"),
        (gpus(4, 24), LLAMA_70B, {"parallel": {"strategy": "zero2"}}, "fits: parallel.strategy: zero3"),
        (
            gpus(4, 24),
            LLAMA_70B,
            {"parallel": {"strategy": "hsdp", "shard_size": 2}},
            "parallel.strategy: fsdp",
        ),
        (gpus(1, 20), LLAMA_70B, ALONE, "fits: parallel.strategy: fsdp with cpu_offload: true"),
        (gpus(2, 16), LLAMA_70B, {"parallel": {"strategy": "zero3"}}, "fits: parallel.cpu_offload: true"),
        (gpus(1, 20, host_gib=30), LLAMA_70B, {"train": {"micro_batch_size": 1}}, "ranks fit"),
        (Machine(host_memory_bytes=GIB), LLAMA_7B, {"data": {"sequence_length": 4096}}, "no setting fits"),
    ],
)
def test_too_little_memory_names_the_smallest_change(
    machine: Machine, model: str, sections: dict[str, Any], hint: str
) -> None:
    with pytest.raises(PlanError, match=r"memory: .* needs .* GiB a rank") as error:
        make(machine, model, **sections)
    assert hint in error.value.hint
    if "smallest change that fits" in error.value.hint:
        assert make(machine, model, **with_change(sections, error.value.hint))


def with_change(sections: dict[str, Any], hint: str) -> dict[str, Any]:
    """The recipe's sections with the change that a hint names, as a user would make it."""
    said = hint.removeprefix("smallest change that fits: ").rpartition(" (")[0]
    key, _, value = said.partition(": ")
    section, field = key.split(".")
    value, _, offload = value.partition(" with cpu_offload: ")
    typed = int(value) if value.isdigit() else value == "true" or value
    changed = {field: typed} | ({"cpu_offload": True} if offload else {})
    kept = {k: v for k, v in sections.get(section, {}).items() if field != "strategy" or k != "shard_size"}
    return {**sections, section: kept | changed}


@pytest.mark.parametrize(
    "machine, model, sections, said",
    [
        (
            gpus(2, 16, host_gib=56),
            LLAMA_70B,
            {"train": {"micro_batch_size": 4, "recompute": "none"}},
            "these together fit: train.recompute: full, train.micro_batch_size: 1 (",
        ),
        # auto's last rung offloads, for which the node is too small; two ranks need no offload
        (
            gpus(1, 39, host_gib=30),
            LLAMA_70B,
            {"train": {"micro_batch_size": 1}},
            "2 ranks fit, with parallel.strategy: fsdp (",
        ),
        (
            gpus(1, 20, host_gib=6),
            LLAMA_7B,
            {"quantization": {"format": "none"}, "train": {"micro_batch_size": 8, "recompute": "none"}},
            "2 ranks fit, with parallel.strategy: fsdp, train.recompute: full (",
        ),
    ],
)
def test_no_change_is_named_that_the_fit_does_not_need(
    machine: Machine, model: str, sections: dict[str, Any], said: str
) -> None:
    with pytest.raises(PlanError) as error:
        make(machine, model, **sections)
    assert error.value.hint.startswith(said)


def test_a_change_that_offloads_says_what_the_host_needs() -> None:
    with pytest.raises(PlanError) as error:
        make(gpus(1, 20), LLAMA_70B, **ALONE)
    plan = make(gpus(1, 20), LLAMA_70B, parallel={"strategy": "fsdp", "cpu_offload": True})
    host = plan.forecast.host_total_bytes / GIB
    assert host > 40 and f"and of the host {host:.1f} GiB a rank)" in error.value.hint


@pytest.mark.parametrize("forbidden, said", [((), "ranks fit"), (("fsdp",), "no setting fits")])
def test_more_ranks_are_named_only_under_what_the_adapter_runs_under(
    monkeypatch: pytest.MonkeyPatch, forbidden: tuple[str, ...], said: str
) -> None:
    spec = dataclasses.replace(ADAPTER_SPECS["lora"], name="picky", forbids_engines=forbidden)
    monkeypatch.setitem(ADAPTER_SPECS, "picky", spec)
    sections = {"adapter": {"method": "picky"}, "train": {"micro_batch_size": 1}}
    with pytest.raises(PlanError) as error:
        make(gpus(1, 20, host_gib=6), LLAMA_70B, **sections)
    assert said in error.value.hint


def test_shards_on_a_host_of_unknown_memory_warn() -> None:
    away = {"strategy": "fsdp", "cpu_offload": True}
    found = gpus(2, 24)
    unknown = dataclasses.replace(found, host_memory_bytes=None)

    def warns(machine: Machine, parallel: dict[str, Any]) -> bool:
        return any("host's memory is unknown" in w for w in make(machine, parallel=parallel).warnings)

    assert warns(unknown, away)
    assert not warns(found, away)
    assert not warns(unknown, {"strategy": "fsdp"})


def test_fit_without_headroom_warns() -> None:
    sections = {**ALONE, "train": {"micro_batch_size": 4, "recompute": "none"}}
    need = make(gpus(1, 80), **sections).forecast.total_bytes / GIB
    plan = make(gpus(1, need * 1.01), **sections)
    assert any("leaves less than" in w for w in plan.warnings)
    with pytest.raises(PlanError):
        make(gpus(1, need * 0.99), **sections)


def test_long_sequences_warn() -> None:
    assert any("512 positions" in w for w in make(CPU, TINY, data={"sequence_length": 1024}).warnings)
    assert not make(CPU, TINY).warnings


# --- how it is shown ---


def test_show_is_plain_without_a_terminal() -> None:
    from rich.console import Console

    from decompft.launcher.plan_view import show

    out = io.StringIO()
    plan = make(gpus(1, 24), TINY, data={"sequence_length": 1024})
    show(plan, Console(file=out))
    text = out.getvalue()
    assert "\x1b" not in text
    for term in (*plan.forecast.terms, *plan.forecast.host_terms):
        assert term.name in text
    assert plan.strategy_reason in text and plan.warnings[0] in text and "24.0 GiB" in text


@pytest.mark.parametrize(
    "sections, said",
    [
        ({"quantization": {"format": "int8"}}, "int8, a float32 scale a row, compute bfloat16"),
        (
            {"quantization": {"format": "int8", "outlier_threshold": 6.0}},
            "int8, a float32 scale a row, multiplied in int8, outliers beyond 6 apart",
        ),
        ({"quantization": {"format": "fp4", "double_quant": False}}, "fp4, blocks of 64, compute"),
        ({"quantization": {"format": "fp8"}}, "fp8 (e4m3), a float32 scale a row"),
        ({"parallel": {"strategy": "hsdp", "shard_size": 2}}, "2 copies of the base, each cut over 2 ranks"),
        ({"checkpoint": {"keep": 5}}, "checkpoint  0.6 GiB each, 5 kept"),
    ],
)
def test_show_says_how_the_base_is_kept(sections: dict[str, Any], said: str) -> None:
    from rich.console import Console

    from decompft.launcher.plan_view import show

    out = io.StringIO()
    show(make(gpus(4, 80), **sections), Console(file=out))
    text = out.getvalue()
    assert said in text
    assert ("mesh" in text) == ("hsdp" in str(sections))


def test_several_nodes_cut_inside_a_node_before_across() -> None:
    parallel = {"nodes": 2, "gpus_per_node": 4, "gpu_memory_gib": 24.0}
    inside = make(CPU, LLAMA_70B, parallel=parallel, train={"micro_batch_size": 1})
    assert (inside.strategy, inside.shard_size, inside.recompute) == ("hsdp", 4, "full")
    assert "hsdp with selective recomputation would need" in inside.strategy_reason
    across = make(CPU, LLAMA_70B, parallel=parallel | {"gpu_memory_gib": 15.0}, train={"micro_batch_size": 1})
    assert (across.strategy, across.shard_size) == ("fsdp", 8)
    assert "would need" in across.strategy_reason
    one_a_node = parallel | {"nodes": 4, "gpus_per_node": 1}
    assert make(CPU, LLAMA_70B, parallel=one_a_node, train={"micro_batch_size": 1}).strategy == "fsdp"


def test_one_gpu_offloads_only_where_nothing_else_fits() -> None:
    plan = make(gpus(1, 20), LLAMA_70B, train={"micro_batch_size": 1})
    assert (plan.strategy, plan.cpu_offload, plan.world.size) == ("fsdp", True, 1)
    assert any("host memory, which is slow" in w for w in plan.warnings)
    assert "single with recomputation from the host would need" in plan.strategy_reason
    roomy = make(gpus(1, 80), LLAMA_70B, train={"micro_batch_size": 1, "recompute": "offloaded"})
    barely = make(gpus(1, roomy.forecast.total_bytes * 1.01 / GIB), LLAMA_70B, train={"micro_batch_size": 1})
    assert (barely.strategy, barely.recompute, barely.cpu_offload) == ("single", "offloaded", False)


def test_auto_never_takes_deepspeed() -> None:
    found = {make(gpus(4, gib), LLAMA_70B).strategy for gib in range(10, 140, 10)}
    assert found == {"ddp", "fsdp"}


# --- speed, and what is never imported ---


def test_plan_of_a_70b_needs_no_heavy_library() -> None:
    code = (
        "import sys\n"
        "from decompft.launcher import planner; from decompft.launcher.recipe import Recipe\n"
        "r = Recipe.model_validate_json(sys.argv[1]); p = planner.make(r); planner.show(p)\n"
        "print('heavy:', *[m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    text = recipe(LLAMA_70B, parallel={"gpu_memory_gib": 80.0, "gpus_per_node": 8}).model_dump_json()
    done = subprocess.run([sys.executable, "-c", code, text], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy:"
