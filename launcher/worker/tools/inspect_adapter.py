"""What an adapter learned, told from its own folder: its base is not needed."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from decompft.launcher.worker.adapter_folder import adapter_folder


def main(argv: list[str]) -> None:
    """Show statistics of each kind of adapted layer.

    Args:
        argv: ADAPTER [--all] [--json] [--out DIR].
    """
    parser = argparse.ArgumentParser(prog="decompft inspect adapter")
    parser.add_argument("adapter")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    folder = adapter_folder(args.adapter)
    # torch takes seconds to import: only after the arguments were read
    from rich.console import Console

    from decompft.launcher.worker.inspecting.adapter import inspect_adapter, std_profile, values
    from decompft.launcher.worker.inspecting.by_kind import by_kind
    from decompft.launcher.worker.inspecting.layers import open_layers
    from decompft.launcher.worker.inspecting.plots import plot_adapter, require_matplotlib
    from decompft.launcher.worker.inspecting.report import as_json, check_out, write
    from decompft.launcher.worker.inspecting.tables import adapter_tables
    from decompft.launcher.worker.tools.progress import say

    if args.out is not None:
        require_matplotlib()
        check_out(args.out)
    layers, told = open_layers(folder)
    if layers.unsized:
        say(
            f"{len(layers.unsized)} layers, e.g. {layers.unsized[0]}: the low-rank part is left out: it follows "
            "from the size of the base's layer, which the file does not tell, and the base is not here"
        )
    rows = inspect_adapter(layers)
    report: dict[str, Any] = {
        "adapter": args.adapter,
        "method": told.adapter.method,
        "formulas": {name: formula.model_dump() for name, formula in told.formulas.items()},
        "step": told.step,
        "std_over_depth": {kind: asdict(std_profile(group)) for kind, group in by_kind(rows).items()},
        "layers": [asdict(row) for row in rows],
        "whole": {name: asdict(values(tensor)) for name, tensor in layers.whole.items()},
    }
    if args.json:
        print(as_json(report), end="")
    else:
        console = Console()
        for formula in report["formulas"].values():
            note = " (a reading)" if formula["is_reading"] else ""
            console.print(formula["title"] + note, highlight=False, soft_wrap=True)
        for table in adapter_tables(rows, each=args.all):
            console.print(table)
        for name, tensor in layers.whole.items():
            what = "rows of tokens" if name.endswith(".rows") else "trained whole"
            console.print(f"{what}: {name} {list(tensor.shape)}", highlight=False, soft_wrap=True)
    if args.out is not None:
        for path in write(args.out, "adapter", report, lambda stem: plot_adapter(rows, stem)):
            say(str(path))
