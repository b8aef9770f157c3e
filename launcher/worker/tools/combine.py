"""Several adapters over one base into one, and how it does on the parts' tasks."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decompft.launcher.errors import UserError
from decompft.launcher.worker.adapter_folder import adapter_folder
from decompft.launcher.worker.combining_rule import METHODS, rule_of
from decompft.launcher.worker.tools.main import run_tool

if TYPE_CHECKING:
    from decompft.launcher.worker.combining import Combination
    from decompft.launcher.worker.combining_write import Compressed


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="decompft combine")
    parser.add_argument("adapters", nargs="+")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--into", choices=("dense",))
    parser.add_argument("--rank", type=int)
    parser.add_argument("--coefficients")
    parser.add_argument("--norm-of", choices=("task_vector", "full"))
    parser.add_argument("--granularity", choices=("tensor", "model"))
    parser.add_argument("--scale")
    parser.add_argument("--density", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--base")
    parser.add_argument("--task", nargs="+", default=[])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    rule = rule_of(args, len(args.adapters))
    _refuse_idle(args)
    folders = [adapter_folder(adapter) for adapter in args.adapters]
    # transformers takes seconds to import: only after the arguments were read
    import torch

    from decompft.launcher.worker.combining import Combination
    from decompft.launcher.worker.combining_parts import Base, open_parts
    from decompft.launcher.worker.combining_write import refuse_existing, write_adapter, write_model
    from decompft.launcher.worker.inference import open_adapter
    from decompft.launcher.worker.scoring import read_questions
    from decompft.launcher.worker.tools.progress import Progress, say

    refuse_existing(args.out)
    tasks = {path: read_questions(path, args.limit)[0] for path in args.task}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compressed = None
    with torch.no_grad():
        opened = [open_adapter(folder, base=args.base, say=say) for folder in folders]
        parts = open_parts(opened, device)
        if tasks and opened[0].model.task != "causal-lm":
            raise UserError(
                "--task: the adapters are classifiers, which write no answers", "leave --task out"
            )
        formats = {part.adapter.quantization.format for part in parts}
        if args.into is None and len(formats) > 1:
            first = parts[0].adapter.quantization.format
            say(
                f"the parts were trained over {', '.join(sorted(formats))}; the result names {first}, the first's"
            )
        base = Base(parts[0], device, as_trained=args.into is None)
        with Progress("weighing") as progress:
            combination = Combination(parts, rule, base, progress)
        with Progress("combining") as progress:
            if args.into is None:
                compressed = write_adapter(combination, args.out, rank=args.rank, progress=progress)
            else:
                write_model(combination, base, args.out, progress=progress)
    found = _report(args, combination, compressed)
    if tasks:
        del parts, base, combination, opened
        found["accuracies"] = _accuracies(args, folders, tasks)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)


def _refuse_idle(args: argparse.Namespace) -> None:
    """Numbers that are out of range, and flags that nothing would read."""
    for name in ("rank", "limit", "batch_size"):
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
        if value is not None and name != "rank" and not args.task:
            raise UserError(f"{flag} {value}: nothing is scored", "add --task FILE, or leave it out")
    if args.rank is not None and args.into is not None:
        raise UserError("--rank: a dense model has no rank", "leave out --rank or --into")


def _report(
    args: argparse.Namespace, combination: Combination, compressed: Compressed | None
) -> dict[str, Any]:
    rule = combination.rule
    found: dict[str, Any] = {
        "out": str(args.out),
        "method": rule.method,
        "is_reading": rule.weights == "nan",
        "parts": [str(part.adapter.folder) for part in combination.parts],
        "coefficients": combination.coefficients,
    }
    if compressed is not None:
        found |= {
            "rank": compressed.rank,
            "lost_overall": compressed.lost_overall,
            "lost": compressed.lost,
        }
    return found


def _accuracies(
    args: argparse.Namespace, folders: Iterable[Path], tasks: dict[str, list[Any]]
) -> list[dict[str, Any]]:
    """One row an adapter, the result last: accuracy by the likelihood of the labels, a task."""
    import torch

    from decompft.launcher.worker.inference import load
    from decompft.launcher.worker.scoring import best_label, likelihoods
    from decompft.launcher.worker.tools.progress import Progress, say

    asked: list[tuple[str, Path | None, str | None]] = [(str(f), f, args.base) for f in folders]
    dense = args.into is not None
    asked.append((str(args.out), None if dense else args.out, str(args.out) if dense else args.base))
    rows = []
    for name, folder, base in asked:
        with Progress(f"loading {name}") as progress:
            loaded = load(folder, base=base, progress=progress, say=say)
        accuracy = {}
        for path, questions in tasks.items():
            with Progress(f"{Path(path).name}, {name}") as progress:
                scores = likelihoods(loaded, questions, batch_size=args.batch_size, report=progress)
            pairs = zip(questions, scores, strict=True)
            accuracy[path] = sum(best_label(q, s) == q.answer for q, s in pairs) / len(questions)
        rows.append({"name": name, "accuracy": accuracy, "mean": sum(accuracy.values()) / len(accuracy)})
        del loaded  # before the next one takes its place
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    line = "a plain model, which transformers loads and model.id takes"
    if "rank" in found:
        line = f"a lora adapter of rank {found['rank']}, for eval, generate and merge"
    console.print(f"{found['out']}: {line}", soft_wrap=True, markup=False)
    label = "coefficients (NAN: a reading of the paper)" if found["is_reading"] else "coefficients"
    console.print(f"{label}, mean (least to most) over {len(found['coefficients'])} tensors", markup=False)
    for name, values in zip(found["parts"], zip(*found["coefficients"].values(), strict=True), strict=True):
        mean = sum(values) / len(values)
        spread = f"{mean:.4g} ({min(values):.4g} to {max(values):.4g})"
        console.print(f"  {spread}  {name}", soft_wrap=True, markup=False)
    if found.get("lost_overall"):
        worst = max(found["lost"], key=found["lost"].__getitem__)
        console.print(
            f"rank {found['rank']} leaves out {found['lost_overall']:.3%} of the change's norm, "
            f"most in {worst}: {found['lost'][worst]:.3%}", soft_wrap=True, markup=False,
        )  # fmt: skip
    if "accuracies" in found:
        _show_accuracies(found["accuracies"], console)


def _show_accuracies(rows: list[dict[str, Any]], console: Any) -> None:
    from rich.table import Table

    table = Table()
    table.add_column("adapter", overflow="fold")
    for path in rows[0]["accuracy"]:
        table.add_column(Path(path).stem, justify="right", overflow="fold")
    table.add_column("mean", justify="right")
    for row in rows:
        table.add_row(row["name"], *(f"{a:.2%}" for a in row["accuracy"].values()), f"{row['mean']:.2%}")
    console.print(table)


if __name__ == "__main__":
    run_tool(main, sys.argv[1:])
