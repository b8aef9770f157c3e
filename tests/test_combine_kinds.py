"""Heads, biases, whole modules and every kind of method: what becomes of each when adapters are combined."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from combining import combined, dense_parts, quiet, run_folder, train, write_task
from safetensors.torch import load_file
from test_merge import FAMILIES, byte_folder, checkpoint
from tiny import LLAMA, make_run, run_ranks
from transformers import AutoModelForSequenceClassification

from decompft.launcher.errors import AdapterError, UserError
from decompft.launcher.worker.inference import load, open_adapter
from decompft.launcher.worker.merging import merge
from decompft.launcher.worker.restore import load_adapter
from decompft.launcher.worker.tools.combine import main

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return train(tmp_path_factory.mktemp("lora"), "lora", method="lora", rank=4)


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "dora"},  # scales rows by a norm that depends on the base
        {"method": "ssb"},  # scales rows and columns, no thin factors
        {"method": "delora"},
        {"method": "vera"},  # shares factors that are in no file
        {"method": "lora_init", "options": {"start_step": 2, "base": "residual"}},  # rewrites the base
    ],
    ids=lambda adapter: adapter["method"],
)
def test_any_method_s_change_is_that_of_its_merge(lora, tmp_path, capsys, adapter):
    run = make_run(tmp_path, adapter=adapter, train={"learning_rate": 0.02})
    run_ranks(run)
    opened = open_adapter(run_folder(run.path), base=None, say=quiet)
    merge(opened, "dense", tmp_path / "merged", progress=quiet)
    argv = [str(run.path), lora, "--method", "task-arithmetic"]
    main([*argv, "--coefficients", "1,0", "--into", "dense", "--out", str(tmp_path / "out")])
    merged, out = (load_file(tmp_path / n / "model.safetensors") for n in ("merged", "out"))
    assert merged.keys() == out.keys()
    for name, tensor in merged.items():  # W + (W* - W) in float32 is not W* to the last bit
        torch.testing.assert_close(out[name], tensor, rtol=1e-5, atol=1e-6)
    rank = [] if adapter["method"] in ("delora", "vera") else ["--rank", "64"]
    argv = [str(run.path), lora, "--method", "nan", *rank]
    found = combined(tmp_path / "nan", *argv, capsys=capsys)
    mine, other = dense_parts(run.path), dense_parts(lora)
    for name, (base, change) in other.items():
        mine_of_base = sum(mine[name]) - base  # lora_init has a base of its own
        norms = np.linalg.norm(mine_of_base), np.linalg.norm(change)
        expected = [norms[1] / sum(norms), norms[0] / sum(norms)]
        assert found["coefficients"][f"{name}.weight"] == pytest.approx(expected, rel=1e-3)


def test_trained_biases_are_refused_where_there_is_no_place_for_them(lora, tmp_path):
    run = make_run(tmp_path, adapter={"method": "bitfit"})
    run_ranks(run)
    argv = [str(run.path), lora, "--method", "average", "--out", str(tmp_path / "out")]
    with pytest.raises(
        AdapterError, match=r"\(bitfit\): trained biases, which a lora adapter has no place for"
    ):
        main(argv)
    with pytest.raises(AdapterError, match=r"trained .*proj.bias, and the base has no such bias"):
        main([*argv, "--into", "dense"])
    assert not (tmp_path / "out").exists()


def test_biases_and_transposed_weights_go_into_a_dense_model(tmp_path):
    """GPT-2 has biases everywhere, and stores weights as (in, out)."""
    runs = []
    for method in ("bitfit", "lora"):
        sections = {"model": {"config": FAMILIES["gpt2"]}, "adapter": {"method": method}}
        runs.append(make_run(tmp_path, method, **sections, train={"learning_rate": 0.02}))
        run_ranks(runs[-1])
    argv = [str(run.path) for run in runs]
    found = {}
    for name, weights in (("bitfit", "1,0"), ("lora", "0,1"), ("both", "1,0.5"), ("none", "1e-9,0")):
        flags = ["--method", "task-arithmetic", "--coefficients", weights, "--into", "dense"]
        main([*argv, *flags, "--out", str(tmp_path / f"out-{name}")])
        found[name] = load_file(tmp_path / f"out-{name}/model.safetensors")
    for run, name in zip(runs, ("bitfit", "lora"), strict=True):
        opened = open_adapter(run_folder(run.path), base=None, say=quiet)
        merge(opened, "dense", tmp_path / f"merged-{name}", progress=quiet)
        for key, tensor in load_file(tmp_path / f"merged-{name}/model.safetensors").items():
            torch.testing.assert_close(found[name][key], tensor, rtol=1e-5, atol=1e-6)
    moved = 0
    for key, base in found["none"].items():
        expected = found["bitfit"][key] + 0.5 * (found["lora"][key] - base)
        torch.testing.assert_close(found["both"][key], expected, rtol=1e-5, atol=1e-6)
        moved += key.endswith("bias") and bool((expected - base).abs().max() > 1e-3)
    assert moved == 8, "four linear layers in each of two blocks"


def test_a_new_head_is_the_weighted_mean_of_the_parts_heads(tmp_path, capsys):
    rows = [{"text": f"number {i}", "label": i % 2} for i in range(8)]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = checkpoint(
        tmp_path / "base", {**LLAMA, "pad_token_id": 258}
    )  # a causal one: it has no head of labels
    sections = {
        "model": {
            "task": "sequence-classification", "id": str(base), "config": None, "weights": "checkpoint",
            "tokenizer": str(byte_folder(tmp_path)),
        },
        "data": {
            "train": [{"path": str(tmp_path / "labels.jsonl"), "format": "classification"}],
            "sequence_length": 64, "packing": False,
        },
        "adapter": {"method": "lora"},
    }  # fmt: skip
    runs = []
    for name, rate, labels in (("one", 0.01, 2), ("two", 0.05, 2), ("three", 0.01, 3)):
        sections["model"]["num_labels"] = labels
        run = make_run(tmp_path, name, **sections, train={"learning_rate": rate})
        run_ranks(run)
        runs.append(str(run.path))
    with pytest.raises(AdapterError, match=r"score.weight: has shape \[3, 64\] in .*three"):
        main([*runs, "--method", "average", "--out", str(tmp_path / "never")])
    runs.pop()
    argv = [*runs, "--method", "task-arithmetic", "--coefficients", "1,3", "--scale", "0.2"]
    combined(tmp_path / "out", *argv, capsys=capsys)
    one, two, out = (load_adapter(run_folder(p))[0]["score.weight"] for p in (*runs, tmp_path / "out"))
    torch.testing.assert_close(out, 0.25 * one + 0.75 * two)
    assert float((one - two).abs().max()) > 1e-3
    main([*argv, "--into", "dense", "--out", str(tmp_path / "dense")])
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    torch.testing.assert_close(plain.score.weight, out)
    task = write_task(tmp_path / "task.jsonl", "a")
    with pytest.raises(UserError, match="classifiers, which write no answers"):
        main([*argv, "--out", str(tmp_path / "never"), "--task", task])


def test_modules_trained_whole_are_combined_by_the_same_coefficients(tmp_path, capsys):
    adapter = {"method": "lora", "rank": 4, "train_modules": ["norm"]}
    runs = [train(tmp_path, "one", **adapter), train(tmp_path, "two", 0.05, **adapter)]
    argv = [*runs, "--method", "task-arithmetic", "--coefficients", "nan"]
    found = combined(tmp_path / "out", *argv, capsys=capsys)
    one, two, out = (load_adapter(run_folder(p))[0] for p in (*runs, tmp_path / "out"))
    name = "model.norm.weight"
    taus = one[name].double() - 1, two[name].double() - 1  # a random base's norms are 1
    norms = [float(tau.norm()) for tau in taus]
    alpha = norms[1] / sum(norms)
    assert found["coefficients"][name] == pytest.approx([0.6 * alpha, 0.6 * (1 - alpha)], rel=1e-4)
    expected = 1 + 0.6 * (alpha * taus[0] + (1 - alpha) * taus[1])
    torch.testing.assert_close(out[name].double(), expected, rtol=1e-6, atol=1e-6)
    loaded = load(tmp_path / "out", base=None, say=quiet)
    assert torch.equal(loaded.model.model.model.norm.weight, out[name])
    main(
        [
            *runs,
            "--method",
            "task-arithmetic",
            "--into",
            "dense",
            "--out",
            str(tmp_path / "d"),
        ]
    )
    dense = load_file(tmp_path / "d/model.safetensors")[name]
    torch.testing.assert_close(dense.double(), 1 + 0.3 * (taus[0] + taus[1]), rtol=1e-6, atol=1e-6)
