"""What a launch takes until its first step, by phase, and its CPU seconds; beside another checkout, in turn.

    python benchmarks/startup.py recipes/tiny_map.yaml [KEY=VALUE ...] [--against DIR] [--times 5]

Each launch trains one step. The first of each checkout warms the caches (converted model, tokenized rows) and does not
count. CPU seconds are those of all processes of a launch; a busy machine disturbs them less than the clock.
DIR holds `decompft/{adapters,launcher,recipes,slurm}`: links to another checkout's folders, for PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from decompft.launcher.worker.startup import startup_line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--against", type=Path, metavar="DIR")
    parser.add_argument("--times", type=int, default=5)
    args = parser.parse_args()
    sides: dict[str, Path | None] = {"this": None, **({"other": args.against} if args.against else {})}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for count in range(args.times + 1):
        for name, place in sides.items():
            row = launch(args.recipe, args.overrides, place)
            if count:
                found[name].append(row)
                print(f"{name}: {row['wall_s']:.1f} s, CPU {row['cpu_s']:.1f} s", file=sys.stderr, flush=True)
    for name, rows in found.items():
        middle = {key: statistics.median(row[key] for row in rows) for key in ("wall_s", "cpu_s")}
        print(
            f"{name}: {middle['wall_s']:.1f} s, CPU {middle['cpu_s']:.1f} s of {len(rows)} launches, medians"
        )
        told = [row["phases"] for row in rows if row["phases"]]
        if told:
            print(
                "  " + startup_line({phase: statistics.median(p[phase] for p in told) for phase in told[0]})
            )


def launch(recipe: Path, overrides: list[str], place: Path | None) -> dict[str, Any]:
    """One launch in a folder of its own."""
    env = os.environ | ({"PYTHONPATH": str(place.absolute())} if place else {})
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = ["train.max_steps=1", "checkpoint.every_steps=null", *overrides, "--run-dir", str(run)]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "decompft.launcher.cli", "launch", str(recipe.absolute()), *words],
            env=env, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wall_s, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    phases = next((event["phases"] for event in events if event["event"] == "startup"), None)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall_s, "cpu_s": cpu_s, "phases": phases}


if __name__ == "__main__":
    main()
