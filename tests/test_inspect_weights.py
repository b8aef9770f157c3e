"""`inspect weights`: the right tensors are read, the right way round, and the numbers are true."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from inspecting import Capture, adapter_over, layers_in_place, weights_json
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, saved

from decompft.launcher.errors import AdapterError, DecompftError, ModelError, UserError
from decompft.launcher.worker.tools import inspect_weights


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_every_linear_weight_is_read_the_right_way_round(
    family: str, tmp_path: Path, capsys: Capture
) -> None:
    folder, model = saved(tmp_path, FAMILIES[family])
    layers = weights_json(capsys, str(folder))
    linear = {
        n: m.weight.T if type(m).__name__ == "Conv1D" else m.weight
        for n, m in model.named_modules()
        if type(m).__name__ in ("Linear", "Conv1D") and n != "lm_head"
    }
    assert layers.keys() == linear.keys() and len(linear) >= 8
    for name, weight in linear.items():
        layer, wide = layers[name], weight.detach().double()
        assert (layer["out_features"], layer["in_features"]) == tuple(weight.shape)
        assert layer["distribution"]["std"] == pytest.approx(wide.std(correction=0).item(), rel=1e-6)
        assert layer["spectrum"]["top"][0] == pytest.approx(torch.linalg.svdvals(wide)[0].item(), rel=1e-6)
        pairs = (wide[:, :-1] - wide.mean(), wide[:, 1:] - wide.mean())
        lag = (pairs[0] * pairs[1]).mean() / wide.var(correction=0)
        assert layer["whiteness"]["row_autocorrelation"] == pytest.approx(lag.item(), abs=1e-6)


def test_a_quantized_checkpoint_is_inspected_as_it_is_used(
    llama: Path, tmp_path: Path, capsys: Capture
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, device_map="cpu").save_pretrained(
        tmp_path
    )
    packed = weights_json(capsys, str(tmp_path), "--layers", "q_proj")
    dense = weights_json(capsys, str(llama), "--layers", "q_proj")
    assert packed.keys() == dense.keys()
    for name in dense:
        quantized, exact = (found[name]["distribution"] for found in (packed, dense))
        assert quantized["zeros"] > 0.02 > exact["zeros"]  # nf4 has a code for 0
        assert quantized["std"] == pytest.approx(exact["std"], rel=0.05)


def test_layers_selects_and_names_near_misses(llama: Path, capsys: Capture) -> None:
    found = weights_json(capsys, str(llama), "--layers", "layers.1.mlp.*", "v_proj")
    assert set(found) == {
        *(f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")),
        *(f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)),
    }
    with pytest.raises(UserError, match=r"--layers: 'vproj' matches no layer; near misses: .*v_proj"):
        inspect_weights.main([str(llama), "--layers", "vproj"])


def test_tuned_compares_with_a_model_of_the_same_shapes(llama: Path, tmp_path: Path, capsys: Capture) -> None:
    tensors = load_file(llama / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    old = tensors[f"{name}.weight"].double()
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"] * 1.5 + 0.01
    for path in llama.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = weights_json(capsys, str(llama), "--tuned", str(tmp_path), "--layers", "q_proj")
    change = found[name]["comparison"]
    delta = tensors[f"{name}.weight"].double() - old
    assert change["delta_std"] == pytest.approx(delta.std(correction=0).item(), rel=1e-6)
    assert change["correlation"] == pytest.approx(1, abs=1e-6)
    assert change["delta_std_ratio"] == pytest.approx(0.5, rel=1e-5)
    same = found["model.layers.0.self_attn.q_proj"]["comparison"]
    assert (same["delta_norm"], same["correlation"]) == (0, None)
    inspect_weights.main([str(llama), "--tuned", str(tmp_path)])
    assert "std(dW)" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["lora", "map"])
def test_tuned_compares_with_an_adapter_merged(
    method: str, llama: Path, tmp_path: Path, capsys: Capture
) -> None:
    targets = ["q_proj", "down_proj"]
    folder, tensors = adapter_over(llama, tmp_path / "adapter", method=method, targets=targets)
    found = weights_json(capsys, str(llama), "--tuned", str(folder))
    base = load_file(llama / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    weight, part = base[f"{name}.weight"].double(), {n: tensors[f"{name}.{n}"].double() for n in ("A", "B")}
    delta = 2.0 * part["B"] @ part["A"]  # alpha / rank = 2
    if method == "map":
        a, b, norm = (tensors[f"{name}.{n}"].double() for n in ("a", "b", "base_norm"))
        delta = (a / (norm + 1e-6) - 1) * weight + b * delta / (delta.norm() + 1e-6)
    change = found[name]["comparison"]
    # the merged weight is float32: 6e-8 of W, over dW
    assert change["delta_std"] == pytest.approx(delta.std(correction=0).item(), rel=1e-5)
    assert change["delta_norm"] == pytest.approx(delta.norm().item(), rel=1e-5)
    assert found["model.layers.0.mlp.up_proj"]["comparison"]["delta_norm"] == 0


@pytest.mark.parametrize("method", ["liera", "vera"])
def test_tuned_takes_methods_that_have_no_factors_of_their_own(
    method: str, llama: Path, tmp_path: Path, capsys: Capture
) -> None:
    given = {"method": method, "targets": ["down_proj"]}
    folder, tensors = adapter_over(llama, tmp_path / "adapter", **given)
    found = weights_json(capsys, str(llama), "--tuned", str(folder), "--layers", "down_proj")
    for name, layer in layers_in_place(llama, given, tensors).items():
        weight = layer.base.dense(torch.float64)
        norm = (layer.merged(weight) - weight).norm().item()
        assert found[name]["comparison"]["delta_norm"] == pytest.approx(norm, rel=1e-5)


def test_weights_refuses_what_does_not_belong_together(llama: Path, tmp_path: Path) -> None:
    other, _ = saved(tmp_path / "other", {**FAMILIES["llama"], "intermediate_size": 192})
    with pytest.raises(ModelError, match=r"gate_proj has shape \[192, 64\], but .* has it as \[128, 64\]"):
        inspect_weights.main([str(llama), "--tuned", str(other)])
    adapter, _ = adapter_over(llama, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="trained over another base"):
        inspect_weights.main([str(other), "--tuned", str(adapter)])
    with pytest.raises(DecompftError, match="no/such does not exist|no file or folder"):
        inspect_weights.main(["./no/such"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out .*file"):
        inspect_weights.main([str(llama), "--out", str(tmp_path / "file")])


def test_a_weight_that_is_not_finite_is_named(llama: Path, tmp_path: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.nan
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight holds NaN"):
        inspect_weights.main([str(tmp_path)])
