"""Batches and feeds: targets, positions and padding; one global batch whatever the ranks; streams alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from decompft.launcher.errors import DataError
from decompft.launcher.recipe import Recipe
from decompft.launcher.worker.data.batches import collate
from decompft.launcher.worker.data.feed import EvalData, PreparedTrain, StepData, TrainData
from decompft.launcher.worker.data.prepare import prepare_data
from decompft.launcher.worker.data.rows import Row, open_rows
from decompft.launcher.worker.data.stream import StreamedTrain
from decompft.launcher.worker.tokenizers import byte_tokenizer

PAIRS = [{"prompt": f"question {i}", "completion": "a" * (i % 7 + 1)} for i in range(45)]


def row(tokens: list[int], trained: list[int], lengths: tuple[int, ...], label: int | None = None) -> Row:
    return Row(
        id=0,
        tokens=np.array(tokens, np.int32),
        trained=np.array(trained, np.bool_),
        doc_lengths=lengths,
        label=label,
    )


PACKED = row([10, 11, 12, 20, 21], [0, 1, 1, 1, 1], (3, 2))


def test_targets_are_shifted_and_stay_within_their_document() -> None:
    batch = collate([PACKED], pad_id=0, pad_multiple=8)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 0, 0, 0]]
    # 20 is trained but is the first of its document: what comes before it is another document's
    assert batch.targets.tolist() == [[11, 12, -100, 21, -100, -100, -100, -100]]
    assert batch.num_targets == PACKED.num_targets == 3
    assert batch.targets.reshape(-1)[batch.target_index].tolist() == [11, 12, 21]
    assert batch.num_tokens == 5


def test_positions_restart_in_each_document_and_in_the_padding() -> None:
    batch = collate([PACKED, row([1], [1], (1,)), None], pad_id=0)
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [
        [0, 1, 2, 0, 1, 0, 1, 2],
        [0, 0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 3, 4, 5, 6, 7],
    ]


def test_rows_of_one_document_need_no_positions() -> None:
    batch = collate([row([1, 2], [0, 1], (2,)), None], pad_id=0)
    assert batch.position_ids is None and batch.attention_mask is None and batch.labels is None
    assert batch.num_targets == 1


def test_end_token_that_is_the_pad_id_keeps_its_loss() -> None:
    batch = collate([row([5, 9], [0, 1], (2,))], pad_id=9)
    assert batch.targets[0, 0] == 9


def test_dummy_rows_alone_serve_either_task() -> None:
    batch = collate([None, None], pad_id=3)
    assert batch.num_targets == 0 and batch.num_tokens == 0 and len(batch.target_index) == 0
    assert batch.input_ids.tolist() == [[3] * 8] * 2
    assert batch.labels is not None and batch.labels.tolist() == [-100, -100]
    assert batch.attention_mask is not None and batch.attention_mask.sum(1).tolist() == [1, 1]


def test_labels_come_with_a_mask_of_what_is_no_padding() -> None:
    batch = collate([row([1, 2, 3], [0, 0, 0], (3,), label=2), None], pad_id=0)
    assert batch.labels is not None and batch.labels.tolist() == [2, -100]
    assert batch.attention_mask is not None and batch.attention_mask[0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert batch.num_targets == 1 and (batch.targets == -100).all()


def test_moving_keeps_everything() -> None:
    batch = collate([PACKED], pad_id=0).to(torch.device("meta"))
    assert batch.input_ids.is_meta and batch.target_index.is_meta
    assert batch.num_targets == 3 and batch.labels is None


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


def recipe(folder: Path, *, records: list[Any] = PAIRS, copies: int = 1, **changes: Any) -> Recipe:
    sources = []
    for index in range(copies):
        path = folder / f"set{index}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        sources.append({"path": str(path), "format": "completion"})
    values: dict[str, Any] = {
        "model": {"config": {"model_type": "llama"}, "weights": "random"},
        "data": {"train": sources, "sequence_length": 64},
        "train": {"epochs": 1.0, "global_batch_size": 4},
    }
    for name, section in changes.items():
        values[name] = {k: v for k, v in (values[name] | section).items() if v is not None}
    return Recipe.model_validate(values)


def streamed(folder: Path, **data: Any) -> Recipe:
    return recipe(folder, data={"streaming": True} | data, train={"epochs": None, "max_steps": 9})


def feed(made: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path) -> TrainData:
    if made.data.streaming:
        return StreamedTrain(made, tokenizer, 0)
    entry = prepare_data(made, tokenizer, cache_root=folder / "cache", show_progress=False)["train"]
    assert entry is not None
    return PreparedTrain(made, open_rows(entry), 0)


def in_global_order(parts: list[StepData]) -> list[tuple[int, ...] | None]:
    """The rows of a step's ranks, put together as the sampler's layout says."""
    rounds = range(len(parts[0].micro_batches))
    rows = [r for a in rounds for part in parts for r in part.micro_batches[a]]
    return [None if r is None else tuple(r.tokens.tolist()) for r in rows]


@pytest.mark.parametrize("stream", [False, True])
def test_a_step_is_the_same_on_any_number_of_ranks(
    stream: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = streamed(tmp_path) if stream else recipe(tmp_path)
    data = feed(made, tokenizer, tmp_path)
    single = data.step(2, 1, 0, 4, 1)
    for world, micro, accumulation in [(2, 2, 1), (2, 1, 2), (4, 1, 1), (1, 1, 4)]:
        parts = [data.step(2, world, rank, micro, accumulation) for rank in range(world)]
        assert in_global_order(parts) == in_global_order([single])
        assert {p.num_targets_global for p in parts} == {single.num_targets_global}
        assert all(p.sample_ids == single.sample_ids for p in parts)


@pytest.mark.parametrize("stream", [False, True])
def test_targets_of_the_batches_sum_to_the_global_count(
    stream: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = streamed(tmp_path) if stream else recipe(tmp_path)
    data = feed(made, tokenizer, tmp_path)
    for step in range(3):
        parts = [data.step(step, 2, rank, 1, 2) for rank in range(2)]
        batches = [collate(micro, 0) for part in parts for micro in part.micro_batches]
        assert sum(b.num_targets for b in batches) == parts[0].num_targets_global
        assert sum(len(b.target_index) for b in batches) == parts[0].num_targets_global


@pytest.mark.parametrize("stream", [False, True])
def test_resume_at_a_step_sees_what_an_unbroken_run_sees(
    stream: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = streamed(tmp_path) if stream else recipe(tmp_path)
    unbroken = feed(made, tokenizer, tmp_path)
    steps = [in_global_order([unbroken.step(step, 1, 0, 4, 1)]) for step in range(3)]
    resumed = feed(made, tokenizer, tmp_path)
    assert in_global_order([resumed.step(2, 1, 0, 4, 1)]) == steps[2]
    assert in_global_order([resumed.step(1, 1, 0, 4, 1)]) == steps[1]


def test_an_epoch_sees_every_row_once_and_ends_in_dummies(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = recipe(tmp_path, data={"packing": False})
    data = feed(made, tokenizer, tmp_path)
    assert data.total_steps == 12  # 45 rows, 4 a step
    ids = [i for step in range(12) for i in data.step(step, 1, 0, 4, 1).sample_ids]
    assert sorted(ids) == [-1] * 3 + list(range(45))
    last = data.step(11, 1, 0, 4, 1)
    assert [r is None for r in last.micro_batches[0]] == [False, True, True, True]
    assert data.epoch_at(12) == 1.0


def test_evaluation_sees_each_row_once_in_equal_rounds(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = recipe(tmp_path, data={"packing": False})
    entry = prepare_data(made, tokenizer, cache_root=tmp_path / "cache", show_progress=False)["train"]
    assert entry is not None
    held = EvalData(open_rows(entry), 4, 0)
    ranks = [list(held.micro_batches(2, rank)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == 6
    rows = [r for rank in ranks for micro in rank for r in micro]
    assert sorted(r.id for r in rows if r is not None) == list(range(45))
    assert sum(collate(micro, 0).num_targets for rank in ranks for micro in rank) == held.num_targets


def stream_documents(data: TrainData, steps: int) -> list[str]:
    out = []
    for step in range(steps):
        for r in data.step(step, 1, 0, 4, 1).micro_batches[0]:
            assert r is not None and len(r.tokens) <= 64
            documents = np.split(r.tokens, np.cumsum(r.doc_lengths)[:-1])
            out += [bytes(tokens[:-1].tolist()).decode() for tokens in documents]
    return out


def test_a_stream_gives_every_document_in_each_pass(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = sorted(p["prompt"] + p["completion"] for p in PAIRS)
    shuffled = stream_documents(feed(streamed(tmp_path), tokenizer, tmp_path), 9)
    assert sorted(shuffled[:45]) == texts and shuffled[:45] != shuffled[45:90]
    plain = stream_documents(feed(streamed(tmp_path, shuffle=False), tokenizer, tmp_path), 5)
    assert plain[:45] == [p["prompt"] + p["completion"] for p in PAIRS]


def test_a_stream_mixes_rows_by_weight(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    made = recipe(tmp_path, copies=2, train={"epochs": None, "max_steps": 9})
    other = tmp_path / "set1.jsonl"
    other.write_text('{"prompt": "x", "completion": "y"}\n')
    sources = [made.data.train[0], made.data.train[1].model_copy(update={"weight": 3.0})]
    section = made.data.model_copy(update={"train": sources, "streaming": True, "packing": False})
    data = feed(made.model_copy(update={"data": section}), tokenizer, tmp_path)
    assert stream_documents(data, 2).count("xy") == 6


def test_a_folder_of_files_is_streamed_by_datasets(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "folder").mkdir()
    made = streamed(tmp_path / "folder", shuffle=False)
    hub = made.data.train[0].model_copy(update={"path": None, "hub": str(tmp_path / "folder")})
    section = made.data.model_copy(update={"train": [hub]})
    data = feed(made.model_copy(update={"data": section}), tokenizer, tmp_path)
    assert stream_documents(data, 5)[:45] == [p["prompt"] + p["completion"] for p in PAIRS]


def test_a_stream_that_drops_everything_is_an_error(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = streamed(tmp_path, sequence_length=8, too_long="drop")
    with pytest.raises(DataError, match="all 45 records are longer"):
        feed(made, tokenizer, tmp_path).step(0, 1, 0, 4, 1)
