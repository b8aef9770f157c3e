"""`inspect weights` and `inspect adapter`: the right tensors are read, and what is printed and written is true."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapter_contract import VARIANTS
from tiny_models import FAMILIES, PLAIN, built, saved, section, single

from decompft.adapters.inject import adapters
from decompft.launcher.cli import main as cli
from decompft.launcher.errors import AdapterError, DecompftError, ModelError, UserError
from decompft.launcher.recipe import AdapterSection
from decompft.launcher.worker.checkpoint import save_adapter
from decompft.launcher.worker.inspecting.layers import layers_of
from decompft.launcher.worker.modelfiles import identity
from decompft.launcher.worker.state import place_adapter
from decompft.launcher.worker.tools import inspect, inspect_adapter, inspect_weights

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("llama"), FAMILIES["llama"])[0]


def adapter_over(base: Path, folder: Path, **fields: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter's folder, every trained tensor far from its start, and its tensors."""
    given = AdapterSection(**{"method": "lora", "rank": 4, "alpha": 8.0, **fields})
    made = built(section(base), adapter=given)
    torch.manual_seed(7)
    tensors = {n: p.detach() + 0.1 * torch.randn(p.shape) for n, p in made.trained.items()}
    tensors |= {n: b.detach().clone() for n, b in made.buffers.items()}
    description = {
        "adapter": given.model_dump(mode="json", exclude_unset=True),
        "formulas": {"lora": {"title": "a formula", "source": "a paper", "is_reading": False}},
        "model": section(base).model_dump(mode="json"),
        "quantization": PLAIN.model_dump(mode="json"),
        "seed": 0,
        "base": identity(base) | {"id": str(base)},
        "data_formats": ["text"],
        "step": 5,
    }
    save_adapter(folder, tensors, description)
    return folder, tensors


def weights_json(capsys: Capture, *argv: str) -> dict[str, dict[str, Any]]:
    capsys.readouterr()  # what libraries said while a model was saved
    inspect.main(["weights", *argv, "--json"])
    report = json.loads(capsys.readouterr().out)
    return {layer["name"]: layer for layer in report["layers"]}


def adapter_json(capsys: Capture, *argv: str) -> dict[str, Any]:
    capsys.readouterr()
    inspect.main(["adapter", *argv, "--json"])
    return dict(json.loads(capsys.readouterr().out))


# -- weights --


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


# -- adapters --


@pytest.mark.parametrize("method", ["lora", "map"])
def test_an_adapter_is_told_from_its_folder_alone(method: str, tmp_path: Path, capsys: Capture) -> None:
    base, _ = saved(tmp_path / "base", FAMILIES["llama"])
    folder, tensors = adapter_over(base, tmp_path / "adapter", method=method)
    for path in base.iterdir():
        path.unlink()
    report = adapter_json(capsys, str(folder))
    assert (report["method"], report["step"], len(report["layers"])) == (method, 5, 14)
    for layer in report["layers"]:
        part = {n: tensors[f"{layer['name']}.{n}"].double() for n in layer["tensors"]}
        dense = 2.0 * part["B"] @ part["A"]
        if method == "map":
            norm = tensors[f"{layer['name']}.base_norm"].double()
            dense = part["b"] * dense / (dense.norm() + 1e-6)
            scale = (part["a"] / (norm + 1e-6)).item()
            assert layer["row_scale"]["mean"] == pytest.approx(scale, rel=1e-5)
            assert layer["meaning"] == "dW without the base's scale"
            assert layer["tensors"]["b"]["mean"] == pytest.approx(part["b"].item())
            assert layer["buffers"]["base_norm"]["mean"] == pytest.approx(norm.item())
        else:
            assert (layer["meaning"], layer["row_scale"]) == ("dW", None)
        assert (layer["out_features"], layer["in_features"]) == tuple(dense.shape)
        for name in ("A", "B"):
            assert layer["tensors"][name]["norm"] == pytest.approx(part[name].norm().item(), rel=1e-6)
        found = layer["product"]
        assert found["std"] == pytest.approx(dense.std(correction=0).item(), rel=1e-5)
        assert found["norm"] == pytest.approx(dense.norm().item(), rel=1e-5)
        assert found["top"] == pytest.approx(torch.linalg.svdvals(dense)[:4].tolist(), rel=1e-5)


# by the contract's name of the method: what the caption says, and None for methods that add nothing of low rank
FACTOR, EXPONENT = "s B A, the factor's change: W o (1 + s B A)", "s B A, the exponent: W o exp(s B A)"
PART = "s B A"  # of what reads the base, rewrites it, or is nonlinear
SCALED = "dW without the base's scale"
OTHER_THAN_DW: dict[str, str | None] = {
    **dict.fromkeys(["liera", "hira"], FACTOR),
    "liera-exact": EXPONENT,
    **dict.fromkeys(["dora", "map-dora", "mpc_n", "pissa", "milora", "olora"], PART),
    **dict.fromkeys(["map", "map-trilora", "map-flora"], SCALED),
    **dict.fromkeys(["bitfit", "ssl", "ssb", "ia3"], None),
}


def numbers_in(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    return [value] if isinstance(value, (int, float)) else []


def layers_in_place(base: Path, given: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The adapted layers of a whole model with these tensors, as they would run."""
    made = built(
        section(base), adapter=AdapterSection(**{"method": "lora", "rank": 4, "alpha": 8.0, **given})
    )
    place_adapter({**made.trained, **made.buffers}, tensors, single())
    found = dict(adapters(made.model.model))
    for layer in found.values():
        layer.on_step(4)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_method_is_told_and_its_norms_are_those_of_the_dense_change(
    variant: str, llama: Path, tmp_path: Path, capsys: Capture
) -> None:
    method, options = VARIANTS[variant]
    given = {"method": method, "options": options, "targets": ["q_proj", "down_proj"]}
    folder, tensors = adapter_over(llama, tmp_path / "adapter", **given)
    report = adapter_json(capsys, str(folder))
    inspect_adapter.main([str(folder), "--all"])
    assert "layers.1.self_attn.q_proj" in (printed := capsys.readouterr()).out and not printed.err
    assert len(report["layers"]) == 4
    assert all(math.isfinite(number) for number in numbers_in(report))
    in_place = layers_in_place(llama, given, tensors)
    for row in report["layers"]:
        layer = in_place[row["name"]]
        assert row["meaning"] == OTHER_THAN_DW.get(variant, "dW")
        assert (row["product"] is None) == (row["meaning"] is None)
        if row["meaning"] in (FACTOR, EXPONENT):
            change = 2.0 * layer.B.detach().double() @ layer.A.detach().double()  # alpha / rank = 2
        elif row["meaning"] == "dW":
            weight = layer.base.dense(torch.float64)
            change = layer.merged(weight).double() - weight
        else:
            continue
        assert (row["out_features"], row["in_features"]) == tuple(change.shape)
        assert row["product"]["norm"] == pytest.approx(change.norm().item(), rel=1e-5) != 0
        assert row["product"]["std"] == pytest.approx(change.std(correction=0).item(), rel=1e-5)


def test_methods_mixed_by_overrides_are_each_told(llama: Path, tmp_path: Path, capsys: Capture) -> None:
    methods = {"q_proj": "liera", "k_proj": "hira", "v_proj": "vera", "o_proj": "bitfit", "up_proj": "dora"}
    given = {"overrides": [{"targets": name, "method": method} for name, method in methods.items()]}
    folder, tensors = adapter_over(llama, tmp_path / "adapter", **given)
    report = adapter_json(capsys, str(folder))
    inspect_adapter.main([str(folder)])
    assert FACTOR in " ".join(capsys.readouterr().out.split())
    assert len(report["layers"]) == 14 and all(math.isfinite(number) for number in numbers_in(report))
    in_place = layers_in_place(llama, given, tensors)
    for row in report["layers"]:
        name = row["name"].rpartition(".")[2]
        assert row["meaning"] == OTHER_THAN_DW.get(methods.get(name, "lora"), "dW"), name
        if row["meaning"] == "dW":
            up, down = in_place[row["name"]].delta()
            assert row["product"]["norm"] == pytest.approx((up @ down).norm().item(), rel=1e-5)


@pytest.mark.parametrize("is_replaced", [False, True])
def test_vera_without_its_base_shows_what_it_trained(
    is_replaced: bool, tmp_path: Path, capsys: Capture
) -> None:
    base, _ = saved(tmp_path / "base", FAMILIES["llama"])
    folder, tensors = adapter_over(base, tmp_path / "adapter", method="vera", targets=["q_proj"])
    for path in base.iterdir():
        path.unlink()
    if is_replaced:  # another model under the same name has other sizes
        saved(base, {**FAMILIES["llama"], "hidden_size": 128})
    inspect_adapter.main([str(folder), "--json"])
    printed = capsys.readouterr()
    assert "the low-rank part is left out" in printed.err
    for layer in json.loads(printed.out[printed.out.index("{") :])["layers"]:
        assert (layer["product"], layer["meaning"]) == (None, None)
        norm = tensors[f"{layer['name']}.b"].norm().item()
        assert layer["tensors"]["b"]["norm"] == pytest.approx(norm, rel=1e-6)


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


def test_overrides_and_modules_trained_whole_are_told_apart(
    llama: Path, tmp_path: Path, capsys: Capture
) -> None:
    overrides = [
        {"targets": "layers.0.*", "skip": True},
        {"targets": "v_proj", "rank": 2},
        {"targets": "down_proj", "method": "map"},
    ]
    folder, _ = adapter_over(
        llama, tmp_path / "adapter", overrides=overrides, train_modules=["norm", "lm_head"]
    )
    report = adapter_json(capsys, str(folder))
    layers = {layer["name"].rpartition(".")[2]: layer for layer in report["layers"]}
    assert len(report["layers"]) == len(layers) == 7
    assert layers["v_proj"]["tensors"]["A"]["shape"] == [2, 64]
    assert layers["q_proj"]["tensors"]["A"]["shape"] == [4, 64]
    assert "base_norm" in layers["down_proj"]["buffers"] and not layers["up_proj"]["buffers"]
    assert set(report["whole"]) == {"model.norm.weight", "lm_head.weight"}


def test_a_first_layer_that_stands_out_is_flagged(tmp_path: Path, capsys: Capture) -> None:
    base, _ = saved(tmp_path / "base", {**FAMILIES["llama"], "num_hidden_layers": 5})
    folder, tensors = adapter_over(base, tmp_path / "adapter", targets=["q_proj", "k_proj"])
    given = json.loads((folder / "adapter.json").read_text())
    tensors["model.layers.0.self_attn.q_proj.B"] *= 5
    save_adapter(
        tmp_path / "spiked", tensors, {k: v for k, v in given.items() if k not in ("size", "sha256")}
    )
    profiles = adapter_json(capsys, str(tmp_path / "spiked"))["std_over_depth"]
    assert profiles["self_attn.q_proj"]["spike_at_first"]
    assert not profiles["self_attn.k_proj"]["spike_at_first"]
    inspect_adapter.main([str(tmp_path / "spiked")])
    assert capsys.readouterr().out.count("spike") == 1


def test_no_matrix_of_a_weight_s_size_is_made(llama: Path, tmp_path: Path) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    from decompft.launcher.worker.inspecting.adapter import inspect_adapter as rows_of
    from decompft.launcher.worker.inspecting.layers import open_layers

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made = out if isinstance(out, (list, tuple)) else [out]
            sizes.extend(t.numel() for t in made if isinstance(t, torch.Tensor))
            return out

    folder, _ = adapter_over(llama, tmp_path / "adapter", targets=["gate_proj"])
    layers, _ = open_layers(folder)
    with Sizes():
        assert len(rows_of(layers)) == 2
    assert 0 < max(sizes) < 64 * 128


def test_tensors_of_another_method_are_refused(llama: Path, tmp_path: Path) -> None:
    _, tensors = adapter_over(llama, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="holds no layer with the tensors of map: A, B, a, b, base_norm"):
        layers_of(AdapterSection(method="map"), tensors, None)


# -- files and the command line --


def test_out_holds_json_and_both_plots_and_repeats_byte_for_byte(
    llama: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder, _ = adapter_over(llama, tmp_path / "adapter", targets=["q_proj", "v_proj"])
    for argv, name, outs in (
        (["weights", str(llama), "--layers", "q_proj", "--tuned", str(folder)], "weights", ("one",)),
        (["adapter", str(folder)], "adapter", ("one", "two")),
    ):
        for out in outs:
            inspect.main([*argv, "--all", "--out", str(tmp_path / out)])
        printed = capsys.readouterr()
        assert "layers.1.self_attn.q_proj" in printed.out and f"{name}.svg" in printed.err
        for ending, start in (("json", b"{"), ("png", b"\x89PNG"), ("svg", b"<?xml")):
            files = {(tmp_path / out / f"{name}.{ending}").read_bytes() for out in outs}
            assert len(files) == 1 and files.pop().startswith(start)
        assert len(json.loads((tmp_path / "one" / f"{name}.json").read_text())["layers"]) in (2, 4)


def test_plots_without_matplotlib_say_what_to_install(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="matplotlib, which is not installed") as caught:
        inspect_weights.main([str(llama), "--out", str(tmp_path / "out")])
    assert "decompft[plot]" in caught.value.hint and not (tmp_path / "out").exists()


@pytest.mark.dist
def test_the_verbs_run_as_typed_and_a_mistake_exits_with_2(
    llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli(["inspect", "weights", str(llama), "--layers", "q_proj", "v_proj", "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)["layers"]) == 4
    assert cli(["inspect", "adapter", str(tmp_path)]) == 2
    assert capfd.readouterr().err.startswith("error: ") and not capfd.readouterr().out
