"""Accuracy on the four commonsense test files before and after training, LoRA and MAP.

    python benchmarks/commonsense.py --data ../shared/data/commonsense --out benchmarks/results/commonsense.json

Trains each method once per learning rate of --rates, then scores the adapter by label likelihood
with `decompft eval`. --adapters DIR ... scores adapters that were trained elsewhere instead.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "benchmarks" / "commonsense.yaml"
SETS = ("boolq", "arc_easy", "arc_challenge", "openbookqa")
CLI = [sys.executable, "-c", "import sys; from decompft.launcher.cli import main; sys.exit(main())"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", help="SmolLM2's GGUF file; default the installed package's")
    parser.add_argument("--methods", nargs="*", default=["lora", "map"])
    parser.add_argument("--rates", nargs="*", default=["1e-3"])
    parser.add_argument(
        "--adapters", nargs="*", type=Path, default=[], help="score these instead of training"
    )
    parser.add_argument("--override", nargs="*", default=[], help="more KEY=VALUE for every run")
    parser.add_argument("--runs", type=Path, default=ROOT / ".bench" / "commonsense")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tests = [args.data / f"{name}_test.jsonl" for name in SETS]
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "losses"}), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")

    if args.adapters:
        add({"case": "base", "accuracy": score(args.adapters[0], tests, args.model, bare=True)})
        for adapter in args.adapters:
            add({"case": str(adapter), "accuracy": score(adapter, tests, args.model)})
        return
    for method in args.methods:
        for rate in args.rates:
            run = args.runs / f"{method}-{rate}"
            trained = train(run, method, rate, args)
            if not any(row["case"] == "base" for row in rows):
                add({"case": "base", "accuracy": score(run / "adapter", tests, args.model, bare=True)})
            add(trained | {"accuracy": score(run / "adapter", tests, args.model)})


def train(run: Path, method: str, rate: str, args: argparse.Namespace) -> dict[str, Any]:
    shutil.rmtree(run, ignore_errors=True)
    overrides = [f"adapter.method={method}", f"train.learning_rate={rate}", *args.override]
    overrides += [f"data.train[{i}].path={args.data / name}_train.jsonl" for i, name in enumerate(SETS)]
    if args.model:
        overrides.append(f"model.id={args.model}")
    began = time.perf_counter()
    call([*CLI, "launch", str(RECIPE), *overrides, "--run-dir", str(run)])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return {
        "case": f"{method} lr {rate}", "method": method, "learning_rate": rate, "steps": len(rows),
        "loss_first": rows[0]["loss"], "loss_last_tenth": _mean([r["loss"] for r in rows[-max(1, len(rows) // 10) :]]),
        "tokens_per_s": sorted(r["tokens_per_s"] for r in rows)[len(rows) // 2],
        "train_s": round(sum(r["step_s"] for r in rows), 1), "wall_s": round(time.perf_counter() - began, 1),
        "losses": [r["loss"] for r in rows],
    }  # fmt: skip


def score(adapter: Path, tests: list[Path], model: str | None, *, bare: bool = False) -> dict[str, float]:
    argv = [*CLI, "eval", str(adapter), "--json", "--task", *map(str, tests)]
    argv += ["--base", model] if model else []
    argv += ["--no-adapter"] if bare else []
    answer = json.loads(call(argv))
    found = {Path(row["task"]).stem.removesuffix("_test"): row["accuracy"] for row in answer}
    return found | {"mean": _mean(list(found.values()))}


def call(argv: list[str]) -> str:
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(argv[3:5])} failed with {done.returncode}:\n{done.stdout[-2000:]}")
    return done.stdout


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
