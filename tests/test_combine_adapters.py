"""Trained adapters become one adapter, or one plain model, whose weights are what the rule says."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from combining import changes, combined, dense_parts, quiet, run_folder, train, write_task
from safetensors.torch import load_file
from test_combine import ties_in_numpy
from tiny import make_run, run_ranks
from transformers import AutoModelForCausalLM

from decompft.adapters.inject import adapters
from decompft.launcher.errors import AdapterError, UserError
from decompft.launcher.worker.inference import load, open_adapter
from decompft.launcher.worker.merging import merge
from decompft.launcher.worker.restore import load_adapter
from decompft.launcher.worker.tools.combine import main
from decompft.launcher.worker.tools.eval import main as evaluate

pytestmark = pytest.mark.dist

TOKENS = torch.tensor([[256, 72, 101, 108, 108, 111, 10, 33]])
CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # float32 sums of a few products


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Adapters over one nf4 base, each trained for four steps."""
    folder = tmp_path_factory.mktemp("combine")
    return {
        "lora": train(folder, "lora", method="lora", rank=4),
        "other": train(folder, "other", 0.05, method="lora", rank=2, alpha=3.0),
        "few": train(folder, "few", method="lora", rank=3, targets=["q_proj", "down_proj"]),
        "map": train(folder, "map", method="map", rank=4),
        "norm": train(folder, "norm", method="lora", rank=4, train_modules=["norm"]),
    }


def test_an_average_is_an_adapter_whose_change_is_the_average(parts, tmp_path, capsys):
    argv = [parts["lora"], parts["other"], "--method", "average"]
    found = combined(tmp_path / "out", *argv, capsys=capsys)
    one, two, both = changes(parts["lora"]), changes(parts["other"]), changes(tmp_path / "out")
    assert len(both) == 14 and found["rank"] == 6 and found["lost_overall"] == 0
    for name, change in both.items():
        np.testing.assert_allclose(change, (one[name] + two[name]) / 2, **CLOSE)
        assert np.abs(one[name] - two[name]).max() > 1e-3, "the parts should differ"
    _, description = load_adapter(tmp_path / "out")
    assert description["adapter"]["method"] == "lora" and description["adapter"]["targets"] == "all-linear"
    assert [part["folder"] for part in description["combined"]["parts"]] == [
        f"{parts[name]}/adapter" for name in ("lora", "other")
    ]


def test_the_result_computes_what_its_weights_say_after_a_merge(parts, tmp_path):
    main([parts["lora"], parts["other"], "--method", "nan", "--out", str(tmp_path / "out")])
    opened = open_adapter(tmp_path / "out", base=None, say=quiet)
    merge(opened, "dequantized", tmp_path / "merged", progress=quiet)
    with torch.inference_mode():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(TOKENS).logits
        ours = load(tmp_path / "out", base=None, say=quiet).model.logits(TOKENS, None)
    torch.testing.assert_close(plain, ours, rtol=1e-4, atol=2e-5)


def test_nan_weighs_each_tensor_by_the_inverse_norm_of_its_changes(parts, tmp_path, capsys):
    found = combined(tmp_path / "out", parts["lora"], parts["other"], "--method", "nan", capsys=capsys)
    one, two, both = changes(parts["lora"]), changes(parts["other"]), changes(tmp_path / "out")
    assert found["is_reading"]
    for name, change in both.items():
        norms = np.linalg.norm(one[name]), np.linalg.norm(two[name])
        alpha = norms[1] / sum(norms)  # (1/n1) / (1/n1 + 1/n2)
        assert found["coefficients"][f"{name}.weight"] == pytest.approx([alpha, 1 - alpha], rel=1e-4)
        np.testing.assert_allclose(change, alpha * one[name] + (1 - alpha) * two[name], **CLOSE)


def test_nan_of_the_whole_model_is_one_number_a_part(parts, tmp_path, capsys):
    argv = [parts["lora"], parts["other"], "--method", "task-arithmetic", "--coefficients", "nan"]
    found = combined(tmp_path / "out", *argv, "--granularity", "model", capsys=capsys)
    norms = [np.sqrt(sum((c**2).sum() for c in changes(parts[n]).values())) for n in ("lora", "other")]
    alpha = norms[1] / sum(norms)
    for row in found["coefficients"].values():  # 0.3 each is 0.6 in all
        assert row == pytest.approx([0.6 * alpha, 0.6 * (1 - alpha)], rel=1e-4)


def test_nan_of_full_weights_hardly_tells_parts_apart(parts, tmp_path, capsys):
    argv = [parts["lora"], parts["map"], "--method", "nan", "--norm-of", "full", "--rank", "8"]
    found = combined(tmp_path / "out", *argv, capsys=capsys)
    one, two = dense_parts(parts["lora"]), dense_parts(parts["map"])
    for name, (base, change) in one.items():
        norms = np.linalg.norm(base + change), np.linalg.norm(base + two[name][1])
        alpha = norms[1] / sum(norms)
        assert found["coefficients"][f"{name}.weight"] == pytest.approx([alpha, 1 - alpha], rel=1e-5)


def test_nan_of_map_uses_the_norm_of_its_change(parts, tmp_path, capsys):
    argv = [parts["lora"], parts["map"], "--method", "nan", "--rank", "8"]
    found = combined(tmp_path / "out", *argv, capsys=capsys)
    one, two = changes(parts["lora"]), changes(parts["map"])
    for name in one:
        norms = np.linalg.norm(one[name]), np.linalg.norm(two[name])
        alpha = norms[1] / sum(norms)
        assert found["coefficients"][f"{name}.weight"] == pytest.approx([alpha, 1 - alpha], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), (0.3, 0.3)),
        (("--scale", "n"), (1.0, 1.0)),
        (("--scale", "0.8"), (0.4, 0.4)),
        (("--coefficients=-1,0.5",), (-1.0, 0.5)),
        (("--coefficients", "1,2", "--scale", "0.5"), (0.5, 1.0)),
    ],
)
def test_task_arithmetic_adds_what_its_coefficients_say(parts, tmp_path, capsys, flags, expected):
    argv = [parts["lora"], parts["other"], "--method", "task-arithmetic", *flags]
    combined(tmp_path / "out", *argv, capsys=capsys)
    one, two = changes(parts["lora"]), changes(parts["other"])
    for name, change in changes(tmp_path / "out").items():
        np.testing.assert_allclose(change, expected[0] * one[name] + expected[1] * two[name], **CLOSE)


def test_a_layer_that_one_part_leaves_alone_counts_as_no_change(parts, tmp_path, capsys):
    combined(tmp_path / "out", parts["few"], parts["lora"], "--method", "average", capsys=capsys)
    few, lora = changes(parts["few"]), changes(parts["lora"])
    for name, change in changes(tmp_path / "out").items():
        np.testing.assert_allclose(change, (few.get(name, 0) + lora[name]) / 2, **CLOSE)
    targets = load_adapter(tmp_path / "out")[1]["adapter"]["targets"]
    assert len(targets) == 14 and "model.layers.0.mlp.up_proj" in targets


def test_compression_reports_the_singular_values_that_it_leaves_out(parts, tmp_path, capsys):
    argv = [parts["lora"], parts["other"], "--method", "average"]
    found = combined(tmp_path / "small", *argv, "--rank", "3", capsys=capsys)
    one, two, small = changes(parts["lora"]), changes(parts["other"]), changes(tmp_path / "small")
    lost = whole = 0.0
    for name in small:
        exact = (one[name] + two[name]) / 2
        sizes = np.linalg.svd(exact, compute_uv=False)
        left_out = np.sqrt((sizes[3:] ** 2).sum())
        assert np.linalg.matrix_rank(small[name], tol=1e-5) <= 3
        assert np.linalg.norm(small[name] - exact) == pytest.approx(left_out, rel=1e-3)
        assert found["lost"][f"{name}.weight"] == pytest.approx(left_out / np.linalg.norm(exact), rel=1e-3)
        lost, whole = lost + left_out**2, whole + (exact**2).sum()
    assert found["lost_overall"] == pytest.approx(np.sqrt(lost / whole), rel=1e-3) and lost > 0


@pytest.fixture(scope="module")
def bare(parts, tmp_path_factory):
    """The base's own weights, as a model whose change is nothing has them."""
    out = tmp_path_factory.mktemp("bare") / "model"
    argv = [parts["lora"], parts["lora"], "--method", "task-arithmetic", "--coefficients", "1,-1"]
    main([*argv, "--into", "dense", "--out", str(out)])
    return load_file(out / "model.safetensors")


def test_ties_goes_into_a_plain_model_element_by_element(parts, bare, tmp_path):
    argv = [parts["lora"], parts["other"], "--method", "ties", "--coefficients", "nan", "--into", "dense"]
    main([*argv, "--out", str(tmp_path / "out")])
    found = load_file(tmp_path / "out/model.safetensors")
    one, two = changes(parts["lora"]), changes(parts["other"])
    for name in one:
        norms = np.linalg.norm(one[name]), np.linalg.norm(two[name])
        weights = norms[1] / sum(norms), norms[0] / sum(norms)
        change = found[f"{name}.weight"].double().numpy() - bare[f"{name}.weight"].double().numpy()
        expected = ties_in_numpy([one[name], two[name]], weights, 0.2)
        np.testing.assert_allclose(change, expected, rtol=1e-3, atol=1e-6)
        assert (expected == 0).mean() > 0.5
    untouched = [n for n in found if n.removesuffix(".weight") not in one]
    assert untouched and all(torch.equal(found[n], bare[n]) for n in untouched)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")(TOKENS).logits.isfinite().all()


def test_ties_of_a_low_rank_says_what_it_loses(parts, tmp_path, capsys):
    argv = [parts["lora"], parts["other"], "--method", "ties", "--density", "0.5"]
    with pytest.raises(UserError, match="ties works on single elements.* full rank") as error:
        main([*argv, "--out", str(tmp_path / "out")])
    assert "--rank R" in error.value.hint and not (tmp_path / "out").exists()
    found = combined(tmp_path / "out", *argv, "--rank", "8", capsys=capsys)
    one, two = changes(parts["lora"]), changes(parts["other"])
    for name, change in changes(tmp_path / "out").items():
        exact = ties_in_numpy([one[name], two[name]], (0.5, 0.5), 0.5)
        sizes = np.linalg.svd(exact, compute_uv=False)
        expected = np.sqrt((sizes[8:] ** 2).sum() / (sizes**2).sum())
        assert found["lost"][f"{name}.weight"] == pytest.approx(expected, rel=1e-3)
        assert np.linalg.norm(change - exact) / np.linalg.norm(exact) == pytest.approx(expected, rel=1e-3)


def test_dare_drops_by_its_seed_and_rescales(parts, bare, tmp_path):
    argv = [parts["lora"], parts["other"], "--method", "dare", "--into", "dense", "--density", "0.25"]
    outs = {}
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        main([*argv, "--seed", str(seed), "--out", str(tmp_path / name)])
        outs[name] = load_file(tmp_path / name / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    key = f"{name}.weight"
    assert torch.equal(outs["first"][key], outs["again"][key])
    assert not torch.equal(outs["first"][key], outs["other"][key])
    one, two = 0.3 / 0.25 * changes(parts["lora"])[name], 0.3 / 0.25 * changes(parts["other"])[name]
    change = outs["first"][key].double().numpy() - bare[key].double().numpy()
    nearest = np.min([np.abs(change - sum_) for sum_ in (0 * one, one, two, one + two)], axis=0)
    assert nearest.max() < 1e-6
    kept = (np.abs(change) > 1e-7).mean()
    assert kept == pytest.approx(1 - 0.75**2, abs=0.03)  # 8192 elements: three standard errors are 0.016


def test_a_part_that_scales_the_base_needs_a_rank_or_a_dense_model(parts, tmp_path, capsys):
    argv = [parts["lora"], parts["map"], "--method", "average"]
    with pytest.raises(UserError, match=r"map.*\(map\): scales or rewrites the base"):
        main([*argv, "--out", str(tmp_path / "out")])
    one, two = changes(parts["lora"]), changes(parts["map"])
    found = combined(tmp_path / "out", *argv, "--rank", "64", capsys=capsys)
    assert found["lost_overall"] < 1e-5
    for name, change in changes(tmp_path / "out").items():
        np.testing.assert_allclose(change, (one[name] + two[name]) / 2, rtol=1e-3, atol=2e-6)


def test_a_dense_model_takes_the_change_over_the_base_s_own_weights(parts, bare, tmp_path):
    argv = [parts["lora"], parts["map"], "--method", "task-arithmetic", "--into", "dense"]
    main([*argv, "--out", str(tmp_path / "out")])
    found = load_file(tmp_path / "out/model.safetensors")
    loaded = load(run_folder(parts["map"]), base=None, say=quiet)
    lora = changes(parts["lora"])
    for name, layer in adapters(loaded.model.model):
        own = bare[f"{name}.weight"]
        expected = own.double().numpy() + 0.3 * lora[name] + 0.3 * (layer.merged(own) - own).double().numpy()
        np.testing.assert_allclose(found[f"{name}.weight"].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_what_does_not_belong_together_is_refused_and_nothing_is_left(parts, tmp_path):
    def refused(*argv, match, error=AdapterError):
        with pytest.raises(error, match=match):
            main([*argv, "--method", "average", "--out", str(tmp_path / "out")])
        assert not list(tmp_path.glob("*out*"))

    refused(
        parts["lora"],
        parts["norm"],
        match=r"lora.*: did not train model.norm.weight, which .*norm.* trained whole",
    )
    refused(parts["lora"], error=UserError, match="only one adapter")
    refused(parts["lora"], parts["other"], "--rank", "6", error=UserError, match="have rank 6 already")
    refused(parts["lora"], str(tmp_path / "nowhere"), match="no such folder")
    other_task = tmp_path / "classifier"
    shutil.copytree(run_folder(parts["other"]), other_task)
    description = json.loads((other_task / "adapter.json").read_text())
    description["model"]["task"] = "sequence-classification"
    (other_task / "adapter.json").write_text(json.dumps(description))
    refused(
        parts["lora"],
        str(other_task),
        match="its task is sequence-classification, that of .*lora.* is causal-lm",
    )
    seed = make_run(tmp_path / "seed", adapter={"method": "lora"}, train={"seed": 9})
    run_ranks(seed)
    refused(parts["lora"], str(seed.path), match=r"was trained over another base than .*lora.*seed 9")
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(UserError, match="taken: exists already"):
        main([parts["lora"], parts["other"], "--method", "nan", "--out", str(taken)])


def test_parts_and_result_are_scored_in_one_table(parts, tmp_path, capsys):
    tasks = [write_task(tmp_path / f"task{number}.jsonl", answer) for number, answer in enumerate("ab")]
    argv = [parts["lora"], parts["map"], "--method", "average", "--task", *tasks]
    found = combined(tmp_path / "out", *argv, "--rank", "4", "--limit", "2", capsys=capsys)
    rows = found["accuracies"]
    assert [row["name"].split("/")[-2 if "adapter" in row["name"] else -1] for row in rows] == [
        "lora",
        "map",
        "out",
    ]
    for row in rows:
        evaluate([row["name"], "--task", *tasks, "--limit", "2", "--json"])
        scores = {score["task"]: score["accuracy"] for score in json.loads(capsys.readouterr().out)}
        assert row["accuracy"] == scores and row["mean"] == sum(scores.values()) / 2
    main([*argv, "--into", "dense", "--out", str(tmp_path / "dense")])
    table = capsys.readouterr().out
    assert "task0" in table and "task1" in table and "mean" in table and "dense" in table
