"""Each family, built by us from transformers' own checkpoint, computes what transformers computes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, NF4, built, row, saved, section, single
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from decompft.adapters.frozen.base import FrozenLinear
from decompft.launcher.errors import ModelError, RunFailed
from decompft.launcher.recipe import AdapterSection, QuantizationSection
from decompft.launcher.worker.data.batches import collate
from decompft.launcher.worker.model import PLAIN_HEADS, LossModel, fill_buffers
from decompft.launcher.worker.proofs import prove_gradients

# float32 sums of up to 128 products in another order, through two layers
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
MAP = AdapterSection(method="map", rank=4, alpha=8.0)


@dataclass(frozen=True)
class Family:
    folder: Path
    plain: Any  # transformers' own model
    model: LossModel  # ours of the same checkpoint, nothing quantized, no adapter


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder, plain = saved(tmp_path_factory.mktemp(request.param), FAMILIES[request.param])
    return Family(folder, plain, built(section(folder)).model.eval())


@pytest.fixture(scope="module")
def adapted(family):
    """MAP over NF4."""
    return built(section(family.folder), NF4, MAP)


@pytest.fixture(scope="module")
def adapted_llama(tmp_path_factory):
    return built(section(saved(tmp_path_factory.mktemp("llama"), FAMILIES["llama"])[0]), NF4, MAP)


def batch():
    return collate([row((11, 9)), row((17,), seed=1)], pad_id=0)


def test_every_plain_head_is_tested():
    assert {fields["model_type"] for fields in FAMILIES.values()} == set(PLAIN_HEADS)


def test_logits_are_transformers_own(family):
    tokens = torch.from_numpy(row((21,)).tokens).long()[None]
    with torch.inference_mode():
        torch.testing.assert_close(family.model.logits(tokens, None), family.plain(tokens).logits, **CLOSE)


def test_loss_sum_is_transformers_mean_times_tokens(family):
    one = row((21,))
    tokens = torch.from_numpy(one.tokens).long()[None]
    labels = torch.where(torch.from_numpy(one.trained), tokens, -100)
    with torch.inference_mode():
        ours = family.model(collate([one], pad_id=0))
        theirs = family.plain(tokens, labels=labels).loss * one.num_targets
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_buffers_are_those_of_a_model_that_transformers_loads(family, compute):
    """They are in no checkpoint, and the memory they get at first is whatever lies there."""
    model = family.model.model
    if compute == "bfloat16":
        model = built(section(family.folder), QuantizationSection(format="none", compute=compute)).model.model
    fresh = AutoModelForCausalLM.from_pretrained(family.folder, dtype=getattr(torch, compute))
    found, expected = dict(model.named_buffers()), dict(fresh.named_buffers())
    assert found.keys() == expected.keys()
    for name, buffer in expected.items():
        assert found[name].dtype == buffer.dtype, name
        assert torch.equal(found[name], buffer), name


def test_frozen_tensors_are_the_checkpoints(family):
    model, expected = family.model.model, family.plain.state_dict()
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        turned = isinstance(module, FrozenLinear) and module.transposed and name.endswith("weight")
        assert torch.equal(parameter.T if turned else parameter, expected[name]), name
    tied = family.plain.get_output_embeddings().weight is family.plain.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_what_trains_is_each_linears_adapter_and_nothing_else(family, adapted):
    plain = family.plain
    names = {
        n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"
    }
    names -= {n for n, m in plain.named_modules() if m is plain.get_output_embeddings()}
    assert set(adapted.trained) == {f"{n}.{t}" for n in names for t in ("A", "B", "a", "b")}
    assert set(adapted.adapted) == names
    assert all(p.dtype == torch.float32 for p in adapted.trained.values())
    assert not any(
        p.requires_grad for n, p in adapted.model.model.named_parameters() if n not in adapted.trained
    )


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_an_adapter_starts_as_the_bare_base(name, tmp_path):
    folder, _ = saved(tmp_path, FAMILIES[name])
    bare, started = (built(section(folder), NF4, adapter).model.eval() for adapter in (None, MAP))
    with torch.inference_mode():
        # MAP divides by N(W) + eps
        torch.testing.assert_close(started(batch()), bare(batch()), rtol=1e-5, atol=1e-5)


def test_every_adapter_learns_over_nf4(adapted):
    """By the proofs' own rules at the first and third step."""
    adapted.model.train()
    for step in range(3):
        adapted.model.zero_grad()
        loss = adapted.model(batch())
        loss.backward()
        assert math.isfinite(loss.item())
        assert all(p.grad.isfinite().all() for p in adapted.trained.values())
        prove_gradients(adapted, single(), step)
        with torch.no_grad():
            for parameter in adapted.trained.values():
                parameter -= 1e-2 * parameter.grad.sign()


def test_loss_over_chunks_is_the_cross_entropy_of_all_logits(family, monkeypatch):
    monkeypatch.setattr("decompft.launcher.worker.loss.CHUNK_TOKENS", 7)
    packed, model = batch(), family.model
    head = model.model.get_output_embeddings().weight
    inputs = [model.hidden(packed.input_ids, packed.position_ids).requires_grad_(), head.requires_grad_()]
    monkeypatch.setattr(model, "hidden", lambda *_: inputs[0])
    try:
        ours = model(packed)
        whole = torch.nn.functional.cross_entropy(
            model.logits(packed.input_ids, None).flatten(0, 1), packed.targets.flatten(),
            ignore_index=-100, reduction="sum",
        )  # fmt: skip
        torch.testing.assert_close(ours, whole, **CLOSE)
        for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(whole, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    finally:
        head.requires_grad_(False)


def test_a_layer_before_a_norm_may_have_no_slope_in_its_scale_at_first(tmp_path):
    """Gemma 3's down_proj: its magnitude a has none until b D joins in, by luck of rounding exactly 0."""
    found = built(section(saved(tmp_path, FAMILIES["gemma3_text"])[0]), NF4, MAP)
    found.model(batch()).backward()
    found.trained["model.layers.0.mlp.down_proj.a"].grad.zero_()
    prove_gradients(found, single(), 0)


@pytest.mark.parametrize(
    ("name", "step"), [("mlp.down_proj.a", 2), ("mlp.down_proj.A", 2), ("mlp.down_proj.B", 0)]
)
@pytest.mark.parametrize("kind", ["zero", "none"])
def test_a_tensor_without_a_gradient_stops_the_run(adapted_llama, name, step, kind):
    found, name = adapted_llama, f"model.layers.1.{name}"
    for parameter in found.trained.values():
        parameter.grad = torch.full_like(parameter, 1e-30)
    prove_gradients(found, single(), step)
    found.trained[name].grad = None if kind == "none" else torch.zeros_like(found.trained[name])
    with pytest.raises(RunFailed, match=f"1 trained tensors have a zero gradient, first {name}"):
        prove_gradients(found, single(), step)


class WithTable(LlamaForCausalLM):
    """A model with a buffer that transformers' initialiser does not know."""

    def __init__(self, config):
        super().__init__(config)
        self.table = torch.nn.Buffer(torch.arange(4.0), persistent=False)


def test_a_buffer_that_nothing_computes_is_refused():
    fields = {k: v for k, v in FAMILIES["llama"].items() if k != "model_type"}
    with torch.device("meta"):
        model = WithTable(LlamaConfig(**fields))
    single().materialize(model)
    with pytest.raises(ModelError, match="nothing computes its buffer .*table"):
        fill_buffers(model)
