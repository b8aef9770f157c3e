"""The scoreboard's driver at toy size: finished cells are skipped, a killed one is run again, a refusal is a result."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import scoreboard  # noqa: E402
from scoreboard_cases import Case, cases  # noqa: E402
from scoreboard_cells import SETS, Budget, Cell, Setup, Store, all_cells, write_search_files  # noqa: E402

from decompft.launcher.source import load  # noqa: E402

MODEL = {
    "model_type": "llama", "vocab_size": 260, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
TOY = (
    "model.id=null", f"model.config={json.dumps(MODEL)}", "model.weights=random", "quantization.compute=float32",
    "train.global_batch_size=2", "train.micro_batch_size=2", "train.warmup_steps=0",
)  # fmt: skip
LORA = Case(name="lora", method="lora", base_rate=1e-3, why="a test")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in SETS:
        for part, count in (("train", 12), ("test", 3)):
            rows = [
                {
                    "instruction": f"Is {i} even?\n\nAnswer format: true/false", "input": "",
                    "output": f"the correct answer is {str(i % 2 == 0).lower()}", "answer": str(i % 2 == 0).lower(),
                }
                for i in range(count)
            ]  # fmt: skip
            (folder / f"{name}_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def argv(data, work, *more):
    budget = {"seeds": [0], "search_records": 16, "held_out_records": 8, "time_steps": 2, "limit": 2}
    return [
        *("--data", str(data), "--work", str(work), "--out", str(work / "all.json"), "--gpus", "1"),
        *("--per-gpu", "1", "--cases", "lora", "vera", "--budget", json.dumps(budget), "--override", *TOY, *more),
    ]  # fmt: skip


def setup_of(tmp_path, **budget):
    return Setup(
        recipe=BENCHMARKS / "scoreboard.yaml",
        model=None,
        data=tmp_path,
        work=tmp_path,
        budget=Budget(**budget),
    )


def row_of(store, cell, **more):
    return {
        "cell": cell.name, "kind": cell.kind, "settings": store.digest(cell), "learning_rate": cell.rate,
        "ended": "ok", "seconds": 1.0, **more,
    }  # fmt: skip


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_every_case_is_a_recipe_that_the_registry_takes(case):
    recipe = load(
        BENCHMARKS / "scoreboard.yaml",
        [
            f"adapter.method={case.method}",
            f"adapter.options={json.dumps(case.options)}",
            f"adapter.rank={case.rank}",
        ],
    )
    assert recipe.adapter.method == case.method
    assert len(case.rates()) == 3 and case.rates()[1] == case.base_rate and case.why


def test_every_method_of_the_registry_has_a_case_and_names_are_unique():
    from scoreboard_cases import ALIASES

    from decompft.adapters.spec import ADAPTER_SPECS

    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)
    assert {case.method for case in cases()} == set(ADAPTER_SPECS) - set(ALIASES)


def test_search_records_are_never_those_it_is_judged_on(data, tmp_path):
    setup = Setup(
        recipe=BENCHMARKS / "scoreboard.yaml", model=None, data=data, work=tmp_path,
        budget=Budget(search_records=16, held_out_records=8),
    )  # fmt: skip
    write_search_files(setup)
    for name in SETS:
        train, held = (
            (tmp_path / "search" / f"{name}_{part}.jsonl").read_text().splitlines()
            for part in ("train", "held")
        )
        assert len(train) == 4 and len(held) == 2 and not set(train) & set(held)


def test_the_rate_with_the_least_held_out_loss_is_trained_with(tmp_path):
    store = Store(setup_of(tmp_path))
    cells = list(all_cells((LORA,), Budget(), ("search",)))
    losses = {3.3e-4: 0.7, 1e-3: 0.5, 3e-3: math.nan}
    for cell in cells[:2]:
        store.keep(row_of(store, cell, held_out_loss=losses[cell.rate]))
    assert store.best_rate(LORA) is None  # one is missing
    store.keep(row_of(store, cells[2], held_out_loss=losses[cells[2].rate]))
    assert store.best_rate(LORA) == 1e-3
    trained = Cell(kind="train", case=LORA, form="nf4", seed=1, rate=None)
    store.keep(row_of(store, trained) | {"learning_rate": 3.3e-4})
    assert store.row(trained) is None  # of another rate
    store.keep(row_of(store, trained) | {"learning_rate": 1e-3})
    assert store.row(trained) is not None


def test_a_search_that_failed_everywhere_trains_nothing(tmp_path):
    store = Store(setup_of(tmp_path))
    for cell in all_cells((LORA,), Budget(), ("search",)):
        store.keep(row_of(store, cell) | {"ended": "failed", "message": "diverged"})
    board = scoreboard.Board(store, math.inf)
    board.open(list(all_cells((LORA,), Budget(), ("train",))))
    assert board.take() is None


def test_other_settings_make_a_cell_missing_and_an_error_is_tried_again(tmp_path):
    store = Store(setup_of(tmp_path))
    cell = Cell(kind="time", case=LORA, form="nf4", seed=0, rate=1e-3)
    store.keep(row_of(store, cell))
    assert store.row(cell) is not None
    assert Store(setup_of(tmp_path)).row(cell) is not None  # from disk
    assert Store(setup_of(tmp_path, time_steps=7)).row(cell) is None
    store.keep(row_of(store, cell) | {"ended": "error", "message": "a bug"})
    assert store.row(cell) is None


def test_nothing_is_started_that_would_not_end_in_time(tmp_path):
    store = Store(setup_of(tmp_path))
    cells = [Cell(kind="time", case=LORA, form="nf4", seed=seed, rate=1e-3) for seed in range(3)]
    board = scoreboard.Board(store, time.monotonic() + 100)
    board.open(cells)
    first, _ = board.take()
    board.finished(first, row_of(store, first) | {"seconds": 1000.0})
    assert board.take() is None


@pytest.mark.dist
def test_a_second_start_skips_what_is_finished_and_a_killed_cell_is_not(data, tmp_path, capsys):
    scoreboard.main(argv(data, tmp_path, "--kinds", "time", "search"))
    rows = {row["cell"]: row for row in json.loads((tmp_path / "all.json").read_text())["cells"]}
    lora, vera = ([row for row in rows.values() if row["case"] == name] for name in ("lora", "vera"))
    assert len(lora) == 4 and all(row["ended"] == "ok" for row in lora), lora
    assert all(math.isfinite(row["held_out_loss"]) for row in lora if row["kind"] == "search")
    # its rank is larger than this model is wide: refused, which is a result, and the process went on
    assert len(vera) == 4 and all(row["ended"] == "failed" and "rank" in row["message"] for row in vera), vera
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert not list((tmp_path / "runs").iterdir())  # nothing but the rows is kept

    # killed before its worker can have imported torch
    scoreboard.main(argv(data, tmp_path, "--minutes", "0.005"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()} == before
    assert "missing" in capsys.readouterr().out

    scoreboard.main(argv(data, tmp_path))
    rows = {row["cell"]: row for row in json.loads((tmp_path / "all.json").read_text())["cells"]}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {row["kind"] for row in rows.values()} == {"time", "search", "base", "train"}
    assert not [row for row in rows.values() if row["kind"] == "train" and row["case"] == "vera"]
    trained = rows["train-lora-nf4-0"]
    assert trained["ended"] == "ok" and set(trained["accuracy"]) == {*SETS, "mean"}
    assert trained["num_params"] > 0 and trained["file_bytes"] > 4 * trained["num_params"]


def test_the_workers_listen_to_nothing_but_their_orders(tmp_path):
    """An empty order book ends a worker in order."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "scoreboard_worker.py")],
        input="",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "")
