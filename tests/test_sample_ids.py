"""Which documents a killed and resumed run trains on: those of the unbroken run, on any number of ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny import CPU, LLAMA, WORLDS, recipe_data
from workers import run_worker, start_ranks

from decompft.launcher.plan import Plan
from decompft.launcher.planner import make
from decompft.launcher.resume import choose_start
from decompft.launcher.runs import RunDir
from decompft.launcher.source import parse
from decompft.launcher.worker.data import ahead
from decompft.launcher.worker.data import stream as stream_module
from decompft.launcher.worker.data.rows import Row
from decompft.launcher.worker.data.stream import StreamedTrain
from decompft.launcher.worker.tokenizers import byte_tokenizer
from decompft.launcher.worker.tools import prepare

pytestmark = pytest.mark.dist

ROWS = 4  # of a global batch
EPOCHS, STREAM_STEPS = 3, 30
EVERY = 3  # steps between saves
KILLS = (5, 11, 16)  # the ranks die at the beginning of these steps, counted from 0
# source -> documents, and rows of it an epoch in proportion to all its rows
SIZES, WEIGHTS = {"A": 60, "B": 40, "C": 24}, {"A": 1.0, "B": 2.0, "C": 0.5}
WAIT_LIMIT_S = 60
NAME = re.compile(r"[ABC]\d{3}")

Ids = tuple[tuple[str, ...], ...]  # of each row the documents in it


class Seen(NamedTuple):
    """What a run's ranks trained on: the last time that it came to a step, and each time before."""

    kept: dict[int, Ids]
    all: list[tuple[int, int, Ids]]  # incarnation, step, rows of the global batch in order


@pytest.mark.parametrize("stream", [False, True], ids=["prepared", "streamed"])
def test_killed_and_resumed_no_document_is_seen_twice_or_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    spy(monkeypatch)
    unbroken = trained(tmp_path, "unbroken", stream, [2])
    check_epochs(unbroken.kept, stream)
    killed = trained(tmp_path, "killed", stream, [2, 2, 1, 4])
    assert killed.kept == unbroken.kept
    # also what was trained and lost
    assert all(ids == unbroken.kept[step] for _, step, ids in killed.all)
    # every incarnation goes on where its checkpoint was, not at the start and not behind it
    steps = [[step for i, step, _ in killed.all if i == number] for number in (1, 2, 3, 4)]
    assert [(s[0], s[-1]) for s in steps] == [(0, 5), (3, 11), (9, 16), (15, max(unbroken.kept))]
    assert all(s == list(range(s[0], s[-1] + 1)) for s in steps)


def test_a_resumed_stream_reads_once_more_what_had_been_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound of docs/data.md: the documents before its step and a buffer, never more than the run it continues."""
    plan, _ = planned(tmp_path, True, 1, sizes=dict.fromkeys(SIZES, 2000))
    counted, given = [0], stream_module.iter_records

    def counting(*args: Any, **options: Any) -> Iterator[Any]:
        for record in given(*args, **options):
            counted[0] += 1
            yield record

    monkeypatch.setattr(stream_module, "iter_records", counting)

    def read_by(steps: list[int]) -> tuple[int, list[Row]]:
        """Records read, and the rows."""
        counted[0] = 0
        data = StreamedTrain(plan.recipe, byte_tokenizer(), 0)
        parts = [data.step(step, 1, 0, 1, ROWS).micro_batches for step in steps]
        return counted[0], [row for part in parts for (row,) in part if row is not None]

    last = 150
    unbroken, rows = read_by(list(range(last + 1)))
    resumed, same_rows = read_by([last])
    assert resumed == unbroken
    assert [r.tokens.tolist() for r in same_rows] == [r.tokens.tolist() for r in rows[-ROWS:]]
    trained = sum(len(row.doc_lengths) for row in rows)
    # of each source: the shuffle's buffer, and a batch of records that is tokenized at once
    assert trained < resumed <= trained + len(SIZES) * (1000 + 256)
    further, _ = read_by([last, last + 1])
    assert further - resumed <= len(SIZES) * 256


def check_epochs(kept: dict[int, Ids], stream: bool) -> None:
    """Packing, a mixture by weight, several epochs: the law of docs/data.md, document by document."""
    batches = [kept[step] for step in range(len(kept))]
    assert sorted(kept) == list(range(len(kept))) and len(kept) > KILLS[-1] + EVERY
    in_order = [row for batch in batches for row in batch]
    rows = [row for row in in_order if row]
    assert max(map(len, rows)) > 1 and all(len({name[0] for name in row}) == 1 for row in rows)
    if stream:
        check_stream(rows)
        return
    assert all(in_order[: len(rows)])  # only after the last epoch are there dummies
    times = Counter(name for row in rows for name in row)
    assert len(times) == sum(SIZES.values())
    for name, count in times.items():
        # 0.5: three epochs show each row once or twice
        assert count in {EPOCHS * WEIGHTS[name[0]]} | ({1, 2} if name[0] == "C" else set()), name
    half = Counter(count for name, count in times.items() if name[0] == "C")
    assert half[1] and half[2]
    assert len({tuple(batch) for batch in batches}) == len(batches)  # an epoch does not repeat the one before


def check_stream(rows: list[tuple[str, ...]]) -> None:
    """Each pass over a source shows each of its documents once; rows come in proportion to the weights."""
    for source, size in SIZES.items():
        names = [name for row in rows for name in row if name[0] == source]
        passes = [names[start : start + size] for start in range(0, len(names), size)]
        assert all(len(set(one)) == len(one) for one in passes)
        assert {"A": 1, "B": 2, "C": 1}[source] <= sum(len(one) == size for one in passes)
        assert not len(passes) > 1 or passes[0][: len(passes[1])] != passes[1]
        share = sum(row[0][0] == source for row in rows) / len(rows)
        assert share == pytest.approx(WEIGHTS[source] / sum(WEIGHTS.values()), abs=1 / len(rows) * len(SIZES))


def trained(folder: Path, name: str, stream: bool, worlds: list[int]) -> Seen:
    """Runs on these numbers of ranks, killed before each but the last."""
    run = RunDir(folder / name)
    for number, world in enumerate(worlds):
        plan, text = planned(folder, stream, world)
        start = choose_start(plan, run_dir=run.path, resume="auto")
        os.environ["SPIED_RUN"] = str(run.path)
        run.record(recipe_text=text, plan=plan)
        prepare.main([str(run.path)])
        if number < len(worlds) - 1:
            step = KILLS[number]
            (run.path / "die").write_text(f"{step} step-{step // EVERY * EVERY:08d}")
            _, ranks = start_ranks(run, resume=start.checkpoint)
            for process in ranks:
                process.join(120)
            assert [process.exitcode for process in ranks] == [-signal.SIGKILL] * world
            (run.path / "die").unlink()
        else:
            assert run_worker(run, resume=start.checkpoint).outcome.result == "finished"
    return read(run.path)


def planned(folder: Path, stream: bool, world: int, sizes: Mapping[str, int] = SIZES) -> tuple[Plan, str]:
    for source, size in sizes.items():
        lines = ({"prompt": f"{source}{i:03d}:", "completion": " ab" * (1 + i * 7 % 5)} for i in range(size))
        (folder / f"{source}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {
        "train": [
            {"path": str(folder / f"{source}.jsonl"), "format": "completion", "weight": weight}
            for source, weight in WEIGHTS.items()
        ],
        "sequence_length": 64, "packing": True, "streaming": stream, "cache_dir": str(folder / "cache"),
    }  # fmt: skip
    amount = {"max_steps": STREAM_STEPS} if stream else {"epochs": EPOCHS}
    text = recipe_data(
        folder, parallel=WORLDS["single"] if world == 1 else {"strategy": "ddp", "gpus_per_node": world}
    )
    text["model"]["config"] = {**LLAMA, "num_hidden_layers": 1}
    text |= {
        "data": data, "checkpoint": {"every_steps": EVERY},
        # one row at a time: a step's order shows who took which
        "train": {"learning_rate": 0.01, "global_batch_size": ROWS, "micro_batch_size": 1, **amount},
    }  # fmt: skip
    written = json.dumps(text)
    return make(parse(written, where="test", base_dir=folder, overrides=()), machine=CPU), written


def spy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank writes down what its loop is given, and dies where it is told to."""
    monkeypatch.setenv("SPIED_RUN", "")  # each run's own, see trained(); undone after the test
    given = ahead.Ahead.step

    def step(self: ahead.Ahead, number: int) -> ahead.StepBatches:
        found = given(self, number)
        run_dir, rank = Path(os.environ["SPIED_RUN"]), os.environ["RANK"]
        incarnation = max(int(p.name) for p in (run_dir / "incarnations").iterdir())
        rows = [names(row) for batch in found.micro_batches for row in batch.input_ids.tolist()]
        with open(run_dir / f"seen-{incarnation}-{rank}.jsonl", "a") as file:
            file.write(json.dumps([number, rows]) + "\n")
        if (run_dir / "die").exists():
            when, saved = (run_dir / "die").read_text().split()
            if number == int(when):
                # Together, and with this save in place, which another thread writes: where the run resumes is known.
                (run_dir / f"ready-{incarnation}-{rank}").touch()
                everyone = [
                    run_dir / f"ready-{incarnation}-{k}" for k in range(int(os.environ["WORLD_SIZE"]))
                ]
                wait_for(run_dir / "checkpoints" / saved, *everyone)
                os.kill(os.getpid(), signal.SIGKILL)
        return found

    monkeypatch.setattr(ahead.Ahead, "step", step)


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + WAIT_LIMIT_S
    while not all(path.exists() for path in paths) and time.monotonic() < deadline:
        time.sleep(0.001)


def names(row: list[int]) -> list[str]:
    """The byte tokenizer's tokens are bytes; those above are special."""
    return NAME.findall(bytes(token if token < 256 else 32 for token in row).decode())


def read(run_dir: Path) -> Seen:
    """Puts the ranks' rows of each step together: round a of rank r is row a * ranks + r of the global batch."""
    found: list[tuple[int, int, Ids]] = []
    for incarnation in sorted(int(p.name) for p in (run_dir / "incarnations").iterdir()):
        files = sorted(run_dir.glob(f"seen-{incarnation}-*.jsonl"))
        logs = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        for step in zip(*logs, strict=True):
            assert len({number for number, _ in step}) == 1
            rounds = zip(*(rows for _, rows in step), strict=True)
            found.append((incarnation, step[0][0], tuple(tuple(row) for round_ in rounds for row in round_)))
    return Seen({step: ids for _, step, ids in found}, found)
