"""`train.recompute_blocks`: the MLP's front again in some blocks, in the others norms and the activation alone."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from importlib import import_module

import pytest
import torch
from test_recompute import BF16, LORA, METHODS, assert_equal, batch, forecast_activations, gradients, kept
from tiny_models import FAMILIES, PLAIN, built, saved, section
from torch import Tensor

from decompft.launcher.worker.model import blocks


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_selective_in_some_blocks_has_no_other_numbers(tiny_llama, method, count) -> None:
    plain = gradients(tiny_llama, BF16, METHODS[method], "none")
    assert_equal(plain, gradients(tiny_llama, BF16, METHODS[method], "selective", count=count))


@pytest.mark.parametrize("some", [0, 4])
@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3", "gpt2"])
def test_selective_in_some_blocks_keeps_what_the_forecast_says(family, some) -> None:
    found, expected = (
        count(family, 6, "selective", "bfloat16", some=some) - count(family, 6, "selective", "bfloat16")
        for count in (kept, forecast_activations)
    )
    assert found == expected > 0


class OnCopies(torch.autograd.Function):
    """As Liger's activation: contiguous copies are saved, and written over in the backward pass."""

    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        part = torch.sigmoid(gate)
        d_gate, d_up = dy * up * part * (1 + gate * (1 - part)), dy * gate * part
        return gate.copy_(d_gate), up.copy_(d_up)


def test_an_activation_is_kept_where_more_would_be_kept_to_make_it_again(tmp_path, monkeypatch) -> None:
    """phi3's gate and up are halves of one output, which nobody keeps beside the copies."""
    phi3 = import_module("transformers.models.phi3.modeling_phi3")
    monkeypatch.setattr(
        phi3.Phi3MLP, "forward",
        lambda mlp, x: mlp.down_proj(OnCopies.apply(*mlp.gate_up_proj(x).chunk(2, dim=-1))),
    )  # fmt: skip
    assert kept("phi3", 6, "selective", "bfloat16", some=0) == kept("phi3", 6, "norms", "bfloat16")
    model = section(saved(tmp_path, FAMILIES["phi3"])[0])
    for method in ("lora", "dora"):  # which keeps that output for itself
        plain = gradients(model, PLAIN, METHODS[method], "none")
        assert_equal(plain, gradients(model, PLAIN, METHODS[method], "selective", count=0))


def test_only_the_first_blocks_run_their_mlp_again(tiny_llama) -> None:
    hf = built(tiny_llama, PLAIN, LORA, recompute="selective", recompute_blocks=1).model.train()
    runs: Counter[int] = Counter()
    for index, block in enumerate(blocks(hf.model)):
        block.mlp.gate_proj.register_forward_hook(lambda *_, index=index: runs.update([index]))
    hf(batch()).backward()
    assert runs == {0: 2, 1: 1}


def test_an_activation_that_is_made_again_is_not_kept(tiny_llama) -> None:
    """Its linears run once, itself twice, and nobody keeps it: gate and up are there."""
    hf = built(tiny_llama, PLAIN, LORA, recompute="selective", recompute_blocks=0).model.train()
    linears: Counter[str] = Counter()
    activations: Counter[str] = Counter()
    outputs: list[weakref.ref[Tensor]] = []
    for block in blocks(hf.model):
        for name in ("gate_proj", "up_proj", "down_proj"):
            block.mlp.get_submodule(name).register_forward_hook(lambda *_, name=name: linears.update([name]))
        block.mlp.act_fn.register_forward_hook(lambda *_: activations.update(["act_fn"]))
        block.mlp.down_proj.register_forward_pre_hook(lambda _, given: outputs.append(weakref.ref(given[0])))
    loss = hf(batch())
    gc.collect()
    assert [y() for y in outputs] == [None] * len(outputs)
    loss.backward()
    layers = FAMILIES["llama"]["num_hidden_layers"]
    assert set(linears.values()) == {layers} and activations == {"act_fn": 2 * layers}
