"""docs/scoreboard.md is what the committed results say; its judgements follow the numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import scoreboard_page  # noqa: E402
from scoreboard_cases import cases  # noqa: E402
from scoreboard_cells import SETS, Budget, Cell, Setup, Store, all_cells  # noqa: E402

SPREAD = (-0.001, 0.0, 0.001)  # over three seeds: a standard error of 0.06 points


def test_the_page_is_current(update_golden):
    text = scoreboard_page.page()
    if update_golden:
        scoreboard_page.PAGE.write_text(text, encoding="ascii")
    assert scoreboard_page.PAGE.read_text(encoding="ascii") == text, (
        "run: python benchmarks/scoreboard_page.py"
    )


def test_rows_of_readings_say_so():
    rows = [line for line in scoreboard_page.page().splitlines() if line.startswith("| ")]
    named = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    for name in ("speclora", "speclora additive", "lora_init", "lora_tsd"):
        assert f"{name} (reading)" in named and name not in named
    assert "lora" in named and "lora (reading)" not in named


@pytest.fixture
def store(tmp_path):
    return Store(Setup(recipe=BENCHMARKS / "scoreboard.yaml", model=None, data=tmp_path, work=tmp_path))


def finish(store, accuracies, seeds=(0, 1, 2), form="nf4"):
    """A finished search and finished runs of the named cases."""
    for case in cases():
        if case.name not in accuracies:
            continue
        for cell in all_cells((case,), store.setup.budget, ("time", "search")):
            put(store, cell, held_out_loss=abs(cell.rate - case.base_rate), step_s=0.2, rate=cell.rate)
        for seed in seeds:
            value = accuracies[case.name] + SPREAD[seed]
            put(
                store, Cell(kind="train", case=case, form=form, seed=seed, rate=None), rate=case.base_rate,
                accuracy={**dict.fromkeys(SETS, value), "mean": value}, label_loss={"mean": 1 - value},
                peak_bytes=2**30, num_params=1000, file_bytes=2**20,
            )  # fmt: skip
    base = Cell(kind="base", case=None, form=form, seed=0, rate=None)
    put(
        store, base, accuracy={"mean": 0.3}, label_loss={"mean": 1.2}, most_frequent={"mean": 0.35}, rate=None
    )


def put(store, cell, *, rate, **more):
    store.rows[cell.name] = {
        "cell": cell.name, "settings": store.digest(cell), "ended": "ok", "learning_rate": rate, "device": "X", **more
    }  # fmt: skip


def judged(store, form="nf4"):
    return scoreboard_page.judgement(scoreboard_page.lines(store, form), store, form)


def test_a_page_says_so_where_map_does_not_win(store):
    finish(store, {"lora": 0.37, "map": 0.36})
    said = judged(store)
    assert "**MAP does not win here**: it is number 2 of 2" in said
    assert "-1.00 points, more than two standard errors" in said
    assert (
        "always giving each file's most frequent answer would score 35.00 %, which 2 of 2 methods pass"
        in said
    )


def test_a_difference_within_the_noise_is_called_that(store):
    finish(store, {"lora": 0.3600, "map": 0.3601})
    said = judged(store)
    assert "MAP wins here" in said and "no more than two standard errors" in said
    assert "1 of the other 1 are not told from it" in said


def test_one_seed_tells_nothing_apart(store):
    finish(store, {"lora": 0.40, "map": 0.30}, seeds=(0,))
    assert "no more than two standard errors" in judged(store)


def test_what_was_not_run_and_what_failed_is_named(store):
    finish(store, {"lora": 0.37}, seeds=(0, 1))
    bad = next(c for c in cases() if c.name == "map")
    for cell in all_cells((bad,), store.setup.budget, ("search",)):
        store.rows[cell.name] = {
            "cell": cell.name, "settings": store.digest(cell), "ended": "failed", "learning_rate": cell.rate,
            "message": "the loss is nan", "seconds": 1.0,
        }  # fmt: skip
    text = scoreboard_page.missing_section(store)
    assert "| search-map-nf4-0-0.001 | the loss is nan |" in text
    assert "- train, nf4, seed 2: " in text and "- train, nf4, seed 0: every method" not in text
    assert "none worked" in scoreboard_page.search_section(store)


def test_results_of_another_budget_are_not_shown(store, tmp_path):
    finish(store, {"lora": 0.37})
    other = Store(
        Setup(
            recipe=BENCHMARKS / "scoreboard.yaml",
            model=None,
            data=tmp_path,
            work=tmp_path,
            budget=Budget(search_records=7),
        )  # fmt: skip
    )
    other.rows = store.rows
    assert scoreboard_page.lines(store, "nf4") and not scoreboard_page.lines(other, "nf4")


def test_the_plot_is_drawn(store, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    finish(store, {"lora": 0.37, "map": 0.36})
    monkeypatch.setattr(scoreboard_page, "PLOT", tmp_path / "plot.svg")
    scoreboard_page.draw({"nf4": scoreboard_page.lines(store, "nf4"), "none": []})
    assert "</svg>" in (tmp_path / "plot.svg").read_text()
