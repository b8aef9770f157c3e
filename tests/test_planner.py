"""What the planner decides, what it refuses, and how it says so."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from decompft.launcher import planner
from decompft.launcher.errors import AdapterError, PlanError
from decompft.launcher.machine import Machine, detect, parse_smi, visible_gpus
from decompft.launcher.plan import Plan
from decompft.launcher.recipe import Recipe
from decompft.launcher.support import support_table

GIB = 1 << 30
GOLDEN = Path(__file__).parent / "golden"
TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 512,
}  # fmt: skip
LLAMA_7B, LLAMA_70B = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-70b-hf"
CPU = Machine(num_cores=2, host_memory_bytes=16 * GIB)


@pytest.fixture(autouse=True)
def no_hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)


def gpus(count: int, gib: float | None, host_gib: int = 512, name: str | None = None) -> Machine:
    memory = int(gib * GIB) if gib is not None else None
    return Machine(num_gpus=count, gpu_memory_bytes=memory, gpu_name=name, host_memory_bytes=host_gib * GIB)


def recipe(model: str | dict[str, Any] = LLAMA_7B, **sections: Any) -> Recipe:
    source = {"id": model} if isinstance(model, str) else {"config": model, "weights": "random"}
    data = {"train": [{"path": "/data/train.jsonl"}], "sequence_length": 2048 if model is not TINY else 256}
    train = {"max_steps": 100, "global_batch_size": 16}
    return Recipe.model_validate(
        {
            "name": "planned",
            "model": source,
            "adapter": {"method": "map", "targets": "all-linear"} | sections.pop("adapter", {}),
            "data": data | sections.pop("data", {}),
            "train": train | sections.pop("train", {}),
            **sections,
        }
    )


def make(machine: Machine, model: str | dict[str, Any] = LLAMA_7B, **sections: Any) -> Plan:
    return planner.make(recipe(model, **sections), machine=machine)


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
        (LLAMA_70B, 80, "ddp", "full", False),
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


def test_full_recomputation_only_when_needed() -> None:
    roomy, tight = (make(gpus(1, gib), train={"micro_batch_size": 4}) for gib in (80, 24))
    assert (roomy.recompute, tight.recompute) == ("none", "full")


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_named_strategy_is_kept_on_one_rank(strategy: str) -> None:
    assert make(gpus(1, 80), parallel={"strategy": strategy}).strategy == strategy


def test_single_with_several_ranks_is_refused() -> None:
    with pytest.raises(PlanError, match="one rank, but the world has 4") as error:
        make(gpus(4, 80), parallel={"strategy": "single"})
    assert "ddp" in error.value.hint


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
    assert plan.seconds_per_step == pytest.approx(16 * 2048 / 15_516, rel=0.01)
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


# --- refusals ---


def test_rank_above_the_smallest_target_names_the_layer() -> None:
    with pytest.raises(
        PlanError, match=r"adapter.rank: 48 .*\(32, model.layers.0.self_attn.k_proj\)"
    ) as error:
        make(CPU, TINY, adapter={"rank": 48})
    assert "rank <= 32" in error.value.hint and "k_proj" in error.value.hint
    assert make(CPU, TINY, adapter={"rank": 48, "targets": ["q_proj"]}).num_adapter_params


def test_width_that_blocks_do_not_divide_names_the_layer() -> None:
    with pytest.raises(PlanError, match=r"block_size: model.layers.\*.self_attn.q_proj is 64 wide") as error:
        make(CPU, TINY, quantization={"block_size": 128}, adapter={"targets": ["down_proj"]})
    assert "block_size: 64" in error.value.hint and "adapter.targets" in error.value.hint
    assert make(CPU, TINY, quantization={"block_size": 128, "format": "none"})


def test_target_without_a_match_is_an_adapter_error() -> None:
    with pytest.raises(AdapterError, match="near misses: q_proj"):
        make(CPU, TINY, adapter={"targets": ["q_prj"]})


@pytest.mark.parametrize(
    "machine, model, sections, hint",
    [
        (
            gpus(1, 24),
            LLAMA_7B,
            {"train": {"micro_batch_size": 4, "recompute": "none"}},
            "train.recompute: full",
        ),
        (
            gpus(1, 12),
            LLAMA_7B,
            {"train": {"micro_batch_size": 16, "recompute": "full"}},
            "micro_batch_size: 1",
        ),
        (gpus(1, 12), LLAMA_7B, {"quantization": {"format": "none"}}, "quantization.format: nf4"),
        (gpus(4, 24), LLAMA_70B, {"parallel": {"strategy": "ddp"}}, "parallel.strategy: fsdp"),
        (gpus(1, 20), LLAMA_70B, {"train": {"micro_batch_size": 1}}, "cpu_offload"),
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


@pytest.mark.parametrize(
    "sections, change",
    [
        (
            {"train": {"micro_batch_size": 4, "recompute": "none"}},
            {"train": {"micro_batch_size": 4, "recompute": "full"}},
        ),
        (
            {"quantization": {"format": "none"}, "train": {"micro_batch_size": 1}},
            {"train": {"micro_batch_size": 1}},
        ),
    ],
)
def test_the_named_change_really_fits(sections: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        make(gpus(1, 12), **sections)
    assert make(gpus(1, 12), **change)


def test_fit_without_headroom_warns() -> None:
    sections = {"train": {"micro_batch_size": 4, "recompute": "none"}}
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


def test_support_table_has_a_row_an_adapter() -> None:
    lines = support_table().splitlines()
    assert lines[0] == (
        "| adapter | base: none | base: nf4 | single | ddp | fsdp | causal-lm | sequence-classification |"
    )
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["`lora`", "`map`"]
    assert len({line.count("|") for line in lines}) == 1


# --- speed, and what is never imported ---


def test_plan_of_a_70b_is_quick_and_torch_free() -> None:
    code = (
        "import sys, time; start = time.process_time()\n"
        "from decompft.launcher import planner; from decompft.launcher.recipe import Recipe\n"
        "r = Recipe.model_validate_json(sys.argv[1]); p = planner.make(r); planner.show(p)\n"
        "heavy = [m for m in ('torch', 'transformers', 'numpy') if m in sys.modules]\n"
        "print(time.process_time() - start, *heavy)"
    )
    text = recipe(LLAMA_70B, parallel={"gpu_memory_gib": 80.0, "gpus_per_node": 8}).model_dump_json()
    done = subprocess.run([sys.executable, "-c", code, text], capture_output=True, text=True, check=True)
    seconds, *heavy = done.stdout.splitlines()[-1].split()
    assert not heavy
    # the bound is 0.5 s on two quiet cores
    assert float(seconds) < 0.5


# --- the machine ---

SMI = """81559, GPU-aaaa1111-2, NVIDIA H100 80GB HBM3
24564, GPU-bbbb2222-3, NVIDIA GeForce RTX 4090
[N/A], GPU-bbbb3333-4, NVIDIA GB10
"""


@pytest.mark.parametrize(
    "visible, names",
    [
        (None, ["NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090", "NVIDIA GB10"]),
        ("", []),
        ("-1", []),
        ("1", ["NVIDIA GeForce RTX 4090"]),
        ("1,0", ["NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3"]),
        ("0,9,1", ["NVIDIA H100 80GB HBM3"]),
        ("GPU-bbbb3", ["NVIDIA GB10"]),
        ("GPU-bbbb", []),
    ],
)
def test_visible_gpus_are_those_cuda_shows(visible: str | None, names: list[str]) -> None:
    assert [gpu.name for gpu in visible_gpus(parse_smi(SMI), visible)] == names


def fake_smi(folder: Path) -> None:
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\ncat <<'END'\n{SMI}END\n")
    script.chmod(0o755)


def test_machine_reads_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    machine = detect({})
    assert (machine.device, machine.num_gpus) == ("cuda", 3)
    assert machine.gpu_memory_bytes == 24564 << 20  # the smallest known one bounds the plan
    assert detect({"CUDA_VISIBLE_DEVICES": "0"}).gpu_memory_bytes == 81559 << 20
    forced = detect({"DECOMPFT_DEVICE": "cpu"})
    assert (forced.device, forced.num_gpus, forced.is_cpu_forced) == ("cpu", 0, True)


def test_machine_without_a_driver_is_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has a driver")
    best = min(_timed_detect() for _ in range(5))
    machine = detect({})
    assert best < 0.005
    assert machine.device == "cpu" and machine.num_cores >= 1 and machine.host_memory_bytes


def _timed_detect() -> float:
    start = time.perf_counter()
    detect({})
    return time.perf_counter() - start


def test_a_model_with_learned_positions_refuses_longer_rows() -> None:
    gpt2 = {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "vocab_size": 260,
    }
    with pytest.raises(PlanError, match="longer than the 128 positions that this gpt2 has weights for"):
        make(CPU, gpt2, data={"sequence_length": 256})
