"""Runs whose adapters rewrite the base, or carry factors of it: trained, stopped, resumed, opened elsewhere."""

from __future__ import annotations

import pytest
import torch
from test_merge import CLOSE, TOKENS, byte_folder, checkpoint
from test_resume import TRAIN, continue_as, start
from tiny import LLAMA, losses, run_ranks
from tiny_models import NF4, built, plain_model
from tiny_models import section as section_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from decompft.adapters.frozen.fourbit import Nf4Linear
from decompft.launcher.errors import AdapterError
from decompft.launcher.recipe import AdapterSection
from decompft.launcher.worker.inference import load
from decompft.launcher.worker.restore import load_adapter

pytestmark = pytest.mark.dist

S = 2.0  # alpha 8 over rank 4
METHODS = {
    "pissa": {"method": "pissa"},
    "pissa-exact": {"method": "pissa", "options": {"base": "exact"}},
    "loftq": {"method": "lora", "options": {"init": "loftq", "loftq_iterations": 3}},
    "svft": {"method": "svft", "options": {"pattern": "random", "k": 8}},
}


def section(name):
    return {"rank": 4, "alpha": 8.0, "dropout": 0.0, **METHODS[name]}


@pytest.mark.parametrize(
    ("name", "world"),
    [*((n, "single") for n in METHODS), ("pissa", "fsdp"), ("pissa", "zero3"), ("loftq", "ddp")],
)
def test_stopped_and_resumed_equals_unbroken_bit_for_bit(tmp_path, name, world):
    adapter = {"adapter": section(name)}
    unbroken = start(tmp_path, "unbroken", world, **adapter)
    run_ranks(unbroken)
    first = start(tmp_path, "first", world, **adapter, train={**TRAIN, "stop_after_steps": 3})
    run_ranks(first)
    rest = continue_as(tmp_path, "rest", first, world, **adapter)
    assert losses(first) + losses(rest) == losses(unbroken)
    tensors, _ = load_adapter(rest.path / "adapter")
    expected, _ = load_adapter(unbroken.path / "adapter")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[n], expected[n]) for n in tensors)


@pytest.mark.parametrize("world", ["single", "zero2"])
def test_groups_that_decay_and_that_do_not_survive_a_resume(tmp_path, world):
    adapter = {"adapter": section("pissa") | {"overrides": [{"targets": "q_proj", "method": "lora"}]}}
    train = {**TRAIN, "weight_decay": 0.1}
    unbroken = start(tmp_path, "unbroken", world, **adapter, train=train)
    run_ranks(unbroken)
    first = start(tmp_path, "first", world, **adapter, train={**train, "stop_after_steps": 3})
    run_ranks(first)
    rest = continue_as(tmp_path, "rest", first, world, **adapter, train=train)
    assert losses(first) + losses(rest) == losses(unbroken)


@pytest.mark.parametrize("world", ["ddp", "fsdp", "zero3"])
def test_every_world_starts_from_the_same_residual(tmp_path, world):
    curves = []
    for one in ("single", world):
        run = start(tmp_path, one, one, adapter=section("pissa"))
        run_ranks(run)
        curves.append(losses(run))
    # the tolerance of the parity tests' fp32 cap
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def trained_over_a_checkpoint(tmp_path, name, **sections):
    """The folder of a base, and of an adapter that four steps were taken with over it, in nf4."""
    base = checkpoint(tmp_path / "base", LLAMA)
    tokenizer = str(byte_folder(tmp_path))
    model = {"id": str(base), "config": None, "weights": "checkpoint", "tokenizer": tokenizer}
    run = start(tmp_path, "run", model=model, adapter=section(name), **sections)
    run_ranks(run)
    return base, run.path / "adapter"


def test_pissa_over_a_checkpoint_computes_elsewhere_what_was_trained(tmp_path):
    """Against transformers' own model with dequantized residual + s B A put in, made here of the adapter's file."""
    base, adapter = trained_over_a_checkpoint(tmp_path, "pissa")
    tensors, _ = load_adapter(adapter)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    layers = {name.removesuffix(".A") for name in tensors if name.endswith(".A")}
    assert len(layers) == 2 * 7
    with torch.no_grad():
        for name in layers:
            A, B, A0, B0 = (tensors[f"{name}.{t}"] for t in ("A", "B", "A0", "B0"))
            assert not torch.equal(A, A0) and not torch.equal(B, B0)
            weight = plain.get_submodule(name).weight
            out, in_ = weight.shape
            quantizer = Nf4Linear(in_, out, block_size=64, double_quant=True, bias_dtype=None)
            rest = weight - S * (B0.double() @ A0.double()).float()
            weight.copy_(quantizer.unpack(quantizer.pack(rest), torch.float32) + S * B @ A)
    loaded = load(adapter, base=None, say=lambda line: None)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model.logits(TOKENS, None), plain(TOKENS).logits, **CLOSE)
        bare = load(adapter, base=None, use_adapter=False, say=lambda line: None)
        assert (bare.model.logits(TOKENS, None) - loaded.model.logits(TOKENS, None)).abs().max() > 1e-3


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A checkpoint in nf4, as transformers saves it."""
    plain, folder = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("nf4")
    plain_model(LLAMA).save_pretrained(plain)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "hint"), [("pissa", "base: exact"), ("loftq", "init: kaiming, or an unquantized checkpoint")]
)
def test_a_quantized_checkpoint_is_refused_in_words(quantized, name, hint):
    with pytest.raises(AdapterError, match="q_proj: ") as caught:
        built(section_of(quantized), NF4, AdapterSection(**section(name)))
    assert hint in caught.value.hint


def test_exact_takes_a_quantized_checkpoint_and_starts_as_it(quantized):
    plain = AdapterSection(method="lora", rank=4, alpha=8.0)
    logits = []
    for adapter in (plain, AdapterSection(**section("pissa-exact"))):
        with torch.inference_mode():
            logits.append(built(section_of(quantized), NF4, adapter).model.logits(TOKENS, None))
    torch.testing.assert_close(logits[1], logits[0], **CLOSE)


def test_a_weight_that_has_no_directions_is_named(tmp_path):
    base = checkpoint(tmp_path / "base", LLAMA)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(base)
    with pytest.raises(
        AdapterError, match=r"layers.1.mlp.up_proj: a weight .* holds entries that are not finite"
    ):
        built(section_of(base), NF4, AdapterSection(**section("svft")))
