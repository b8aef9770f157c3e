"""How the linear weights of a model are distributed, and what tuning changed in them."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from decompft.adapters.targets import ALL_LINEAR


def main(argv: list[str]) -> None:
    """Show statistics of each kind of linear layer.

    Args:
        argv: MODEL [--tuned MODEL|ADAPTER] [--layers PATTERN ...] [--all] [--json] [--out DIR].
    """
    parser = argparse.ArgumentParser(prog="decompft inspect weights")
    parser.add_argument("model")
    parser.add_argument("--tuned")
    parser.add_argument("--layers", nargs="+", default=[ALL_LINEAR])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    # torch and transformers take seconds to import: only after the arguments were read
    from rich.console import Console

    from decompft.launcher.worker.inspecting import weights as inspecting
    from decompft.launcher.worker.inspecting.plots import plot_weights, require_matplotlib
    from decompft.launcher.worker.inspecting.report import as_json, check_out, write
    from decompft.launcher.worker.inspecting.tables import weight_tables
    from decompft.launcher.worker.tools.progress import Progress, say

    if args.out is not None:
        require_matplotlib()
        check_out(args.out)
    weights = inspecting.open_weights(args.model, say)
    names = inspecting.selected(weights, args.layers)
    change = None if args.tuned is None else inspecting.open_tuned(args.tuned, weights, say)
    with Progress("inspecting") as progress:
        rows = list(inspecting.inspect_weights(weights, names, change, progress))
    report: dict[str, Any] = {
        "model": args.model,
        "tuned": args.tuned,
        "std_over_depth": _profiles(rows),
        "layers": [asdict(row) for row in rows],
    }
    if args.json:
        print(as_json(report), end="")
    else:
        console = Console()
        for table in weight_tables(rows, each=args.all):
            console.print(table)
    if args.out is not None:
        for path in write(args.out, "weights", report, lambda stem: plot_weights(rows, stem)):
            say(str(path))


def _profiles(rows: list[Any]) -> dict[str, Any]:
    from decompft.launcher.worker.inspecting.by_kind import by_kind, profile

    return {k: asdict(profile(group, lambda row: row.distribution.std)) for k, group in by_kind(rows).items()}
