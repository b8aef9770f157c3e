"""Run folders as a report meets them, and its page as parsers see it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from test_runs import RECIPE, make_plan

from decompft.launcher.outcome import Outcome, write_outcome
from decompft.launcher.report import write_report
from decompft.launcher.runs import RunDir

SVG = "{http://www.w3.org/1999/xhtml}"  # inline in a document of that namespace
T0 = (
    float(round(time.time())) - 100.0
)  # recent: else a timeline up to now has no room between what happened then
GIB = 2**30
Row = dict[str, Any]


def make_run(path: Path, rows: Iterable[Row] = (), events: Iterable[Row] = (), **changes: Any) -> RunDir:
    plan = make_plan().model_copy(update=changes)
    run = RunDir.create(path, recipe_text=RECIPE, plan=plan)
    write_lines(run.metrics_path, rows)
    write_lines(run.path / "events.jsonl", events)
    return run


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(step: int, loss: float | None = None, **values: Any) -> Row:
    numbers = {
        "epoch": step / 10, "loss": 5 / step if loss is None else loss, "learning_rate": 1e-3, "grad_norm": 0.5,
        "tokens_per_s": 900.0 + step, "trained_tokens": 64, "peak_mem_bytes": GIB + step, "step_s": 0.5,
    }  # fmt: skip
    return {"step": step, **numbers, **values}


def event(name: str, at_s: float, incarnation: int = 1, **details: Any) -> Row:
    return {"event": name, "time_s": T0 + at_s, "incarnation": incarnation, **details}


def start(at_s: float, incarnation: int, step: int = 0) -> Row:
    checkpoint = f"runs/x/checkpoints/step-{step:08d}" if step else None
    return event("start", at_s, incarnation, world_size=2, checkpoint=checkpoint)


def finish(run: RunDir, outcome: Outcome) -> None:
    write_outcome(run.incarnation_dir(run.next_incarnation()), outcome)


def report(*runs: RunDir) -> tuple[str, ElementTree.Element]:
    """The page as text, and as the tree a strict parser makes of it."""
    out = write_report([str(run.path) for run in runs], runs[0].path / "page.html")
    html = out.read_text(encoding="utf-8")
    return html, ElementTree.fromstring(html)


def words(tree: ElementTree.Element) -> str:
    return " ".join(" ".join(tree.itertext()).split())


def figures(tree: ElementTree.Element) -> dict[str, ElementTree.Element]:
    found = {}
    for element in tree.iter(f"{SVG}figure"):
        title = element.find(f"{SVG}figcaption/{SVG}b")
        assert title is not None
        found[title.text or ""] = element
    return found


def of_class(element: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [e for e in element.iter() if name in e.get("class", "").split()]


def shown(tree: ElementTree.Element, verdict: str) -> str:
    (line,) = of_class(tree, "verdict")
    assert verdict in line.get("class", "")
    return words(line)
