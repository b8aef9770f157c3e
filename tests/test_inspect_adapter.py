"""`inspect adapter`: every method is told from its folder, and the numbers are those of the dense change."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from inspecting import Capture, adapter_json, adapter_over, layers_in_place
from test_adapter_contract import VARIANTS
from tiny_models import FAMILIES, saved

from decompft.launcher.errors import AdapterError
from decompft.launcher.recipe import AdapterSection
from decompft.launcher.worker.checkpoint import save_adapter
from decompft.launcher.worker.inference import open_adapter
from decompft.launcher.worker.inspecting.layers import layers_of, open_layers
from decompft.launcher.worker.tools import inspect_adapter


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


def test_tensors_of_another_rank_are_refused(llama: Path, tmp_path: Path) -> None:
    _, tensors = adapter_over(llama, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"A of \[4, \d+\] does not go with lora of rank 8"):
        layers_of(AdapterSection(method="lora", rank=8), tensors, None)


DAMAGE: dict[str, tuple[str, Any]] = {
    "adapter.method: ": ("adapter", {"method": "zora", "rank": 4}),
    "adapter.alpha: ": ("adapter", {"method": "lora", "rank": 4, "alpha": "a"}),
    "adapter: is missing": ("adapter", None),
    "formulas: is missing": ("formulas", None),
    "base: is missing": ("base", None),
    "base.sha256: is missing": ("base", {"id": "a model"}),
    "seed: is missing": ("seed", None),
    "data_formats: is missing": ("data_formats", None),
    "tokens.0.id: is missing": ("tokens", [{"text": "a"}]),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_an_adapter_json_that_lacks_something_is_refused_in_words(
    words: str, llama: Path, tmp_path: Path
) -> None:
    """By all that read one: what inspects it, and what builds a model with it."""
    folder, _ = adapter_over(llama, tmp_path / "adapter")
    key, value = DAMAGE[words]
    description = json.loads((folder / "adapter.json").read_text())
    description[key] = value
    if value is None:
        del description[key]
    (folder / "adapter.json").write_text(json.dumps(description))
    with pytest.raises(AdapterError, match=f"adapter.json: {words}"):
        open_layers(folder)
    with pytest.raises(AdapterError, match=f"adapter.json: {words}"):
        open_adapter(folder, base=None, say=lambda line: None)
