"""A merged model is a plain one that computes what base and adapter computed together."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from tiny import LLAMA, make_run
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from decompft.adapters.inject import adapters
from decompft.adapters.merge import make_dense
from decompft.launcher.errors import AdapterError, UserError
from decompft.launcher.worker.checkpoint import save_adapter
from decompft.launcher.worker.description import describe
from decompft.launcher.worker.inference import load, open_adapter
from decompft.launcher.worker.merging import merge
from decompft.launcher.worker.prepared import Prepared
from decompft.launcher.worker.tools.merge import main

pytestmark = pytest.mark.dist


# float32 sums of up to 128 products in another order, through two layers
CLOSE = {"rtol": 1e-4, "atol": 2e-5}

COMMON = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
FAMILIES = {
    "llama": LLAMA,
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 260,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
    },
    "qwen2": {"model_type": "qwen2", **COMMON},
    "gemma": {"model_type": "gemma", "head_dim": 16, **COMMON},  # the head is the embedding
}
TOKENS = torch.tensor([[256, 72, 101, 108, 108, 111, 10, 33]])


def quiet(*args):
    pass


def checkpoint(folder, config):
    """A model of random weights on disk, as transformers saves it; biases and norms are random, too."""
    torch.manual_seed(0)
    fields = dict(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def adapter_of(folder, **sections):
    """An adapter folder of a prepared run, every trained tensor far from its start."""
    run = make_run(folder, **sections)
    save_adapter(run.path / "adapter", {}, describe(run.read_plan(), Prepared.read(run.path)))
    from decompft.launcher.worker.build import build, trained_targets
    from decompft.launcher.worker.engines.base import Engine

    recipe, prepared = run.read_plan().recipe, Prepared.read(run.path)
    built = build(
        recipe.model, recipe.quantization, recipe.adapter, Engine(torch.device("cpu"), timeout_s=1),
        seed=0, model_dir=prepared.model_dir, recompute="none",
    )  # fmt: skip
    targets = trained_targets(built.model.model)
    moved = torch.Generator().manual_seed(1)
    tensors = {
        name: value.detach() + 0.1 * torch.randn(value.shape, generator=moved) * (not name.endswith("norm"))
        for name, value in targets.items()
    }
    save_adapter(
        run.path / "adapter", tensors, describe(run.read_plan(), prepared), tokenizer=prepared.tokenizer_dir
    )
    return run.path / "adapter"


def unmerged_logits(adapter, into):
    """Our model's, over the base that the merge is said to go into."""
    if into == "dense":
        path = adapter / "adapter.json"
        description = json.loads(path.read_text())
        description["quantization"]["format"] = "none"
        path.write_text(json.dumps(description))
    loaded = load(adapter, base=None, say=quiet)
    with torch.no_grad():
        for _, layer in adapters(loaded.model):  # norms of rows are those of the weight that is merged into
            fixed = layer.fixed_over(layer.base.dense(torch.float32))
            for buffer, value in zip(layer.fixed(), fixed, strict=True):
                buffer.copy_(value)
    with torch.inference_mode():
        return loaded.model.logits(TOKENS, None)


def plain_logits(folder):
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits


@pytest.mark.parametrize("method", ["lora", "map"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merge_computes_what_base_and_adapter_compute(tmp_path, family, method):
    base, adapter = trained_over(tmp_path, family, adapter={"method": method, "rank": 4, "alpha": 8.0})
    outs = {}
    for into in ("dequantized", "dense"):
        out = tmp_path / into
        main([str(adapter), "--into", into, "--out", str(out)])
        torch.testing.assert_close(plain_logits(out), expected := unmerged_logits(adapter, into), **CLOSE)
        outs[into] = expected
    assert not torch.allclose(outs["dense"], outs["dequantized"], atol=1e-3), "the two bases should differ"
    assert not torch.allclose(outs["dense"], plain_logits(base), atol=1e-2), "the adapter should matter"


@pytest.mark.parametrize(
    ("form", "family"),
    [("fp4", "llama"), ("int8", "llama"), ("fp8", "llama"), ("int8", "gpt2"), ("none", "llama")],
)
def test_every_format_merges_onto_what_was_trained_on(tmp_path, form, family):
    _, adapter = trained_over(tmp_path, family, quantization={"format": form})
    out = tmp_path / "out"
    merge(open_adapter(adapter, base=None, say=quiet), "dequantized", out, progress=quiet)
    expected = unmerged_logits(adapter, "dequantized")
    torch.testing.assert_close(plain_logits(out), expected, **CLOSE)
    loaded = load(adapter, base=None, say=quiet)
    make_dense(loaded.model.model, torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model.logits(TOKENS, None), expected, **CLOSE)
    moved = (expected - unmerged_logits(adapter, "dense")).abs().max()
    assert (moved > 1e-4) == (form != "none"), "the two bases should differ where the base is quantized"


def trained_over(tmp_path, family, **sections):
    """A checkpoint of a family, and an adapter that was trained over it."""
    base = checkpoint(tmp_path / "base", FAMILIES[family])
    tokenizer = str(byte_folder(tmp_path))
    model = {"id": str(base), "config": None, "weights": "checkpoint", "tokenizer": tokenizer}
    return base, adapter_of(tmp_path, model=model, **sections)


def byte_folder(tmp_path):
    from decompft.launcher.worker.tokenizers import byte_tokenizer, save_tokenizer

    save_tokenizer(byte_tokenizer(), tmp_path / "bytes")
    return tmp_path / "bytes"


def test_unadapted_layers_and_whole_modules_of_a_random_base_are_merged_too(tmp_path):
    adapter = adapter_of(
        tmp_path, adapter={"targets": ["q_proj", "down_proj"], "train_modules": ["norm", "embed_tokens"]}
    )
    out = tmp_path / "out"
    merge(open_adapter(adapter, base=None, say=quiet), "dequantized", out, progress=quiet)
    torch.testing.assert_close(plain_logits(out), unmerged_logits(adapter, "dequantized"), **CLOSE)
    assert AutoTokenizer.from_pretrained(out)("Hi")["input_ids"] == [72, 105]


def test_shards_have_an_index_and_the_base_s_dtype(tmp_path):
    base = checkpoint(tmp_path / "base", LLAMA)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    tokenizer = str(byte_folder(tmp_path))
    adapter = adapter_of(
        tmp_path, model={"id": str(base), "config": None, "weights": "checkpoint", "tokenizer": tokenizer}
    )
    out = tmp_path / "out"
    merge(open_adapter(adapter, base=None, say=quiet), "dense", out, shard_bytes=50_000, progress=quiet)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and set(
        json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].values()
    ) == {file.name for file in files}
    for file in files:
        with safe_open(file, "pt") as opened:
            assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {"BF16"}  # noqa: SIM118
    # bf16 rounding of merged weights: 2**-9 relative, through two layers
    torch.testing.assert_close(plain_logits(out), unmerged_logits(adapter, "dense"), rtol=0.05, atol=0.05)


def test_a_trained_classifier_head_is_in_the_merged_model(tmp_path):
    rows = [{"text": f"number {i}", "label": i % 2} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "data.jsonl"), "format": "classification"}
    adapter = adapter_of(
        tmp_path,
        model={"task": "sequence-classification", "config": {**LLAMA, "pad_token_id": 258}},
        data={"train": [source], "sequence_length": 64, "packing": False},
    )
    out = tmp_path / "out"
    merge(open_adapter(adapter, base=None, say=quiet), "dequantized", out, progress=quiet)
    plain = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32)
    loaded = load(adapter, base=None, say=quiet)
    with torch.inference_mode():
        torch.testing.assert_close(plain(TOKENS).logits, loaded.model.model(TOKENS).logits, **CLOSE)


def test_an_existing_folder_and_a_foreign_base_are_refused_and_nothing_is_left(tmp_path):
    adapter = adapter_of(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out: exists already"):
        main([str(adapter), "--into", "dense", "--out", str(tmp_path / "out")])
    other = checkpoint(tmp_path / "other", LLAMA)
    with pytest.raises(AdapterError, match="trained over another base"):
        main([str(adapter), "--into", "dense", "--out", str(tmp_path / "new"), "--base", str(other)])
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new*"))
