"""The memory forecast: terms against hand arithmetic, anchors against measurements."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from decompft.adapters.formats import FORMAT_SPECS
from decompft.adapters.spec import ADAPTER_SPECS
from decompft.launcher.deepspeed_config import make_config
from decompft.launcher.families import shape_of
from decompft.launcher.forecast import CHUNK_TOKENS, checkpoint_bytes, forecast
from decompft.launcher.forecast_fitted import (
    CPU_PROCESS_BYTES,
    GIB,
    NCCL_BYTES,
)
from decompft.launcher.known_models import known_config
from decompft.launcher.models import LinearShape
from decompft.launcher.plan import RUNTIME, Batch, Forecast
from decompft.launcher.recipe import ParallelSection, Recipe
from decompft.launcher.strategies import STRATEGIES
from decompft.launcher.workload import Layout, Workload, quantized_linears, weight_bytes, workload

TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip


def work(config: dict[str, Any] | str = TINY, task: str = "causal-lm", **sections: Any) -> Workload:
    config = known_config(config) or {} if isinstance(config, str) else config
    is_lm = task == "causal-lm"
    data = {
        "train": [{"path": "/d", "format": "instruction" if is_lm else "classification"}],
        "packing": is_lm,
    }
    recipe = Recipe.model_validate(
        {
            "model": {"config": config, "weights": "random", "task": task, "num_labels": 3},
            "quantization": sections.get("quantization", {}),
            "adapter": {"targets": "all-linear", **sections.get("adapter", {})},
            "data": {**data, "sequence_length": 2048, **sections.get("data", {})},
            "train": {"max_steps": 1, **sections.get("train", {})},
        }
    )
    return workload(shape_of(config, recipe.model.task, 3), recipe)


def layout(**changes: Any) -> Layout:
    given = {"device": "cuda", "strategy": "single", "world_size": 1, "micro_size": 4, "recompute": "none"}
    return Layout(**(given | changes))


def sizes(memory: Forecast) -> dict[str, int]:
    return {t.name: t.num_bytes for t in memory.terms}


def run(w: Workload, **changes: Any) -> dict[str, int]:
    return sizes(forecast(w, layout(**changes), capacity_bytes=None))


@pytest.mark.parametrize("recompute, measured_gib", [("none", 36.9), ("full", 7.7)])
def test_llama7b_is_within_five_percent_of_the_measurement(recompute: str, measured_gib: float) -> None:
    # one H200, LoRA rank 16, nf4 with double quantization, micro batch 4 (shared/gpu/README.md)
    w = work("meta-llama/Llama-2-7b-hf", adapter={"method": "lora"})
    memory = forecast(w, layout(recompute=recompute), capacity_bytes=None)
    assert memory.allocated_bytes / GIB == pytest.approx(measured_gib, rel=0.05)


def test_terms_sum_and_the_runtime_is_no_tensor() -> None:
    memory = forecast(work(), layout(), capacity_bytes=None)
    assert memory.total_bytes == sum(t.num_bytes for t in memory.terms)
    assert memory.total_bytes - memory.allocated_bytes == sizes(memory)[RUNTIME]


def stored(part: LinearShape, **quantization: Any) -> tuple[int, int]:
    return weight_bytes(part, work(quantization=quantization).recipe)


@pytest.mark.parametrize("double_quant, row_bytes", [(True, 8 + 8), (False, 5 * 4)])
def test_four_bit_bytes_count_rows_of_scales(double_quant: bool, row_bytes: int) -> None:
    # 320 wide: 5 blocks a row, padded to 8 bytes, and 8 bytes of float32 offset and step
    part = LinearShape(name="x", out=10, in_=320)
    for format in ("nf4", "fp4"):
        assert stored(part, format=format, double_quant=double_quant) == (10 * 160, 10 * row_bytes)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_eight_bit_bytes_are_a_byte_a_weight_and_a_scale_a_row(format: str) -> None:
    assert stored(LinearShape(name="x", out=10, in_=320), format=format) == (10 * 320, 10 * 4)


@pytest.mark.parametrize("format", [f for f, spec in FORMAT_SPECS.items() if spec.is_quantized])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [64, 128])
def test_forecast_bytes_are_those_of_the_real_layer(format: str, double_quant: bool, block_size: int) -> None:
    from decompft.launcher.worker.build import frozen_maker

    section = {"format": format, "block_size": block_size, "double_quant": double_quant}
    recipe = work(quantization=section).recipe
    layer = frozen_maker(recipe.quantization, torch.bfloat16)("x", 640, 48, None)
    real = [p.numel() * p.element_size() for p in layer.parameters()]
    assert sum(stored(LinearShape(name="x", out=48, in_=640), **section)) == sum(real)


def test_base_terms_by_hand() -> None:
    got = run(work(quantization={"format": "nf4", "double_quant": False}))
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    rest = 2 * 256 * 64 + 5 * 64  # embedding, head, five norms
    assert got["base weights"] == weights // 2
    assert got["quantization constants"] == weights // 64 * 4
    assert got["embeddings, head, norms, biases"] == rest * 2


@pytest.mark.parametrize(
    "dtype, compute, size", [("auto", "bfloat16", 2), ("auto", "float32", 4), ("float32", "bfloat16", 4)]
)
def test_dense_base_has_its_storage_dtype(dtype: str, compute: str, size: int) -> None:
    w = work(quantization={"format": "none", "compute": compute})
    recipe = w.recipe.model_copy(update={"model": w.recipe.model.model_copy(update={"dtype": dtype})})
    got = run(workload(w.shape, recipe))
    assert got["base weights"] == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128) * size
    assert "quantization constants" not in got
    assert ("cast weights" in got) == (dtype != "auto")


@pytest.mark.parametrize("method", sorted(ADAPTER_SPECS))
def test_trained_terms_follow_the_spec(method: str) -> None:
    w = work(adapter={"method": method, "rank": 8, "targets": ["q_proj", "k_proj"]})
    config = w.recipe.adapter.config()
    params = 2 * sum(ADAPTER_SPECS[method].num_params(out, 64, config) for out in (64, 32))
    got = run(w)
    assert w.num_adapter_params == params
    assert (got["adapter"], got["gradients"], got["optimizer"]) == (4 * params, 4 * params, 8 * params)


def test_eight_bit_optimizer_is_a_quarter() -> None:
    full, small = run(work()), run(work(train={"optimizer": "adamw8bit"}))
    assert small["optimizer"] == pytest.approx(full["optimizer"] / 4, rel=0.02)


def test_modules_trained_whole_move_from_frozen_to_float32() -> None:
    without, got = run(work()), run(work(adapter={"train_modules": ["lm_head"]}))
    assert got["modules trained whole"] == 256 * 64 * 4
    key = "embeddings, head, norms, biases"
    assert without[key] - got[key] == 256 * 64 * 2
    assert got["gradients"] - without["gradients"] == 256 * 64 * 4


def test_classification_head_is_trained_and_logits_are_few() -> None:
    w = work(task="sequence-classification")
    got = run(w)
    assert w.num_module_params == 3 * 64
    hidden = 4 * 2048 * 64 * 2
    assert got["logits and loss"] == 4 * 3 * 8 + 3 * hidden


def test_loss_comes_in_chunks() -> None:
    got = run(work())
    # on a GPU the kernel writes over the product, else float32 twice
    hidden = 3 * 4 * 2048 * 64 * 2
    assert got["logits and loss"] == CHUNK_TOKENS * 256 * 2 + hidden
    assert run(work(), device="cpu")["logits and loss"] == CHUNK_TOKENS * 256 * 8 + hidden
    tokens = run(work(adapter={"method": "lora", "train_tokens": ["x"]}))
    assert tokens["logits and loss"] == CHUNK_TOKENS * 256 * 8 + hidden


def test_chunks_are_those_of_the_loss() -> None:
    from decompft.launcher.worker import loss

    assert CHUNK_TOKENS == loss.CHUNK_TOKENS


def test_softcap_needs_another_copy_of_the_logits() -> None:
    small = TINY | {"model_type": "gemma2", "head_dim": 16, "tie_word_embeddings": False}
    capped, plain = run(work(small)), run(work(small | {"final_logit_softcapping": None}))
    assert capped["logits and loss"] - plain["logits and loss"] == CHUNK_TOKENS * 256 * (8 + 4 - 2)


def test_fsdp_accumulates_whole_gradients() -> None:
    w = work(train={"global_batch_size": 16})
    assert "accumulated gradients" not in run(w, strategy="fsdp", world_size=4, micro_size=4)
    got = run(w, strategy="fsdp", world_size=4, micro_size=1)
    assert got["accumulated gradients"] == w.num_adapter_params * 4


def test_activations_grow_with_tokens_and_layers_only_where_kept() -> None:
    one, two = run(work(), micro_size=1), run(work(), micro_size=2)
    assert two["activations"] == 2 * one["activations"]
    full = run(work(), micro_size=1, recompute="full")
    assert full["activations"] == 2048 * 64 * 2 * 2
    assert full["recomputed layer"] == one["activations"] // 2


def test_activations_of_a_layer_by_hand() -> None:
    # per token: 2 norm inputs and 2 norm outputs, q k v, attention's output, 3 x intermediate; log-sum; A x
    got = run(work(adapter={"rank": 4}), micro_size=1)
    elements = 4 * 64 + (64 + 2 * 32) + 64 + 3 * 128
    assert got["activations"] == 2048 * 2 * (elements * 2 + 4 * 4 + 7 * 4 * 2)


def test_dropout_keeps_dropped_inputs() -> None:
    without, got = run(work(), micro_size=1), run(work(adapter={"dropout": 0.1}), micro_size=1)
    inputs = 6 * 64 + 128
    assert got["activations"] - without["activations"] == 2048 * 2 * inputs * 3


def test_eager_layers_keep_more() -> None:
    fused, eager = run(work()), run(work(), device="cpu")
    assert eager["activations"] > fused["activations"]
    assert eager[RUNTIME] == CPU_PROCESS_BYTES


def test_fsdp_divides_states_and_adds_gathered_blocks() -> None:
    one = run(work("meta-llama/Llama-2-7b-hf"))
    four = run(work("meta-llama/Llama-2-7b-hf"), strategy="fsdp", world_size=4)
    for name in ("base weights", "quantization constants", "adapter", "gradients", "optimizer"):
        assert four[name] == math.ceil(one[name] / 4), name
    layers = 2 * (one["base weights"] + one["quantization constants"]) / 32
    embeddings = one["embeddings, head, norms, biases"]
    assert layers + embeddings < four["gathered blocks"] < 1.2 * (layers + embeddings)
    assert four["activations"] == one["activations"]


def test_ddp_reduces_in_the_gradients_themselves() -> None:
    one, two = run(work()), run(work(), strategy="ddp", world_size=2)
    assert set(one) == set(two)
    assert {n for n in one if one[n] != two[n]} == {RUNTIME}  # NCCL


def test_offload_moves_states_to_the_host() -> None:
    w = work("meta-llama/Llama-2-7b-hf")
    memory = forecast(
        w, layout(strategy="fsdp", world_size=2, cpu_offload=True), capacity_bytes=None, host_capacity_bytes=7
    )
    assert "base weights" not in sizes(memory)
    assert "gathered blocks" in sizes(memory)
    host = {t.name: t.num_bytes for t in memory.host_terms}
    assert host["base weights"] == run(w)["base weights"] // 2
    assert memory.host_capacity_bytes == 7


def test_hsdp_cuts_by_its_group_and_needs_no_less_than_fsdp() -> None:
    w = work("meta-llama/Llama-2-7b-hf")
    one, eight = run(w), run(w, strategy="hsdp", world_size=8, group_size=4)
    for name in ("base weights", "adapter", "gradients", "optimizer"):
        assert eight[name] == math.ceil(one[name] / 4), name
    assert eight["gathered blocks"] == run(w, strategy="fsdp", world_size=4)["gathered blocks"]


def test_zero_cuts_what_its_stage_cuts() -> None:
    w = work("meta-llama/Llama-2-7b-hf")
    trained = 4 * w.num_adapter_params
    base = run(w)["base weights"]
    by_stage = {name: run(w, strategy=name, world_size=4) for name in ("zero1", "zero2", "zero3")}
    assert [g["base weights"] * n // base for g, n in zip(by_stage.values(), (1, 1, 4), strict=True)] == [
        1,
        1,
        1,
    ]
    assert [g["adapter"] for g in by_stage.values()] == [trained, trained, trained // 4]
    assert [g["gradients"] for g in by_stage.values()] == [trained, trained // 4, trained // 4]
    assert {g["optimizer"] for g in by_stage.values()} == {trained // 2}
    # ZeRO-1 and 2 step a copy of their partition, ZeRO-3 its own pieces
    assert [g.get("master weights") for g in by_stage.values()] == [trained // 4, trained // 4, None]


def test_zero_holds_buckets_of_the_size_that_its_config_sets() -> None:
    recipe = work(train={"global_batch_size": 8}).recipe
    for strategy, buffers in (("zero1", 2), ("zero2", 2), ("zero3", 1)):
        batch = Batch(global_size=8, micro_size=4, accumulation=1, tokens_per_step=1)
        config = make_config(
            recipe, strategy=strategy, batch=batch, world_size=2, cpu_offload=False, hidden=64
        )
        zero = config["zero_optimization"]
        assert zero["contiguous_gradients"] and zero["overlap_comm"]
        got = run(work(), strategy=strategy, world_size=2)
        assert got["reduction buckets"] == buffers * zero["reduce_bucket_size"] * 4


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_buckets_on_a_cpu_are_never_touched_and_not_counted(strategy: str) -> None:
    assert "reduction buckets" not in run(work(), strategy=strategy, world_size=2, device="cpu")


def test_zero3_gathers_a_part_of_the_model_and_never_more_than_all() -> None:
    large, small = work("meta-llama/Llama-2-70b-hf"), work()
    got = run(large, strategy="zero3", world_size=4)["gathered parameters"]
    layer = run(large)["base weights"] / 80
    assert layer < got < 10 * layer
    everything = sum(run(small)[n] for n in ("base weights", "quantization constants", "adapter"))
    assert run(small, strategy="zero3", world_size=2)["gathered parameters"] < 2 * everything
    assert "gathered parameters" not in run(small, strategy="zero3", world_size=1)


def test_zero3_keeps_less_where_the_recipe_says_so() -> None:
    def gathered(zero: Any) -> int:
        w = work("meta-llama/Llama-2-7b-hf")
        parallel = ParallelSection(strategy="zero3", deepspeed={"zero_optimization": zero})
        w = dataclasses.replace(w, recipe=w.recipe.model_copy(update={"parallel": parallel}))
        return run(w, strategy="zero3", world_size=2)["gathered parameters"]

    assert gathered({}) - gathered({"stage3_max_reuse_distance": 0}) == 1_000_000_000
    assert gathered("nonsense") == gathered({})  # DeepSpeed's config refuses it in words


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_is_held_twice_by_more_ranks(strategy: str) -> None:
    """More ranks never need more memory than fewer, but for NCCL, buckets and gathered parameters."""
    w = work("meta-llama/Llama-2-7b-hf")
    states = ("base weights", "adapter", "gradients", "optimizer", "master weights")
    one, four = (run(w, strategy=strategy, world_size=n) for n in (1, 4))
    spec = STRATEGIES[strategy]
    assert sum(four.get(n, 0) for n in states) <= sum(one.get(n, 0) for n in states)
    assert (four["base weights"] < one["base weights"]) == spec.shards_base
    assert (four["gradients"] < one["gradients"]) == spec.shards_gradients
    assert (four["optimizer"] < one["optimizer"]) == spec.shards_optimizer


def test_every_strategy_has_its_nccl() -> None:
    assert NCCL_BYTES.keys() == STRATEGIES.keys()


@pytest.mark.parametrize(
    "format, gib", [("none", 12.06), ("int8", 6.03), ("fp8", 6.03), ("nf4", 3.02), ("fp4", 3.02)]
)
def test_base_of_a_7b_in_every_format(format: str, gib: float) -> None:
    got = run(work("meta-llama/Llama-2-7b-hf", quantization={"format": format}))
    assert got["base weights"] / GIB == pytest.approx(gib, abs=0.01)
    assert ("dequantized weights" in got) == (format != "none")


def test_int8_with_outliers_multiplies_forward_and_dequantizes_backward() -> None:
    int8 = {"format": "int8", "outlier_threshold": 6.0}
    few, many = (run(work("meta-llama/Llama-2-7b-hf", quantization=int8), micro_size=n) for n in (1, 8))
    # few tokens: the backward pass's dequantized weights are larger; many: the product in int32
    assert few["dequantized weights"] == 2 * 11008 * 4096 * 2
    assert many["int8 product of weights"] == 8 * 2048 * (4096 + 4 * 11008)
    assert "dequantized weights" not in many


def test_loading_counts_only_beyond_what_training_takes() -> None:
    assert "loading" not in run(work("meta-llama/Llama-2-7b-hf"), micro_size=1)
    wide = work(
        TINY | {"vocab_size": 4_000_000}, data={"sequence_length": 8}, adapter={"targets": ["q_proj"]}
    )
    got = run(wide, micro_size=1)
    beside = sum(got.get(n, 0) for n in ("activations", "logits and loss", "dequantized weights"))
    slice_bytes = 4_000_000 * 64 * 2
    assert got["loading"] == slice_bytes + (64 << 20) - beside


def test_host_memory_holds_two_slices_while_loading() -> None:
    w = work("meta-llama/Llama-2-7b-hf")
    for shards in (1, 4):
        memory = forecast(w, layout(strategy="fsdp", world_size=shards), capacity_bytes=None)
        host = {t.name: t.num_bytes for t in memory.host_terms}
        assert host["loading"] == 2 * 32000 * 4096 * 2 // shards


def test_offload_pins_powers_of_two() -> None:
    w = work("meta-llama/Llama-2-7b-hf")

    def host(strategy: str) -> dict[str, int]:
        memory = forecast(w, layout(strategy=strategy, world_size=2, cpu_offload=True), capacity_bytes=None)
        return {t.name: t.num_bytes for t in memory.host_terms}

    # gate, up and down: 22.5 million bytes of codes a rank's half in 16 MiB
    codes = 3 * 32 * ((16 << 20) - 11008 * 4096 // 2 // 2)
    assert codes < host("fsdp")["pinned rounding"] < 2 * codes
    assert host("zero3")["pinned rounding"] == host("fsdp")["pinned rounding"]
    assert host("zero3")["master weights"] == host("zero3")["adapter"]


def test_a_checkpoint_is_weights_moments_and_the_adapters_file() -> None:
    w = work(adapter={"train_modules": ["lm_head"]})
    fixed = w.num_adapter_fixed  # the state and the adapter's own file each hold them, once
    assert fixed == 14  # a norm for each of two layers' seven matrices
    assert checkpoint_bytes(w) == 16 * (w.num_adapter_params + 256 * 64) + 2 * 4 * fixed


def test_all_linears_but_the_head_are_quantized() -> None:
    w = work(
        {"model_type": "bert", "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128},
        task="sequence-classification",
        adapter={"targets": ["query"]},
    )
    names = [x.name for x in quantized_linears(w.shape, w.recipe)]
    assert len(names) == 7 and "bert.pooler.dense" in names and "classifier" not in names
