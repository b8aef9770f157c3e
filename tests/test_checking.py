"""Files that a recipe names are looked at before anything starts."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from decompft.launcher.checking import check, check_weights
from decompft.launcher.errors import DataError, DecompftError, ModelError
from decompft.launcher.recipe import Recipe

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


def safetensors(path: Path, num_bytes: int = 16) -> None:
    header = json.dumps({"w": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(num_bytes))


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
