"""A merged weight that is quantized again is a bitsandbytes checkpoint, to transformers and to us."""

from __future__ import annotations

import json

import pytest
import torch
from test_merge import CLOSE, FAMILIES, TOKENS, adapter_of, byte_folder, quiet, trained_over
from tiny import LLAMA, losses, make_run, run_ranks
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from decompft.adapters.frozen.base import FrozenLinear
from decompft.launcher.errors import AdapterError
from decompft.launcher.safetensors_header import read_headers
from decompft.launcher.worker.inference import load, open_adapter
from decompft.launcher.worker.merging import merge
from decompft.launcher.worker.tools.merge import main

pytestmark = pytest.mark.dist


def merged(adapter, into, out, **options):
    merge(open_adapter(adapter, base=None, say=quiet), into, out, progress=quiet, **options)
    return out


def plain(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def dequantized(model):
    """name -> weight (out, in) of every linear layer but the head, as transformers' model computes with it."""
    import bitsandbytes as bnb

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            found[name] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            found[name] = torch.ops.bitsandbytes.int8_vectorwise_dequant(
                module.weight.data, module.weight.SCB
            )
    return found


@pytest.mark.parametrize(
    ("form", "family"),
    [("nf4", "llama"), ("fp4", "llama"), ("int8", "llama"), ("nf4", "gpt2"), ("int8", "gpt2")],
)
def test_transformers_and_we_load_what_is_written(tmp_path, form, family):
    _, adapter = trained_over(tmp_path, family, quantization={"format": form})
    out = merged(adapter, "requantized", tmp_path / "out")
    weights = dequantized(plain(out))
    assert len(weights) == {"llama": 14, "gpt2": 8}[family]

    # bitsandbytes' own quantization of the dense merge gives the same bits
    options = (
        {"load_in_8bit": True} if form == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": form}
    )
    dense = merged(adapter, "dense", tmp_path / "dense")
    expected = dequantized(plain(dense, quantization_config=BitsAndBytesConfig(**options)))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        if form == "int8":  # theirs are rounded to float16 first: a step, where that crosses a border
            step = expected[name].abs().amax(1, keepdim=True) / 127
            rounding = 2**-10 * expected[name].abs()
            assert ((weight - expected[name]).abs() <= step + rounding).all()
            assert (weight - expected[name]).abs().mean() < 0.05 * step.mean()
        else:
            assert torch.equal(weight, expected[name]), name

    ours = load(None, base=str(out), say=quiet).model
    frozen = {n: m for n, m in ours.model.named_modules() if isinstance(m, FrozenLinear)}
    assert frozen.keys() == weights.keys()
    for name, layer in frozen.items():
        torch.testing.assert_close(layer.dense(torch.float32), weights[name], rtol=1e-6, atol=0)
    # transformers' own forward rounds int8's activations, and on some CPUs 4-bit products to bfloat16
    with torch.inference_mode():
        logits = ours.logits(TOKENS, None)
        torch.testing.assert_close(plain(out)(TOKENS).logits, logits, rtol=0, atol=0.1)
        torch.testing.assert_close(plain(out).dequantize()(TOKENS).logits, logits, **CLOSE)


def test_a_small_change_survives_because_it_is_onto_the_base_s_own_weights(tmp_path):
    """Quantized from where training quantized to, a change below half a step would leave no trace."""
    _, adapter = trained_over(tmp_path, "llama", adapter={"method": "lora", "alpha": 0.004})
    dense = plain(merged(adapter, "dense", tmp_path / "dense")).state_dict()
    used = plain(merged(adapter, "dequantized", tmp_path / "used")).state_dict()
    again = plain(merged(adapter, "requantized", tmp_path / "again")).dequantize().state_dict()
    bare = plain(tmp_path / "base").state_dict()
    along = total = 0.0
    for name in (n for n in dense if n.endswith("proj.weight")):
        change = dense[name] - bare[name]
        along += float(torch.sum((again[name] - (used[name] - change)) * change))
        total += float(torch.sum(change * change))
    assert 0.5 < along / total < 1.5, "rounding is without bias: on average the whole change is there"


def test_a_run_trains_over_a_requantized_model(tmp_path):
    _, adapter = trained_over(tmp_path / "first", "llama")
    out = merged(adapter, "requantized", tmp_path / "out")
    model = {"id": str(out), "config": None, "weights": "checkpoint"}
    run = make_run(tmp_path / "second", model=model)
    run_ranks(run)
    assert losses(run)[-1] < losses(run)[0]


def test_parts_of_a_weight_share_a_shard_and_untouched_layers_are_quantized_too(tmp_path):
    _, adapter = trained_over(tmp_path, "llama", adapter={"targets": ["q_proj"]})
    out = merged(adapter, "requantized", tmp_path / "out", shard_bytes=20_000)
    headers = read_headers(out)
    assert len(list(out.glob("*.safetensors"))) > 2
    for name, stored in headers.items():
        weight, is_part, _ = name.partition(".weight.")
        if is_part:
            assert headers[f"{weight}.weight"].path == stored.path, name
    assert len(dequantized(plain(out))) == 14


def test_what_the_base_holds_in_floats_stays_so(tmp_path, capsys):
    kept = "model.layers.1.mlp.gate_proj"
    base, _ = trained_over(tmp_path / "a", "llama")
    options = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head", kept]
    )
    AutoModelForCausalLM.from_pretrained(base, quantization_config=options).save_pretrained(tmp_path / "nf4")
    tokenizer = str(byte_folder(tmp_path))
    model = {"id": str(tmp_path / "nf4"), "config": None, "weights": "checkpoint", "tokenizer": tokenizer}
    adapter, out = adapter_of(tmp_path, model=model), tmp_path / "out"
    main([str(adapter), "--into", "requantized", "--out", str(out), "--no-check"])
    assert "quantized already: most of what was learned may be rounded away" in capsys.readouterr().err
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == [kept, "lm_head"]
    weights = dequantized(plain(out))
    assert len(weights) == 13 and kept not in weights
    ours = load(None, base=str(out), say=quiet).model.model
    torch.testing.assert_close(
        ours.get_submodule(kept).dense(torch.float32), plain(out).get_submodule(kept).weight, rtol=0, atol=0
    )


@pytest.mark.parametrize("width", [64, 66])  # 66 * 66 int8 codes are no multiple of four bytes
def test_int8_of_any_width_is_aligned(tmp_path, width, monkeypatch):
    odd = {
        **LLAMA,
        "hidden_size": width,
        "intermediate_size": 33,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    monkeypatch.setitem(FAMILIES, "odd", odd)
    _, adapter = trained_over(tmp_path, "odd", quantization={"format": "int8"}, adapter={"method": "lora"})
    out = merged(adapter, "requantized", tmp_path / "out")
    for name, stored in read_headers(out).items():
        assert stored.dtype != "F32" or stored.start % 4 == 0, name
    ours = load(None, base=str(out), say=quiet).model.model
    for name, weight in dequantized(plain(out)).items():
        torch.testing.assert_close(ours.get_submodule(name).dense(torch.float32), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("form", "words"), [("fp8", "trained over fp8"), ("none", "not quantized")])
def test_formats_without_a_layout_are_refused_and_told_what_works(tmp_path, form, words):
    _, adapter = trained_over(tmp_path, "llama", quantization={"format": form})
    with pytest.raises(AdapterError, match=words) as caught:
        main([str(adapter), "--into", "requantized", "--out", str(tmp_path / "out")])
    assert "--into dense" in caught.value.hint
    assert not (tmp_path / "out").exists()
