"""Files that a recipe names are looked at before anything starts."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest

from decompft.launcher.checking import check, check_weights
from decompft.launcher.errors import AdapterError, DataError, DecompftError, ModelError, PlanError
from decompft.launcher.recipe import AdapterSection, Recipe

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 260,
}  # fmt: skip


def recipe(source: dict[str, object], model: dict[str, object] | None = None) -> Recipe:
    return Recipe.model_validate(
        {
            "model": model or {"config": CONFIG, "weights": "random"},
            "data": {"train": [source]},
            "train": {"max_steps": 1},
        }
    )


def safetensors(path: Path, shapes: dict[str, tuple[int, ...]] | None = None) -> None:
    header, end = {}, 0
    for name, shape in ({"w": (16,)} if shapes is None else shapes).items():
        start, end = end, end + math.prod(shape)
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("name", "text", "options"),
    [
        ("a.jsonl", '\n{"instruction": "a", "output": "b"}\n', {}),
        ("a.jsonl", '\ufeff{"q": "a", "output": "b"}\n', {"fields": {"instruction": "q"}}),
        ("a.json", '[{"prompt": "a", "completion": "b"}]', {"format": "completion"}),
        ("a.csv", "instruction,output\na,b\n", {}),
        ("a.txt", "once upon a time", {"format": "text"}),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', {"format": "chat"}),
    ],
)
def test_a_first_record_that_fits(name: str, text: str, options: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert check(recipe({"path": str(tmp_path / name), **options}), strict=True) == ()


@pytest.mark.parametrize(
    ("name", "text", "options", "words"),
    [
        ("a.jsonl", "", {}, "empty"),
        ("a.jsonl", "\n\n", {}, "empty"),
        ("a.jsonl", "{broken\n", {}, "a.jsonl:1: broken JSON"),
        ("a.jsonl", "3\n", {}, "expected an object"),
        ("a.json", "[]", {}, "empty"),
        ("a.jsonl", '{"instruction": "a", "outptu": "b"}\n', {}, "did you mean 'outptu'?"),
        ("a.jsonl", '{"instruction": "a", "output": 3}\n', {}, "not text"),
        ("a.jsonl", '{"messages": []}', {"format": "chat"}, "not a list of turns"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', {"format": "chat"}, "not a list of turns"),
        ("a.xls", "x", {}, "unknown kind of data file"),
    ],
)
def test_a_first_record_that_does_not(
    name: str, text: str, options: dict[str, object], words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        check(recipe({"path": str(tmp_path / name), **options}), strict=False)
    assert words in str(caught.value) and caught.value.message.startswith("data.train[0]: ")


def test_missing_data_is_a_warning_before_it_is_an_error(tmp_path: Path) -> None:
    wanted = recipe({"path": str(tmp_path / "*.jsonl")})
    (warning,) = check(wanted, strict=False)
    assert warning == f"data.train[0].path: {tmp_path}/*.jsonl: no such file"
    with pytest.raises(DataError, match="no such file"):
        check(wanted, strict=True)


def test_a_glob_that_matches_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    assert check(recipe({"path": str(tmp_path / "*.jsonl")}), strict=True) == ()


def with_model(model_dir: Path) -> Recipe:
    (model_dir.parent / "a.txt").write_text("x")
    return recipe({"path": str(model_dir.parent / "a.txt"), "format": "text"}, {"id": str(model_dir)})


def test_whole_weights_pass(model_dir: Path) -> None:
    safetensors(model_dir / "model.safetensors")
    assert check(with_model(model_dir), strict=True) == ()


UP = "model.layers.1.mlp.up_proj.weight"
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 2048, "vocab_size": 260}


@pytest.mark.parametrize("name", [UP, UP.removeprefix("model."), f"model.{UP}"])
def test_a_layer_of_another_shape_is_an_error(model_dir: Path, name: str) -> None:
    safetensors(model_dir / "model.safetensors", {name: (128, 64)})
    assert check(with_model(model_dir), strict=True) == ()
    safetensors(model_dir / "model.safetensors", {name: (64, 128)})
    with pytest.raises(ModelError) as caught:
        check(with_model(model_dir), strict=False)
    assert caught.value.message == (
        f"{model_dir}/model.safetensors: {name} has shape [64, 128], the model's config says [128, 64]"
    )
    assert "different models" in caught.value.hint


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_layers_of_gpt2_lie_transposed_but_for_the_head(model_dir: Path, prefix: str) -> None:
    (model_dir / "config.json").write_text(json.dumps(GPT2))
    shapes = {f"{prefix}h.1.attn.c_attn.weight": (64, 192), "lm_head.weight": (260, 64)}
    safetensors(model_dir / "model.safetensors", shapes)
    assert check(with_model(model_dir), strict=True) == ()
    for name in shapes:
        safetensors(model_dir / "model.safetensors", shapes | {name: shapes[name][::-1]})
        with pytest.raises(ModelError, match=f"{name} has shape"):
            check(with_model(model_dir), strict=False)


def test_a_head_of_other_classes_says_how_to_keep_it(model_dir: Path) -> None:
    safetensors(model_dir / "model.safetensors", {"score.weight": (5, 64)})
    (model_dir.parent / "a.csv").write_text("text,label\nx,1\n")
    source = {"path": str(model_dir.parent / "a.csv"), "format": "classification"}
    model = {"id": str(model_dir), "task": "sequence-classification", "num_labels": 2}
    data = {"train": [source], "packing": False}
    classifier = Recipe.model_validate({"model": model, "data": data, "train": {"max_steps": 1}})
    with pytest.raises(ModelError, match=r"score.weight has shape \[5, 64\]") as caught:
        check(classifier, strict=True)
    assert "model.num_labels: 5" in caught.value.hint


def test_more_layers_than_the_config_says_are_an_error(model_dir: Path) -> None:
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1, 2, 10)]
    safetensors(model_dir / "model.safetensors", dict.fromkeys(names, (128, 64)))
    with pytest.raises(ModelError, match=r"holds 2 tensors of layers .* first model.layers.2.mlp") as caught:
        check(with_model(model_dir), strict=False)
    assert "num_hidden_layers" in caught.value.hint and caught.value.message.startswith(f"{model_dir}: ")


def test_what_is_called_otherwise_is_no_layer(model_dir: Path) -> None:
    others = {"model.layers.7.rotary_emb.inv_freq": (8,), "vision.layers.9.mlp.up_proj.weight": (3, 3)}
    safetensors(model_dir / "model.safetensors", {UP: (128, 64), **others})
    assert check(with_model(model_dir), strict=True) == ()


def test_a_quantized_checkpoint_has_shapes_of_its_own(model_dir: Path) -> None:
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (model_dir / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": stored}))
    safetensors(model_dir / "model.safetensors", {UP: (4096, 1)})
    assert check(with_model(model_dir), strict=True) == ()


@pytest.mark.parametrize("keep", [0, 4, 30, -1])
def test_truncated_weights_are_an_error(model_dir: Path, keep: int) -> None:
    safetensors(model_dir / "model.safetensors")
    whole = (model_dir / "model.safetensors").read_bytes()
    (model_dir / "model.safetensors").write_bytes(whole[:keep])
    with pytest.raises(ModelError, match="truncated|cut short") as caught:
        check(with_model(model_dir), strict=False)
    assert "model.safetensors" in caught.value.message


def test_a_missing_shard_is_an_error(model_dir: Path) -> None:
    safetensors(model_dir / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="two.safetensors: this shard is in the index but not in the folder"):
        check_weights(model_dir)


def test_pickled_weights_are_refused_with_the_way_out(model_dir: Path) -> None:
    (model_dir / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="pickled") as caught:
        check(with_model(model_dir), strict=False)
    assert "save_pretrained" in caught.value.hint


def test_a_folder_without_weights_is_a_warning_before_it_is_an_error(model_dir: Path) -> None:
    (warning,) = check(with_model(model_dir), strict=False)
    assert "holds no *.safetensors" in warning
    with pytest.raises(ModelError):
        check(with_model(model_dir), strict=True)


def test_an_unknown_model_type_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    model = {"config": {**CONFIG, "model_type": "lama"}, "weights": "random"}
    with pytest.raises(DecompftError, match="lama"):
        check(recipe({"path": str(tmp_path / "a.txt"), "format": "text"}, model), strict=False)


def test_absent_hub_weights_are_refused_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "a.txt").write_text("x")
    source = {"path": str(tmp_path / "a.txt"), "format": "text"}
    wanted = recipe(source, {"id": "meta-llama/Llama-2-7b-hf"})
    (warning,) = check(wanted, strict=False)
    assert "not on this machine" in warning
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        check(wanted, strict=True)


def keys_without_effect(folder: Path, **section: object) -> list[str]:
    """Those that `check` warns of, without "adapter."."""
    data = folder / "data.jsonl"
    data.write_text('{"instruction": "a", "output": "b"}\n')
    made = recipe({"path": str(data)})
    made = made.model_copy(update={"adapter": AdapterSection.model_validate(section)})
    told = check(made, strict=False)
    return [w.partition(":")[0].removeprefix("adapter.") for w in told if w.startswith("adapter.")]


@pytest.mark.parametrize(
    ("method", "warned"),
    [
        ("ssl", ["rank", "alpha", "dropout"]), ("bitfit", ["rank", "alpha", "dropout"]), ("lora", []), ("liera", []),
        ("svdiff", ["rank", "alpha"]), ("svft", ["rank", "alpha"]),  # dropout acts on the input of their product
        *((name, ["alpha"]) for name in ("vera", "delora", "mpc_n", "spectral_adapter")),
    ],
)  # fmt: skip
def test_a_key_that_means_nothing_to_the_method_is_a_warning(tmp_path, method, warned):
    given = {"method": method, "rank": 8, "alpha": 8.0, "dropout": 0.1}
    assert keys_without_effect(tmp_path, **given) == warned
    assert keys_without_effect(tmp_path, method=method) == []  # defaults are nobody's mistake


def test_a_key_that_means_nothing_to_an_override_is_a_warning_there(tmp_path):
    vera = {"targets": "q_proj", "method": "vera", "alpha": 8.0}
    assert keys_without_effect(tmp_path, method="lora", overrides=[vera]) == ["overrides[0].alpha"]
    over = {"method": "mpc_o", "options": {"over": "delora"}}
    assert keys_without_effect(tmp_path, **over, alpha=8.0) == ["alpha"]
    lora = {"targets": "q_proj", "method": "lora"}
    assert keys_without_effect(tmp_path, method="vera", alpha=8.0, overrides=[lora]) == []  # LoRA's alpha


def test_what_the_models_layers_cannot_take_is_said_without_a_plan(model_dir: Path) -> None:
    safetensors(model_dir / "model.safetensors")
    fine = with_model(model_dir)
    for adapter, error in (({"targets": ["q_prj"]}, AdapterError), ({"rank": 4096}, PlanError)):
        section = AdapterSection(method="lora", **adapter)
        with pytest.raises(error, match="q_proj|rank"):
            check(fine.model_copy(update={"adapter": section}), strict=False)


def long_run(folder: Path, max_steps: int, **section: object) -> tuple[str, ...]:
    (folder / "a.txt").write_text("once upon a time")
    given = recipe({"path": str(folder / "a.txt"), "format": "text"})
    train = given.train.model_copy(update={"max_steps": max_steps})
    return check(given.model_copy(update={"adapter": AdapterSection(**section), "train": train}), strict=True)


@pytest.mark.parametrize("method", ["adalora", "flexlora"])
def test_warm_ups_that_leave_no_step_are_refused_before_a_launch(method: str, tmp_path: Path) -> None:
    options = {"init_warmup": 6, "final_warmup": 6}
    with pytest.raises(AdapterError, match="init_warmup 6 and final_warmup 6 leave none of the 8 steps"):
        long_run(tmp_path, 8, method=method, options=options)
    with pytest.raises(AdapterError, match=r"overrides\[0\].options: init_warmup 6"):
        long_run(tmp_path, 8, overrides=[{"targets": ["q_proj"], "method": method, "options": options}])
    assert not long_run(tmp_path, 13, method=method, options=options)


@pytest.mark.parametrize("method", ["lora_dash", "lora_init", "lora_tsd"])
def test_a_second_phase_that_never_begins_is_warned_of(method: str, tmp_path: Path) -> None:
    (warning,) = long_run(tmp_path, 8, method=method, options={"start_step": 8})
    assert f"the run's 8 steps end before the second phase of {method} begins" in warning
    assert not long_run(tmp_path, 9, method=method, options={"start_step": 8})
