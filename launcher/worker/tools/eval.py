"""How well an adapter answers tasks: accuracy per file, by one scorer or both."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decompft.launcher.errors import UserError
from decompft.launcher.worker.adapter_folder import adapter_folder
from decompft.launcher.worker.tools.main import run_tool

if TYPE_CHECKING:
    from decompft.launcher.worker.inference import Loaded

SCORERS = {
    "likelihood": ("likelihood",),
    "first-match": ("first-match",),
    "both": ("likelihood", "first-match"),
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="decompft eval")
    parser.add_argument("adapter", nargs="?")
    parser.add_argument("--task", nargs="+", required=True)
    parser.add_argument("--base")
    parser.add_argument("--no-adapter", action="store_true")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--scorer", choices=tuple(SCORERS), default="likelihood")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    for name in ("limit", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    folder = None if args.adapter is None else adapter_folder(args.adapter)
    # transformers takes seconds to import: only after the arguments were read
    from decompft.launcher.worker.inference import load
    from decompft.launcher.worker.scoring import read_questions
    from decompft.launcher.worker.tools.progress import Progress, say

    tasks = {path: read_questions(path, args.limit) for path in args.task}
    with Progress("loading the base") as progress:
        loaded = load(folder, base=args.base, use_adapter=not args.no_adapter, progress=progress, say=say)
    if loaded.model.task != "causal-lm":
        raise UserError(
            f"{args.adapter}: is a classifier, which writes no answers",
            "its accuracy on held-out data is in metrics.jsonl of its run",
        )
    rows = [
        {"task": path, "scorer": scorer, **_score(loaded, path, *task, scorer, args.batch_size)}
        for path, task in tasks.items()
        for scorer in SCORERS[args.scorer]
    ]
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        _show(rows)


def _score(
    loaded: Loaded, path: str, questions: list[Any], words: list[str], scorer: str, batch_size: int | None
) -> dict[str, Any]:
    from decompft.launcher.worker.scoring import best_label, first_matches, likelihoods
    from decompft.launcher.worker.tools.progress import Progress

    began = time.perf_counter()
    chosen: list[str | None]
    with Progress(f"{Path(path).name}, {scorer}") as progress:
        if scorer == "likelihood":
            scores = likelihoods(loaded, questions, batch_size=batch_size, report=progress)
            chosen = [best_label(question, row) for question, row in zip(questions, scores, strict=True)]
        else:
            chosen = first_matches(loaded, questions, words, batch_size=batch_size, report=progress)
    correct = sum(label == question.answer for question, label in zip(questions, chosen, strict=True))
    return {
        "accuracy": correct / len(questions),
        "num_correct": correct,
        "num_records": len(questions),
        "num_unmatched": chosen.count(None),
        "seconds": round(time.perf_counter() - began, 3),
    }


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("task", overflow="fold")
    table.add_column("scorer", no_wrap=True)
    for name in ("accuracy", "correct", "records", "no match", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        counts = (f"{row[f'num_{name}']:,}" for name in ("correct", "records", "unmatched"))
        table.add_row(
            Path(row["task"]).name, row["scorer"], f"{row['accuracy']:.2%}", *counts, f"{row['seconds']:.1f}"
        )
    Console().print(table)


if __name__ == "__main__":
    run_tool(main, sys.argv[1:])
