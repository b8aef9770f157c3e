"""Does training with `compute: fp8` end where bfloat16's does? A real model, 200 steps, one GPU (or a CPU, emulated).

    python benchmarks/fp8_parity.py --data ../shared/data/commonsense --out benchmarks/results/fp8_parity.json

The same records in the same order: bfloat16 with three seeds (of the adapter and of the order), fp8 with the first.
Compared are the means of the last 20 losses, and the losses of records that no run trains on. Exit code 1 where
fp8 lies farther from bfloat16 with its seed than the seeds of bfloat16 lie apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reordered import prepared_rank

from decompft.launcher.worker.main import run_rank

RECIPE = Path(__file__).resolve().parent / "commonsense.yaml"
SETS = ("boolq", "arc_easy", "arc_challenge", "openbookqa")
SEEDS = (0, 1, 2)
LAST = 20
HELD = 100  # records of each test file


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", help="SmolLM2's GGUF file; default the installed package's")
    parser.add_argument("--methods", nargs="*", default=["lora", "map"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--override", nargs="*", default=[], help="more KEY=VALUE for every run")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = []
    for method in args.methods:
        runs = [
            run(method, compute, seed, args)
            for compute, seed in [*(("bfloat16", s) for s in SEEDS), ("fp8", SEEDS[0])]
        ]
        found.append({"method": method, **compared(runs), "runs": runs})
        args.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        print(json.dumps({k: v for k, v in found[-1].items() if k != "runs"}), flush=True)
    return int(any(m[name]["apart"] > m[name]["spread"] for m in found for name in ("trained", "held_out")))


def compared(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How far fp8 lies from bfloat16 with its seed, and how far the seeds lie apart, of both losses."""
    *bfloat16, fp8 = runs
    answer = {}
    for name in ("trained", "held_out"):
        values = [r[name] for r in bfloat16]
        answer[name] = {
            "apart": abs(fp8[name] - values[SEEDS.index(fp8["seed"])]),
            "spread": max(values) - min(values),
        }
    return answer


def run(method: str, compute: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    data = args.data.resolve()
    files = [f"data.train[{i}].path={data / name}_train.jsonl" for i, name in enumerate(SETS)]
    held = [
        {"path": f"{data / name}_test.jsonl", "format": "instruction", "max_records": HELD} for name in SETS
    ]
    overrides = [
        *files, f"data.eval={json.dumps(held)}", f"adapter.method={method}", f"quantization.compute={compute}",
        f"train.seed={seed}", "train.epochs=null", f"train.max_steps={args.steps}", *args.override,
    ]  # fmt: skip
    if args.model:
        overrides.append(f"model.id={args.model}")
    with tempfile.TemporaryDirectory() as folder:
        rank = prepared_rank(RECIPE, Path(folder) / "run", overrides)
        run_rank(rank)
        rows = [json.loads(line) for line in (rank.run.path / "metrics.jsonl").open()]
        events = [json.loads(line) for line in (rank.run.path / "events.jsonl").open()]
    losses = [row["loss"] for row in rows]
    return {
        "compute": compute, "seed": seed, "losses": losses, "trained": statistics.mean(losses[-LAST:]),
        "held_out": [e["loss"] for e in events if e["event"] == "eval"][-1],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
