"""Preparing: reading every kind of file, packing, held-out split, the cache and each error in words."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from decompft.launcher.errors import DataError
from decompft.launcher.recipe import Recipe
from decompft.launcher.worker.data.packing import pack
from decompft.launcher.worker.data.prepare import prepare_data
from decompft.launcher.worker.data.rows import open_rows
from decompft.launcher.worker.tokenizers import byte_tokenizer

PAIRS = [{"prompt": f"q{i} " * (i % 5 + 1), "completion": f"a{i}"} for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


def recipe(train: list[dict[str, Any]], **data: Any) -> Recipe:
    task = "sequence-classification" if train[0].get("format") == "classification" else "causal-lm"
    return Recipe.model_validate(
        {
            "model": {"config": {"model_type": "llama"}, "weights": "random", "task": task, "num_labels": 3},
            "data": {"train": train, "sequence_length": 64} | data,
            "train": {"max_steps": 1},
        }
    )


def source(path: Path, **keys: Any) -> dict[str, Any]:
    return {"path": str(path), "format": "completion"} | keys


def jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prepare(
    made: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> dict[str, dict[str, Any] | None]:
    return prepare_data(made, tokenizer, cache_root=folder / "cache", show_progress=False)


def train_entry(made: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    entry = prepare(made, tokenizer, folder)["train"]
    assert entry is not None
    return entry


def documents(entry: dict[str, Any]) -> list[str]:
    """Every document's text, in sorted order."""
    rows = open_rows(entry)
    out = []
    for index in range(len(rows)):
        row = rows.row(index)
        ends = np.cumsum(row.doc_lengths)
        out += [bytes(t[:-1].astype(np.uint8)).decode() for t in np.split(row.tokens, ends[:-1])]
    return sorted(out)


def write_as(kind: str, folder: Path, records: list[dict[str, str]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"set{kind}"
    lines = "".join(json.dumps(record) + "\n" for record in records)
    table = pa.Table.from_pylist(records)
    if kind == ".jsonl":
        path.write_text("\ufeff" + lines + "\n")
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == ".jsonl.zst":
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(lines.encode())
    elif kind == ".json":
        path.write_text(json.dumps({"data": records}))
    elif kind == ".csv":
        rows = "".join(f'"{r["prompt"]}",{r["completion"]}\n' for r in records)
        path.write_text("prompt,completion\n" + rows)
    elif kind == ".parquet":
        pq.write_table(table, path)
    else:
        writer = pa.ipc.new_file if kind == ".file.arrow" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as file, writer(file, table.schema) as out:
            out.write_table(table)
    return path


@pytest.mark.parametrize(
    "kind",
    [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".csv", ".parquet", ".file.arrow", ".stream.arrow"],
)
def test_every_kind_of_file_gives_the_same_documents(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write_as(kind, tmp_path, PAIRS)
    entry = train_entry(recipe([source(path)]), tokenizer, tmp_path)
    assert documents(entry) == sorted(r["prompt"] + r["completion"] for r in PAIRS)
    assert entry["num_records"] == entry["num_documents"] == 40


def test_text_files_by_glob_are_a_document_each(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"text {name}\r\nend")
    entry = train_entry(recipe([source(tmp_path / "*.txt", format="text")]), tokenizer, tmp_path)
    assert documents(entry) == ["text a\r\nend", "text b\r\nend"]


def test_local_datasets_folder_is_read(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    import datasets

    datasets.Dataset.from_list(PAIRS).save_to_disk(tmp_path / "saved")
    made = recipe([{"hub": str(tmp_path / "saved"), "format": "completion", "max_records": 5}])
    first = train_entry(made, tokenizer, tmp_path)
    assert documents(first) == sorted(r["prompt"] + r["completion"] for r in PAIRS[:5])
    assert train_entry(made, tokenizer, tmp_path)["cache"] == "hit"


def test_max_records_limits_over_files(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    jsonl(tmp_path / "a.jsonl", PAIRS[:3])
    jsonl(tmp_path / "b.jsonl", PAIRS[3:9])
    made = recipe([source(tmp_path / "*.jsonl", max_records=5)])
    assert train_entry(made, tokenizer, tmp_path)["num_records"] == 5


def test_packed_rows_hold_every_document_once_and_never_overflow() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 65, size=500)]
    bins = pack(lengths, 64)
    assert sorted(i for documents in bins for i in documents) == list(range(500))
    assert all(sum(lengths[i] for i in documents) <= 64 for documents in bins)
    # best fit decreasing never needs more than 11/9 of the optimum + 1, and the optimum is at least this
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // 64) + 1
    assert pack(lengths, 64) == bins


def test_packing_takes_the_tightest_fit() -> None:
    assert pack([6, 5, 5, 4], 10) == [[0, 3], [1, 2]]


def test_row_targets_leave_out_the_first_token_of_each_document(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = jsonl(tmp_path / "t.jsonl", [{"text": "abc"}, {"text": "de"}])
    entry = train_entry(recipe([source(path, format="text")]), tokenizer, tmp_path)
    rows = open_rows(entry)
    row = rows.row(0)
    assert row.doc_lengths == (4, 3)
    assert rows.num_trained(0) == row.num_targets == entry["num_targets"] == 3 + 2
    assert entry["num_trained_tokens"] == entry["num_tokens"] == 7


def test_sources_do_not_share_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    a, b = jsonl(tmp_path / "a.jsonl", PAIRS[:3]), jsonl(tmp_path / "b.jsonl", PAIRS[3:7])
    entry = train_entry(recipe([source(a), source(b)]), tokenizer, tmp_path)
    (first, second) = entry["sources"]
    assert second["first_row"] == first["num_rows"]
    assert first["num_rows"] + second["num_rows"] == entry["num_rows"]
    assert [first["num_records"], second["num_records"]] == [3, 4]


def test_without_packing_a_row_is_a_document(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = jsonl(tmp_path / "a.jsonl", PAIRS)
    entry = train_entry(recipe([source(path)], packing=False), tokenizer, tmp_path)
    rows = open_rows(entry)
    assert len(rows) == 40 and all(len(rows.row(i).doc_lengths) == 1 for i in range(40))


def test_held_out_records_are_apart_and_stay_the_same(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = jsonl(tmp_path / "a.jsonl", PAIRS)
    made = prepare(recipe([source(path)], eval_fraction=0.25), tokenizer, tmp_path)
    assert made["train"] is not None and made["eval"] is not None
    train, held = documents(made["train"]), documents(made["eval"])
    assert sorted(train + held) == sorted(r["prompt"] + r["completion"] for r in PAIRS)
    assert 4 <= len(held) <= 16  # 10 expected of 40, deviation 2.7
    # more records do not move those that were there
    jsonl(path, PAIRS + [{"prompt": "new", "completion": "one"}])
    again = prepare(recipe([source(path)], eval_fraction=0.25), tokenizer, tmp_path)
    assert again["eval"] is not None
    assert set(documents(again["eval"])) - {"newone"} == set(held)


def test_second_preparation_is_a_cache_hit(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    made = recipe([source(jsonl(tmp_path / "a.jsonl", PAIRS))])
    first = train_entry(made, tokenizer, tmp_path)
    second = train_entry(made, tokenizer, tmp_path)
    assert (first["cache"], second["cache"]) == ("built", "hit")
    assert {**first, "cache": None} == {**second, "cache": None}


def test_weight_seed_and_file_name_do_not_miss_the_cache(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = jsonl(tmp_path / "a.jsonl", PAIRS)
    train_entry(recipe([source(path)]), tokenizer, tmp_path)
    moved = path.rename(tmp_path / "moved.jsonl")
    assert train_entry(recipe([source(moved, weight=2.0)]), tokenizer, tmp_path)["cache"] == "hit"


@pytest.mark.parametrize(
    "change",
    [
        {"sequence_length": 128},
        {"packing": False},
        {"too_long": "drop"},
        {"eval_fraction": 0.2},
        {"source": {"train_on": "all"}},
        {"source": {"max_records": 30}},
        {"source": {"fields": {"prompt": "completion"}}},
        {"record": {"prompt": "other", "completion": "x"}},
        {"template": "{{ 'other' }}"},
    ],
    ids=str,
)
def test_what_changes_rows_misses_the_cache(change: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    path = jsonl(tmp_path / "a.jsonl", PAIRS)
    train_entry(recipe([source(path)]), tokenizer, tmp_path)
    data = dict(change)
    if "record" in data:
        jsonl(path, [*PAIRS[:-1], data.pop("record")])
    tokenizer.chat_template = data.pop("template", tokenizer.chat_template)
    changed = recipe([source(path, **data.pop("source", {}))], **data)
    assert train_entry(changed, tokenizer, tmp_path)["cache"] == "built"


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest"])
def test_damaged_cache_is_noticed_and_rebuilt(
    damage: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = recipe([source(jsonl(tmp_path / "a.jsonl", PAIRS))])
    first = train_entry(made, tokenizer, tmp_path)
    expected = documents(first)
    file = Path(first["dir"]) / "tokens.bin"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[9] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-4])
    elif damage == "missing":
        file.unlink()
    else:
        manifest = file.parent.parent / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"num_rows": ', '"num_rows": 1'))
    second = train_entry(made, tokenizer, tmp_path)
    assert second["cache"] == "rebuilt"
    assert documents(second) == expected
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [Path(first["dir"]).parent.name]


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nope"])
def test_a_cache_that_cannot_be_written_is_an_error_in_words(
    place: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "file").write_text("")
    root = tmp_path / place
    made = recipe([source(jsonl(tmp_path / "a.jsonl", PAIRS))])
    with pytest.raises(DataError, match=f"^{root}: tokenized data cannot be kept there: [A-Z]") as caught:
        prepare_data(made, tokenizer, cache_root=root, show_progress=False)
    assert "DECOMPFT_CACHE or data.cache_dir" in caught.value.hint


def test_failed_preparation_leaves_nothing_behind(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    made = recipe([source(jsonl(tmp_path / "a.jsonl", [*PAIRS, {"prompt": "x"}]))])
    with pytest.raises(DataError, match=r"a.jsonl:41: no field 'completion'"):
        prepare(made, tokenizer, tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", '{"prompt": "a"', r"a.jsonl:1: broken JSON"),
        ("a.jsonl", '\n{"prompt": "a", "completion": "b"}\n[1]\n', r"a.jsonl:3: expected an object"),
        ("a.jsonl", "", r"a.jsonl: the data set is empty"),
        ("a.json", '{"rows": []}', r"a.json: expected a list"),
        ("a.json", "[{]", r"a.json:1: broken JSON"),
        ("a.csv", "prompt,completion\na,b,c\n", r"a.csv:2: more cells"),
        ("a.csv", "prompt,completion\na\n", r"a.csv:2: field 'completion' is null"),
        ("a.csv", "prompt,completion\n", r"a.csv: the data set is empty"),
        ("a.parquet", "PAR", r"a.parquet: not a readable Parquet"),
        ("a.arrow", "rubbish rubbish rubbish", r"a.arrow: not a readable Arrow"),
        ("a.jsonl.gz", "not gzip", r"a.jsonl.gz: cannot be read"),
        ("a.xlsx", "x", r"a.xlsx: unknown kind"),
    ],
)
def test_broken_file_is_named(
    name: str, content: str, words: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        prepare(recipe([source(tmp_path / name)]), tokenizer, tmp_path)


def test_file_that_is_not_utf8_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(DataError, match="a.jsonl: not UTF-8"):
        prepare(recipe([source(tmp_path / "a.jsonl")]), tokenizer, tmp_path)


def test_missing_file_names_the_nearest(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    jsonl(tmp_path / "train.jsonl", PAIRS)
    with pytest.raises(DataError, match="trian.jsonl: no such file") as caught:
        prepare(recipe([source(tmp_path / "trian.jsonl")]), tokenizer, tmp_path)
    assert "train.jsonl" in caught.value.hint


def test_everything_dropped_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "a" * 99, "completion": "b"}] * 3)
    with pytest.raises(DataError, match="all 3 records are longer"):
        prepare(recipe([source(path)], too_long="drop"), tokenizer, tmp_path)


def test_dropped_and_truncated_are_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    long = {"prompt": "a", "completion": "b" * 99}
    path = jsonl(tmp_path / "a.jsonl", [*PAIRS, long, long])
    dropped = train_entry(recipe([source(path)], too_long="drop"), tokenizer, tmp_path)
    truncated = train_entry(recipe([source(path)], too_long="truncate"), tokenizer, tmp_path)
    assert (dropped["num_dropped"], dropped["num_documents"]) == (2, 40)
    assert (truncated["num_truncated"], truncated["num_documents"]) == (2, 42)


def test_a_fraction_that_holds_out_nothing_is_an_error(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = jsonl(tmp_path / "a.jsonl", PAIRS[:2])
    with pytest.raises(DataError, match="holds out no record"):
        prepare(recipe([source(path)], eval_fraction=1e-9), tokenizer, tmp_path)


def test_weight_on_an_evaluation_set_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = jsonl(tmp_path / "a.jsonl", PAIRS)
    made = recipe([source(path)], eval=[source(path, weight=2.0)])
    with pytest.raises(DataError, match="has no effect"):
        prepare(made, tokenizer, tmp_path)


def labelled(path: Path) -> dict[str, Any]:
    return {"path": str(path), "format": "classification"}


def test_label_names_are_numbered_in_sorted_order(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    records = [{"text": "x", "label": "pos"}, {"text": "y", "label": "neg"}, {"text": "z", "label": "pos"}]
    path = jsonl(tmp_path / "c.jsonl", records)
    held = jsonl(tmp_path / "e.jsonl", records[1:2])
    made = prepare(recipe([labelled(path)], packing=False, eval=[labelled(held)]), tokenizer, tmp_path)
    assert made["train"] is not None and made["eval"] is not None
    assert made["train"]["label_names"] == ["neg", "pos"]
    assert [open_rows(made["train"]).row(i).label for i in range(3)] == [1, 0, 1]
    assert open_rows(made["eval"]).row(0).label == 0


def test_numbers_as_labels_are_kept_even_from_csv(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "c.csv").write_text("text,label\nx,2\ny,0\n")
    entry = train_entry(recipe([labelled(tmp_path / "c.csv")], packing=False), tokenizer, tmp_path)
    assert [open_rows(entry).row(i).label for i in range(2)] == [2, 0]
    assert entry["label_names"] is None


@pytest.mark.parametrize(
    "labels, held, words",
    [
        ([0, 3], [], r"c.jsonl:2: label 3 is outside 0..2"),
        ([0, "a"], [], r"c.jsonl:2: label 'a' is a name"),
        (["a", "b", "c", "d"], [], "4 classes"),
        (["a", "b"], ["z"], r"e.jsonl:1: label 'z' does not occur in training"),
        ([0.5], [], r"c.jsonl:1: field 'label' is float"),
    ],
)
def test_bad_label_names_its_place(
    labels: list[Any], held: list[Any], words: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = jsonl(tmp_path / "c.jsonl", [{"text": "x", "label": label} for label in labels])
    evaluation = jsonl(tmp_path / "e.jsonl", [{"text": "x", "label": label} for label in held])
    made = recipe([labelled(path)], packing=False, eval=[labelled(evaluation)] if held else [])
    with pytest.raises(DataError, match=words):
        prepare(made, tokenizer, tmp_path)
