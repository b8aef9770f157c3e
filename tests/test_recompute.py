"""Recomputation changes no number, and keeps what its mode says."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from planning import CPU, recipe
from tiny_models import FAMILIES, NF4, PLAIN, built, row, saved, section
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from decompft.adapters.base import Adapter
from decompft.adapters.frozen.base import FrozenLinear
from decompft.launcher.planner import make as make_plan
from decompft.launcher.recipe import AdapterSection, ModelSection, QuantizationSection
from decompft.launcher.recompute import BY_PIECES, MODES, pieces_of
from decompft.launcher.worker.data.batches import collate
from decompft.launcher.worker.host_inputs import HostInputs
from decompft.launcher.worker.model import blocks

AGAIN = [mode for mode in MODES if mode != "none"]
LORA = AdapterSection(method="lora", rank=4, alpha=8.0)
BF16 = QuantizationSection(format="nf4", compute="bfloat16")
METHODS = {
    "lora": LORA,
    "map": AdapterSection(method="map", rank=4, alpha=8.0),
    "dora": AdapterSection(method="dora", rank=4, alpha=8.0),
    "liera": AdapterSection(method="liera", rank=4, alpha=8.0),
    "ia3": AdapterSection(method="ia3"),
    "lora-dropout": AdapterSection(method="lora", rank=4, alpha=8.0, dropout=0.3),
    "norms-too": AdapterSection(method="lora", rank=4, alpha=8.0, train_modules=["*norm*"]),
}


def batch():
    return collate([row((9, 1, 13)), row((20,), seed=1)], pad_id=0)


def gradients(model: ModelSection, quantization, adapter, mode, *, passes: int = 2, count: int | None = None):
    """Losses and summed gradients of two micro batches, from a start that has slopes everywhere."""
    found = built(model, quantization, adapter, recompute=mode, recompute_blocks=count)
    moved = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.trained.values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=moved)
    found.model.train()
    torch.manual_seed(5)
    losses = []
    for _ in range(passes):
        loss = found.model(batch())
        loss.backward()
        losses.append(loss.item())
    # the numbers drawn after it are the same, too
    losses.append(torch.rand(()).item())
    return losses, {n: p.grad for n, p in found.trained.items()}


def assert_equal(one, other) -> None:
    assert one[0] == other[0]
    for name, grad in one[1].items():
        assert torch.equal(grad, other[1][name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_has_other_numbers(tmp_path, family) -> None:
    model = section(saved(tmp_path, FAMILIES[family])[0])
    plain = gradients(model, PLAIN, LORA, "none")
    for mode in AGAIN:
        assert_equal(plain, gradients(model, PLAIN, LORA, mode))
    assert_equal(plain, gradients(model, PLAIN, LORA, "selective", count=0))


@pytest.mark.parametrize("compute", [NF4, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_no_method_has_other_numbers(tiny_llama, method, compute) -> None:
    plain = gradients(tiny_llama, compute, METHODS[method], "none")
    for mode in AGAIN:
        assert_equal(plain, gradients(tiny_llama, compute, METHODS[method], mode))


# --- what is run again ---


def products(
    model: ModelSection, adapter: AdapterSection, mode, monkeypatch: pytest.MonkeyPatch
) -> Counter[str]:
    """How often each linear of the first block is multiplied with in a forward and backward pass."""
    found = built(model, PLAIN, adapter, recompute=mode)
    names = {m: n for n, m in blocks(found.model.model)[0].named_modules() if isinstance(m, FrozenLinear)}
    counted: Counter[str] = Counter()
    original = FrozenLinear.product

    def counting(self: FrozenLinear, *args: Any, **kwargs: Any) -> Tensor:
        if self in names:
            counted[names[self].removesuffix(".base").rpartition(".")[2]] += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(FrozenLinear, "product", counting)
    found.model.train()(batch()).backward()
    monkeypatch.undo()
    return counted


@pytest.mark.parametrize("mode", ["full", "offloaded"])
@pytest.mark.parametrize("method", ["lora", "map", "dora", "ia3"])
def test_the_last_product_of_a_block_is_not_run_again(tiny_llama, method, mode, monkeypatch) -> None:
    """But under a scale of rows, whose slope reads it."""
    counted = products(tiny_llama, METHODS[method], mode, monkeypatch)
    last = counted.pop("down_proj")
    assert last == (2 if method in ("dora", "ia3") else 1) and set(counted.values()) == {2}


def test_a_norm_after_the_mlp_reads_its_output(tmp_path, monkeypatch) -> None:
    model = section(saved(tmp_path, FAMILIES["gemma2"])[0])
    assert set(products(model, LORA, "full", monkeypatch).values()) == {2}


# --- what is kept ---


def sized(family: str, layers: int) -> dict:
    fields = {**FAMILIES[family], "n_layer" if family == "gpt2" else "num_hidden_layers": layers}
    return fields


@contextmanager
def memory_told() -> Iterator[profile]:
    """torch's allocator alone speaks: no model of an earlier test is collected meanwhile."""
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
            yield told
    finally:
        gc.enable()


def kept(
    family: str, layers: int, mode, compute: str, adapter: AdapterSection = LORA, some: int | None = None
) -> int:
    """Bytes that a forward pass of 64 tokens leaves in memory, by what torch's allocator reports."""
    quantization = QuantizationSection(format="none", compute=compute)
    source = ModelSection(config=sized(family, layers), weights="random")
    model = built(source, quantization, adapter, recompute=mode, recompute_blocks=some).model.train()
    one = collate([row((64,))], pad_id=0)
    model(one).backward()  # what is made once, gradients and buffers among it
    with memory_told() as told:
        loss = model(one)
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in told.key_averages())


def forecast_activations(
    family: str, layers: int, mode, compute: str, adapter: AdapterSection = LORA, some: int | None = None
) -> int:
    data = {"sequence_length": 64, "packing": True}
    train = {"global_batch_size": 1, "micro_batch_size": 1, "recompute": mode, "recompute_blocks": some}
    asked = recipe(
        sized(family, layers), data=data, train=train, quantization={"format": "none", "compute": compute},
        adapter=adapter.model_dump(exclude_unset=True),
    )  # fmt: skip
    (term,) = [t for t in make_plan(asked, machine=CPU).forecast.terms if t.name == "activations"]
    return term.num_bytes


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3", "gpt2"])
def test_a_layer_keeps_what_the_forecast_says(family, compute) -> None:
    found, expected = {}, {}
    for mode in ("none", "norms", "selective", "full"):
        # of two layers more: embeddings, head and loss fall out
        found[mode], expected[mode] = (
            count(family, 4, mode, compute) - count(family, 2, mode, compute)
            for count in (kept, forecast_activations)
        )
    # a layer norm's means and deviations, float32, and torch's checkpoint of the generator's state
    for mode in ("norms", "selective"):
        assert found[mode] == pytest.approx(expected[mode], abs=2 * 64 * 16), mode
    assert found["full"] - expected["full"] in range(0, 2 * 6000)
    assert found["none"] > found["norms"] > found["selective"] > found["full"]


@pytest.mark.parametrize("compute", ["bfloat16", "fp8"])
@pytest.mark.parametrize("method", ["lora-dropout", "dora", "liera", "ia3"])
def test_no_method_keeps_a_norms_output_for_itself(method, compute) -> None:
    """A linear by itself (dropout, LieRA), one that scales its input (ia3) or its rows (dora), and fp8 products."""
    saves = [
        [count("llama", n, mode, compute, METHODS[method]) for n in (4, 2) for mode in ("none", "norms")]
        for count in (kept, forecast_activations)
    ]
    found, expected = (none4 - norms4 - (none2 - norms2) for none4, norms4, none2, norms2 in saves)
    # two norms of two layers keep a float32 a token, too
    assert 0 <= found - expected <= 2 * 2 * 64 * 4


@pytest.mark.parametrize(("mode", "some"), [*((mode, None) for mode in MODES), ("selective", 0)])
@pytest.mark.parametrize("method", ["lora", "lora-dropout", "dora"])
def test_a_step_leaves_nothing_behind(tiny_llama, method, mode, some) -> None:
    model = built(tiny_llama, PLAIN, METHODS[method], recompute=mode, recompute_blocks=some).model.train()
    model(batch()).backward()
    with memory_told() as told:
        model(batch()).backward()
    assert sum(event.self_cpu_memory_usage for event in told.key_averages()) == 0


def test_selective_runs_the_front_of_the_mlp_again_and_nothing_else(tiny_llama) -> None:
    hf = built(tiny_llama, PLAIN, LORA, recompute="selective").model.train()
    runs: Counter[str] = Counter()
    for name, module in hf.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(lambda *_, name=name: runs.update([name.rpartition(".")[2]]))
    hf(batch()).backward()
    layers = FAMILIES["llama"]["num_hidden_layers"]
    once = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"), layers)
    assert runs == once | {"gate_proj": 2 * layers, "up_proj": 2 * layers}


def test_norms_run_twice_and_nothing_else(tiny_llama) -> None:
    """Once more for all that read its output: q, k and v, or gate and up, and the norm's own backward pass."""
    hf = built(tiny_llama, PLAIN, LORA, recompute="norms").model.train()
    runs: Counter[str] = Counter()
    for name, module in hf.named_modules():
        if name.endswith(("_proj", "norm")):
            module.register_forward_hook(lambda *_, name=name: runs.update([name.rpartition(".")[2]]))
    hf(batch()).backward()
    layers = FAMILIES["llama"]["num_hidden_layers"]
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    norms = ("input_layernorm", "post_attention_layernorm")
    assert runs == {"norm": 1} | dict.fromkeys(linears, layers) | dict.fromkeys(norms, 2 * layers)


@pytest.mark.parametrize("mode", BY_PIECES)
def test_a_graph_may_be_walked_twice(tiny_llama, mode) -> None:
    found = built(tiny_llama, PLAIN, LORA, recompute=mode)
    loss = found.model.train()(batch())
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in found.trained.items()}
    loss.backward()
    assert all(torch.equal(p.grad, 2 * once[n]) for n, p in found.trained.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pieces_are_modules_of_the_family(tmp_path, family) -> None:
    """All but norms that only some configs have are there, and the last linear ends the MLP."""
    hf = built(section(saved(tmp_path, FAMILIES[family])[0]), PLAIN, LORA).model.model
    pieces = pieces_of(hf.config.model_type)
    for block in blocks(hf):
        assert all(name in dict(block.named_modules()) for name in pieces.norms)
        linears = [n for n, m in block.get_submodule(pieces.mlp).named_children() if isinstance(m, Adapter)]
        assert pieces.last in linears and len(linears) > 1


# --- inputs on the host ---


def test_buffers_on_the_host_are_used_again_and_grow() -> None:
    host = HostInputs()
    small, large = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(3, 4)
    for step in range(3):
        away = [host.put(small + i + step) for i in range(3)]
        for i in reversed(range(3)):
            assert torch.equal(host.get(away[i]), small + i + step)
        assert len(host._free) == 3
    assert torch.equal(host.get(host.put(large)), large)
    assert [raw.nbytes for raw in host._free] == [large.nbytes]


def test_an_input_is_got_once() -> None:
    host = HostInputs()
    away = host.put(torch.ones(2))
    host.get(away)
    with pytest.raises(AssertionError, match="asked for twice"):
        host.get(away)


@pytest.mark.parametrize("mode", ["full", "offloaded"])
def test_nobody_holds_an_input_that_has_left(tiny_llama, mode) -> None:
    model = built(tiny_llama, PLAIN, LORA, recompute=mode).model.train()
    inputs = []
    for block in blocks(model.model):
        block.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    loss = model(batch())
    gc.collect()
    held = [ref() is not None for ref in inputs[1:]]  # the first is the embedding's output
    assert held and held == [mode == "full"] * len(held), held
    loss.backward()


def test_a_graph_that_is_dropped_takes_its_inputs_with_it(tiny_llama) -> None:
    model = built(tiny_llama, PLAIN, LORA, recompute="offloaded").model.train()
    model(batch())
    loss = model(batch())
    loss.backward()  # gets its own, not those of the pass before
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


class _RotaryInPlace(torch.autograd.Function):
    """As Liger's: it writes over q and k, unseen by autograd."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        q, k = (t.transpose(1, 2).contiguous() for t in (q, k))
        for each in (q, k):
            each.data.copy_(_turned(each, cos.unsqueeze(2), sin.unsqueeze(2)))
        return q.transpose(1, 2), k.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = (t.unsqueeze(1) for t in ctx.saved_tensors)
        return (*(_turned(slope, cos, -sin) for slope in slopes), None, None)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


@pytest.mark.parametrize("lengths", [(9, 1, 13), (20,)])
@pytest.mark.parametrize(("family", "heads"), [("qwen3", {}), ("gemma3_text", {"num_key_value_heads": 1})])
def test_a_rotary_that_writes_in_place_is_not_undone(monkeypatch, family, heads, lengths) -> None:
    """q and k come out of norms that are run again: what attention saved lies there, turned."""
    module = import_module(
        f"transformers.models.{family.removesuffix('_text')}.modeling_{family.removesuffix('_text')}"
    )
    monkeypatch.setattr(
        module, "apply_rotary_pos_emb", lambda q, k, cos, sin, *_, **__: _RotaryInPlace.apply(q, k, cos, sin)
    )
    config = {**FAMILIES[family], **heads} | ({"sliding_window": 64} if heads else {})
    found = []
    for mode in ("none", *BY_PIECES):
        source = ModelSection(config=config, weights="random")
        made = built(source, PLAIN, LORA, recompute=mode)
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in made.trained.values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
        loss = made.model.train()(collate([row(lengths)], pad_id=0))
        found.append((loss, *torch.autograd.grad(loss, list(made.trained.values()))))
    for kept_whole, *run_again in zip(*found, strict=True):
        assert all(torch.equal(kept_whole, again) for again in run_again)
