"""Which cells make the scoreboard, in what order, with what settings, and which of them are finished?

A cell is one process's work: `time` is a few steps alone on a device; `search` a short run at one learning rate,
judged on training records that were held out; `train` a whole run, scored on the test files; `base` the untouched
model's score. Each leaves one JSON file, written whole or not at all. A file made with other settings (another
budget, rank, option, recipe) counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from scoreboard_cases import Case

Kind = Literal["base", "time", "search", "train"]
Row = dict[str, Any]
KINDS: tuple[Kind, ...] = ("time", "base", "search", "train")
SETS = ("boolq", "arc_easy", "arc_challenge", "openbookqa")
FORMATS = ("nf4", "none")
SEARCH_FORMAT = "nf4"
# the part of the budget that decides what a cell measures
_DECIDES: dict[Kind, tuple[str, ...]] = {
    "time": ("time_steps",),
    "base": ("limit",),
    "search": ("search_records", "held_out_records", "search_seed"),
    "train": ("limit",),
}
FINAL = ("ok", "failed")  # a method that diverges or refuses has ended; "error" is ours and is tried again


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every method gets alike."""

    seeds: tuple[int, ...] = (0, 1, 2)
    search_seed: int = 0
    search_records: int = 4000
    held_out_records: int = 1000  # training records that no search run sees and every one is judged on
    time_steps: int = 32  # the last third is timed: after every switch that comes at step 20
    limit: int | None = None  # test records a file; None: all


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all cells of a scoreboard share; `recipe` and `model` are paths, `overrides` for trials at toy size."""

    recipe: Path
    model: str | None
    data: Path
    work: Path
    budget: Budget = Budget()
    overrides: tuple[str, ...] = ()

    def tests(self) -> list[str]:
        return [str(self.data / f"{name}_test.jsonl") for name in SETS]

    def train_files(self, kind: Kind) -> list[str]:
        folder = self.work / "search" if kind == "search" else self.data
        return [str(folder / f"{name}_train.jsonl") for name in SETS]

    def held_out(self) -> list[str]:
        return [str(self.work / "search" / f"{name}_held.jsonl") for name in SETS]


@dataclass(frozen=True, kw_only=True)
class Cell:
    kind: Kind
    case: Case | None  # None: the untouched base
    form: str
    seed: int
    rate: float | None  # None in `base`, and in `train` until the search has chosen

    @property
    def name(self) -> str:
        """Also the file's; without the rate of a `train` cell, of which there is one."""
        case = "" if self.case is None else "-" + self.case.name.replace(" ", "_").replace("/", "_")
        rate = f"-{self.rate:g}" if self.kind == "search" else ""
        return f"{self.kind}{case}-{self.form}-{self.seed}{rate}"


def all_cells(cases: Sequence[Case], budget: Budget, kinds: Sequence[str] = KINDS) -> Iterator[Cell]:
    """In the order in which they are worth having, so that whatever time there is leaves a useful table."""
    every: list[Cell] = [Cell(kind="time", case=c, form="nf4", seed=0, rate=c.base_rate) for c in cases]
    # the middle rate of every case first: a search cut short still has the same rates for all
    every += [
        Cell(kind="search", case=c, form=SEARCH_FORMAT, seed=budget.search_seed, rate=c.rates()[place])
        for place in (1, 0, 2)
        for c in cases
    ]
    every += [Cell(kind="base", case=None, form=f, seed=0, rate=None) for f in FORMATS]
    # nf4 and bf16 of one seed, then of the next
    order = [(s, f) for s in budget.seeds for f in FORMATS]
    every += [Cell(kind="train", case=c, form=f, seed=s, rate=None) for s, f in order for c in cases]
    return (cell for cell in every if cell.kind in kinds)


class Store:
    """The finished cells: one JSON file each under a folder."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.folder = setup.work / "cells"
        self._recipe = yaml.safe_load(setup.recipe.read_text(encoding="utf-8"))
        self.rows: dict[str, Row] = {}
        for path in sorted(self.folder.glob("*.json")):
            row = json.loads(path.read_text(encoding="utf-8"))
            self.rows[row["cell"]] = row

    def digest(self, cell: Cell) -> str:
        """Of all that decides what a cell measures but its rate, which its row holds."""
        budget = asdict(self.setup.budget)
        used = {k: budget[k] for k in _DECIDES[cell.kind]}
        case = {} if cell.case is None else asdict(cell.case)
        for said in ("why", "base_rate"):
            case.pop(said, None)
        facts = [cell.kind, case, cell.form, cell.seed, used, self._recipe, self.setup.overrides]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def row(self, cell: Cell) -> Row | None:
        """What a finished cell left; None while it has to be run."""
        row = self.rows.get(cell.name)
        if row is None or row["settings"] != self.digest(cell) or row["ended"] not in FINAL:
            return None
        if cell.kind == "train" and row["learning_rate"] != self.best_rate(cell.case):
            return None
        return row

    def best_rate(self, case: Case | None) -> float | None:
        """The rate with the smallest held-out loss; None until all were tried, NaN where all failed."""
        assert case is not None
        rows = [self.row(cell) for cell in all_cells((case,), self.setup.budget, ("search",))]
        if not all(rows):
            return None
        good = [r for r in rows if r and r["ended"] == "ok" and math.isfinite(r["held_out_loss"])]
        return min(good, key=lambda r: r["held_out_loss"])["learning_rate"] if good else math.nan

    def valid(self, cases: Sequence[Case]) -> list[Row]:
        """The rows of these cases that were made with the settings of now, and what errors were left, by name."""
        cells = {cell.name: cell for cell in all_cells(cases, self.setup.budget)}
        kept = [name for name in self.rows if name in cells]
        return [
            self.rows[name] for name in sorted(kept)
            if self.rows[name]["ended"] not in FINAL or self.row(cells[name]) is not None
        ]  # fmt: skip

    def keep(self, row: Row) -> None:
        write_json(self.folder / f"{row['cell']}.json", row)
        self.rows[row["cell"]] = row

    def merge(self, rows: Iterable[Row]) -> None:
        """Take over earlier results; what is here already stays."""
        for row in rows:
            if row["cell"] not in self.rows:
                self.keep(row)


def order_of(setup: Setup, store: Store, cell: Cell, rate: float | None) -> dict[str, Any]:
    """What a worker is told: overrides of the recipe, what to score on, and what its row says of itself."""
    case = cell.case
    overrides = [f"quantization.format={cell.form}"]
    overrides += [] if setup.model is None else [f"model.id={setup.model}"]
    if case is not None:
        overrides += [
            f"adapter.method={case.method}", f"adapter.rank={case.rank}", f"adapter.alpha={case.alpha}",
            f"adapter.options={json.dumps(case.options)}", f"train.learning_rate={rate!r}", f"train.seed={cell.seed}",
        ]  # fmt: skip
    overrides += [f"data.train[{i}].path={path}" for i, path in enumerate(setup.train_files(cell.kind))]
    if cell.kind == "time":
        overrides += ["train.epochs=null", f"train.max_steps={setup.budget.time_steps}"]
    row: Row = {
        "cell": cell.name, "kind": cell.kind, "case": None if case is None else case.name,
        "method": None if case is None else case.method, "format": cell.form, "seed": cell.seed,
        "learning_rate": rate, "settings": store.digest(cell),
    }  # fmt: skip
    scored = {"time": [], "search": setup.held_out()}.get(cell.kind, setup.tests())
    return {
        "row": row, "recipe": str(setup.recipe), "overrides": [*overrides, *setup.overrides], "score": scored,
        "limit": None if cell.kind == "search" else setup.budget.limit, "run": str(setup.work / "runs" / cell.name),
    }  # fmt: skip


def write_search_files(setup: Setup) -> None:
    """Records for the search and others to judge it on, drawn once from each training file by its share."""
    folder, draw = setup.work / "search", random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        name: (setup.data / f"{name}_train.jsonl").read_text(encoding="utf-8").splitlines() for name in SETS
    }
    total, held = sum(map(len, files.values())), setup.budget.held_out_records // len(SETS)
    for name, lines in files.items():
        draw.shuffle(lines)
        share = round(setup.budget.search_records * len(lines) / total)
        for ending, part in (("held", lines[:held]), ("train", lines[held : held + share])):
            (folder / f"{name}_{ending}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{os.getpid()}")
    temp.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temp.replace(path)


def read_results(path: Path) -> tuple[Budget, list[Row]]:
    """A combined file: the budget, and its cells."""
    found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Budget(**found["budget"]), list(found["cells"])
