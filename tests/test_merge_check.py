"""A merge is compared with the model it came from: on what, how far apart they are, and what is written down."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_merge import adapter_of, quiet, trained_over
from tiny import LLAMA

from decompft.launcher.errors import DataError, RunFailed, UserError
from decompft.launcher.worker.divergence import measure
from decompft.launcher.worker.held_out import rows_of_file, rows_of_run
from decompft.launcher.worker.inference import open_adapter
from decompft.launcher.worker.merging import merge
from decompft.launcher.worker.tools.merge import main

pytestmark = pytest.mark.dist

HELD_OUT = {"eval_fraction": 0.3}


def check_of(adapter, into, out, *flags):
    main([str(adapter), "--into", into, "--out", str(out), *flags])
    return json.loads((out / "merge.json").read_text())


@pytest.mark.parametrize("method", ["lora", "map"])
def test_what_was_trained_diverges_by_rounding_alone_and_other_bases_by_more(tmp_path, method, capsys):
    _, adapter = trained_over(tmp_path, "llama", adapter={"method": method}, data=HELD_OUT)
    found = {
        into: check_of(adapter, into, tmp_path / into) for into in ("dequantized", "dense", "requantized")
    }
    kl = {into: record["check"]["kl_nats"] for into, record in found.items()}
    # float32 logits that differ by 1e-5 at most: KL is their square
    assert 0 <= kl["dequantized"] < 1e-8
    assert found["dequantized"]["check"]["top1_agreement"] > 0.999
    # 4-bit rounding of weights of this size
    assert 1e-4 < kl["dense"] < 1 and 1e-4 < kl["requantized"] < 1
    record = found["dense"]
    assert record["into"] == "dense" and record["adapter"]["method"] == method
    assert record["base"] == json.loads((adapter / "adapter.json").read_text())["base"]
    assert record["check"]["num_tokens"] > 100 and record["check"]["data"] == "the evaluation split of run"
    out = capsys.readouterr().out
    assert (
        f"KL(unmerged || merged) {kl['dense']:.3g} nats a token" in out and "evaluation split of run" in out
    )


def test_the_divergence_is_the_textbook_sum(tmp_path):
    lines = [{"prompt": f"{i} times {i} is", "completion": f" {i * i}"} for i in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"path": str(tmp_path / "data.jsonl"), "format": "completion"}
    _, adapter = trained_over(tmp_path, "llama", data={"train": [source], **HELD_OUT})
    opened, out = open_adapter(adapter, base=None, say=quiet), tmp_path / "out"
    merge(opened, "dense", out, progress=quiet)
    rows = rows_of_run(opened, 100_000).rows
    assert any(len(row.doc_lengths) > 1 for row in rows), "packed rows are compared too"
    found = measure(opened, out, rows, base=None, progress=quiet)

    from transformers import AutoModelForCausalLM

    from decompft.launcher.worker.inference import load

    ours = load(adapter, base=None, say=quiet).model
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    sums = []
    for row in rows:  # each document by itself, token by token
        start = 0
        for length in row.doc_lengths:
            tokens = torch.tensor(row.tokens[start : start + length]).long()[None]
            with torch.inference_mode():
                p = ours.logits(tokens, None)[0].double().softmax(-1)
                q = theirs(tokens).logits[0].double().softmax(-1)
            for t in range(length - 1):
                if row.trained[start + t + 1]:
                    same = float(p[t].argmax() == q[t].argmax())
                    sums.append((float((p[t] * (p[t] / q[t]).log()).sum()), same))
            start += length
    assert found.num_tokens == len(sums)
    assert found.kl_nats == pytest.approx(sum(kl for kl, _ in sums) / len(sums), rel=1e-3)
    assert found.top1_agreement == pytest.approx(sum(s for _, s in sums) / len(sums), abs=2 / len(sums))


def test_a_wrong_merge_is_far_away(tmp_path):
    _, adapter = trained_over(tmp_path, "llama", data=HELD_OUT)
    opened = open_adapter(adapter, base=None, say=quiet)
    rows = rows_of_run(opened, 500).rows
    kl = {}
    for name, wrong in (("right", None), ("sign", lambda t: -t), ("nan", lambda t: t * math.nan)):
        out = tmp_path / name
        merge(opened, "dequantized", out, progress=quiet)
        if wrong is not None:
            tensors = load_file(out / "model.safetensors")
            spoiled = "model.layers.0.mlp.down_proj.weight"
            save_file(
                tensors | {spoiled: wrong(tensors[spoiled])}, out / "model.safetensors", {"format": "pt"}
            )
        if name == "nan":
            with pytest.raises(RunFailed, match="not finite"):
                measure(opened, out, rows, base=None, progress=quiet)
        else:
            kl[name] = measure(opened, out, rows, base=None, progress=quiet).kl_nats
    assert kl["right"] < 1e-8 and kl["sign"] > 0.01


@pytest.mark.parametrize("method", ["lora", "map", "liera", "hira"])
def test_the_change_can_be_taken_off_a_dense_merge(tmp_path, method):
    from transformers import AutoModelForCausalLM

    base, adapter = trained_over(tmp_path, "llama", adapter={"method": method})
    exact = check_of(adapter, "dense", tmp_path / "float32")["unmerge"]
    assert exact["error"] < 1e-6 and exact["layer"].startswith("model.layers.")
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    model = {"id": str(half), "config": None, "weights": "checkpoint", "tokenizer": str(tmp_path / "bytes")}
    rounded = adapter_of(tmp_path / "second", model=model, adapter={"method": method})
    error = check_of(rounded, "dense", tmp_path / "bfloat16")["unmerge"]["error"]
    assert 1e-4 < error < 2**-8 * 4  # half an ulp of the merged weight, which is the larger one
    assert "unmerge" not in check_of(adapter, "dequantized", tmp_path / "dequantized")


# -- what it is compared on --------------------------------------------------------------------------


def test_a_file_of_any_format_is_compared_on_and_cut_to_its_tokens(tmp_path):
    _, adapter = trained_over(tmp_path, "llama")
    lines = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello " * 3}]}
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines * 20))
    (tmp_path / "plain.txt").write_text("some words " * 500)
    for file, tokens in (("chat.jsonl", 50), ("plain.txt", 300)):
        record = check_of(
            adapter, "dequantized", tmp_path / file.partition(".")[0],
            "--check-data", str(tmp_path / file), "--check-tokens", str(tokens),
        )  # fmt: skip
        assert record["check"]["num_tokens"] == tokens and record["check"]["data"].endswith(file)
        assert record["check"]["kl_nats"] < 1e-8


def test_short_answers_after_long_prompts_do_not_make_it_long(tmp_path):
    _, adapter = trained_over(tmp_path, "llama")
    row = {"instruction": "x" * 100, "output": "y"}
    (tmp_path / "long.jsonl").write_text((json.dumps(row) + "\n") * 500)
    opened = open_adapter(adapter, base=None, say=quiet)
    rows = rows_of_file(tmp_path / "long.jsonl", opened, 400).rows
    assert 4 * 400 <= sum(len(row.tokens) for row in rows) < 4 * 400 + len(rows[0].tokens)


def test_an_adapter_without_its_run_is_merged_and_says_why_it_is_not_compared(tmp_path, capsys):
    _, adapter = trained_over(tmp_path, "llama", data=HELD_OUT)
    alone = tmp_path / "far" / "away" / "alone"
    shutil.copytree(adapter, alone)
    assert "check" not in check_of(alone, "dense", tmp_path / "out")
    told = capsys.readouterr().err
    assert "alone stands alone" in told.replace("\n", " ") and "--check-data FILE" in told
    assert "check" not in check_of(adapter, "dense", tmp_path / "unasked", "--no-check")


def test_a_run_that_held_nothing_out_says_so(tmp_path):
    _, adapter = trained_over(tmp_path, "llama")
    assert "run held no data out" in rows_of_run(open_adapter(adapter, base=None, say=quiet), 10)


def test_what_cannot_be_compared_on_is_told_before_the_merge(tmp_path):
    _, adapter = trained_over(tmp_path, "llama")
    (tmp_path / "odd.jsonl").write_text('{"question": "x"}\n')
    out = tmp_path / "out"
    for flags, error, words in (
        (["--check-data", str(tmp_path / "none.jsonl")], DataError, "no such file"),
        (["--check-data", str(tmp_path / "odd.jsonl")], DataError, "has fields question"),
        (["--no-check", "--check-tokens", "5"], UserError, "--check-tokens has no effect"),
        (["--check-tokens", "0"], UserError, "must be at least 1"),
    ):
        with pytest.raises(error, match=words):
            main([str(adapter), "--into", "dense", "--out", str(out), *flags])
        assert not out.exists()


def test_a_classifier_is_compared_by_record(tmp_path):
    rows = [{"text": f"number {i}", "label": i % 2} for i in range(24)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "data.jsonl"), "format": "classification"}
    adapter = adapter_of(
        tmp_path,
        model={"task": "sequence-classification", "config": {**LLAMA, "pad_token_id": 258}},
        data={"train": [source], "sequence_length": 64, "packing": False, **HELD_OUT},
    )
    kept = check_of(adapter, "dequantized", tmp_path / "dequantized")["check"]
    assert 1 <= kept["num_tokens"] < 24 and kept["kl_nats"] < 1e-8
    file = check_of(adapter, "dense", tmp_path / "dense", "--check-data", str(tmp_path / "data.jsonl"))[
        "check"
    ]
    assert file["num_tokens"] == 24 and file["kl_nats"] > 1e-8
