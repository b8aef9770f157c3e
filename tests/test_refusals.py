"""What a plan refuses, in words and with the nearest thing that works."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from planning import CPU, LLAMA_7B, TINY, gpus, make
from pydantic import ValidationError
from rich.console import Console

from decompft.adapters.spec import ADAPTER_SPECS
from decompft.launcher import local
from decompft.launcher.errors import AdapterError, PlanError
from decompft.launcher.strategies import STRATEGIES

ZERO = [name for name, spec in STRATEGIES.items() if spec.is_deepspeed]


@pytest.fixture(autouse=True)
def no_hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))


def with_spec(monkeypatch: pytest.MonkeyPatch, *forbidden: str) -> dict[str, Any]:
    """A method that nothing but this test knows; returns the recipe's section."""
    spec = dataclasses.replace(ADAPTER_SPECS["lora"], name="picky", forbids_engines=forbidden)
    monkeypatch.setitem(ADAPTER_SPECS, "picky", spec)
    return {"adapter": {"method": "picky"}}


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


def test_single_with_several_ranks_is_refused() -> None:
    with pytest.raises(PlanError, match="one rank, but the world has 4") as error:
        make(gpus(4, 80), parallel={"strategy": "single"})
    assert "ddp" in error.value.hint


# --- adapters and optimizers that an engine cannot run ---


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_an_adapter_that_forbids_the_engine_is_refused_with_one_that_works(monkeypatch, strategy) -> None:
    sections = with_spec(monkeypatch, strategy)
    with pytest.raises(PlanError, match=f"adapter.method: picky does not run under {strategy}") as error:
        make(gpus(2, 80), parallel={"strategy": strategy}, **sections)
    nearest = error.value.hint.removeprefix("use parallel.strategy: ").split(" or ")[0]
    assert STRATEGIES[nearest].shards_base
    assert make(gpus(2, 80), parallel={"strategy": "ddp"}, **sections).strategy == "ddp"


def test_auto_passes_over_engines_that_the_adapter_forbids(monkeypatch) -> None:
    assert make(gpus(2, 80), **with_spec(monkeypatch, "ddp")).strategy == "fsdp"


def test_an_adapter_that_forbids_all_of_autos_engines_is_refused(monkeypatch) -> None:
    with pytest.raises(PlanError, match="nor under what strategy auto would take") as error:
        make(gpus(2, 80), **with_spec(monkeypatch, "ddp", "fsdp"))
    assert "parallel.strategy: " in error.value.hint


@pytest.mark.parametrize("strategy", ZERO)
def test_eight_bit_adam_under_deepspeed_is_refused(strategy) -> None:
    with pytest.raises(PlanError, match=f"adamw8bit does not run under {strategy}: .* whole blocks") as error:
        make(gpus(2, 80), parallel={"strategy": strategy}, train={"optimizer": "adamw8bit"})
    assert "adamw" in error.value.hint and "fsdp" in error.value.hint
    assert make(gpus(2, 80), parallel={"strategy": "fsdp"}, train={"optimizer": "adamw8bit"})


# --- fp8 and the GPU ---


def test_fp8_on_an_older_gpu_names_the_gpu_and_what_works() -> None:
    machine = gpus(1, 80, name="NVIDIA A100", capability=(8, 0))
    with pytest.raises(PlanError, match=r"fp8 needs .* 8.9 or higher, NVIDIA A100 has 8.0") as error:
        make(machine, quantization={"format": "fp8"})
    assert "int8" in error.value.hint and "nf4" in error.value.hint and "fp8" not in error.value.hint
    assert make(machine, quantization={"format": "int8"})


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (12, 0), None])
def test_fp8_is_planned_where_it_works_or_nothing_is_known(capability) -> None:
    assert make(gpus(1, 80, capability=capability), quantization={"format": "fp8"})


# --- hsdp's groups ---


@pytest.mark.parametrize(
    "world, size, said, hint",
    [
        ((1, 4), 1, "groups of one rank", "shard_size: 2, or strategy ddp"),
        ((1, 8), 3, "8 ranks do not divide into groups of 3", "shard_size: 2 or 4, or strategy fsdp"),
        ((1, 4), "auto", "4 ranks are one group of 4", "shard_size: 2, or strategy fsdp"),
        ((1, 2), "auto", "2 ranks are one group of 2", "use strategy fsdp"),
        ((1, 1), "auto", "groups of one rank", "use strategy ddp"),
    ],
)
def test_hsdp_groups_that_cannot_be_are_refused(world, size, said, hint) -> None:
    nodes, ranks = world
    parallel = {"strategy": "hsdp", "nodes": nodes, "gpus_per_node": ranks, "shard_size": size}
    with pytest.raises(PlanError, match=said) as error:
        make(gpus(ranks, 80), parallel=parallel)
    assert hint in error.value.hint


@pytest.mark.parametrize("world, size, found", [((2, 4), "auto", 4), ((1, 4), 2, 2), ((2, 4), 2, 2)])
def test_hsdp_shards_in_groups(world, size, found) -> None:
    nodes, ranks = world
    parallel = {"strategy": "hsdp", "nodes": nodes, "gpus_per_node": ranks, "shard_size": size}
    plan = make(gpus(ranks, 80), parallel=parallel)
    assert (plan.strategy, plan.shard_size) == ("hsdp", found)


# --- DeepSpeed's config, and its absence ---


@pytest.mark.parametrize("strategy", ZERO)
def test_a_deepspeed_plan_carries_the_config(strategy) -> None:
    plan = make(gpus(2, 80), parallel={"strategy": strategy})
    assert plan.deepspeed is not None
    assert plan.deepspeed["zero_optimization"]["stage"] == int(strategy[-1])
    assert plan.deepspeed["train_batch_size"] == plan.batch.global_size
    assert plan.shard_size == (2 if strategy == "zero3" else 1)
    assert make(gpus(2, 80), parallel={"strategy": "fsdp"}).deepspeed is None


def test_a_clash_with_the_plan_is_refused() -> None:
    parallel = {"strategy": "zero2", "deepspeed": {"train_batch_size": 3}}
    with pytest.raises(PlanError, match="parallel.deepspeed.train_batch_size"):
        make(gpus(2, 80), parallel=parallel)


def test_without_deepspeed_a_plan_warns_and_a_launch_refuses(monkeypatch, tmp_path) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "deepspeed" else known(n, *a))
    plan = make(CPU, TINY, parallel={"strategy": "zero2"})
    assert any("needs DeepSpeed" in w and "pip install" in w for w in plan.warnings)
    with pytest.raises(PlanError, match="zero2 needs DeepSpeed") as error:
        local.launch(plan, "", run_dir=tmp_path / "run", resume=None, console=Console())
    assert "pip install" in error.value.hint and not (tmp_path / "run").exists()
    assert not make(CPU, TINY).warnings


@pytest.mark.parametrize("strategy", sorted(STRATEGIES.keys() - {"hsdp"}))
def test_every_strategy_but_hsdp_runs_on_one_rank(strategy) -> None:
    plan = make(gpus(1, 80), LLAMA_7B, parallel={"strategy": strategy})
    assert (plan.strategy, plan.world.size, plan.shard_size) == (strategy, 1, 1)


GEMMA2 = {**TINY, "model_type": "gemma2", "head_dim": 16}


@pytest.mark.parametrize("wanted", ["varlen", "sdpa"])
@pytest.mark.parametrize("written", [{}, {"attn_logit_softcapping": 20.0}])
def test_an_attention_without_the_models_cap_of_scores_is_refused(
    wanted: str, written: dict[str, Any]
) -> None:
    with pytest.raises(PlanError, match=f"model.attention: {wanted} .*cap") as error:
        make(CPU, {**GEMMA2, **written}, attention=wanted)
    assert "auto" in error.value.hint
    assert make(CPU, {**GEMMA2, **written}, attention="eager")
    assert make(CPU, {**GEMMA2, "attn_logit_softcapping": None}, attention=wanted)


def test_variable_length_attention_is_refused_where_a_gpus_kernel_cannot() -> None:
    gpu, float32 = gpus(1, 80), {"quantization": {"compute": "float32"}}
    with pytest.raises(PlanError, match=r"varlen cannot run: .*quantization.compute is float32"):
        make(gpu, TINY, attention="varlen", **float32)
    with pytest.raises(PlanError, match=r"heads of a multiple of 8 up to 256, the model's have 264"):
        wide = {**TINY, "model_type": "qwen3", "head_dim": 264}
        make(gpu, wide, attention="varlen", quantization={"format": "none"})
    assert make(gpu, TINY, attention="varlen") and make(CPU, TINY, attention="varlen", **float32)
    assert make(gpu, TINY, **float32)  # auto falls back, in words


def test_variable_length_attention_is_refused_for_a_classifier() -> None:
    with pytest.raises(ValidationError, match="model.attention varlen is for packed rows"):
        make(
            CPU, TINY, attention="varlen", task="sequence-classification",
            data={"packing": False, "train": [{"path": "/data/a.jsonl", "format": "classification"}]},
        )  # fmt: skip
