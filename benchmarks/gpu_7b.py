"""Tokens/s and peak memory of one training step, Llama-2-7B's shape, ours beside PEFT + Liger.

    python benchmarks/gpu_7b.py --gpus 1 --out benchmarks/results/single_gpu.json
    python benchmarks/gpu_7b.py --gpus 2 --out benchmarks/results/multi_gpu.json

Each case is a process of its own, ours through `launch` as a user starts it. A figure is the
median of 20 steps after 5. The peer is ../shared/gpu/peers.py, timed in the same call. With `--compute both`
each case runs in bfloat16 and in fp8, and the fp8 row says how far its losses are from the other's.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import string
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "benchmarks" / "llama7b_shape.yaml"
WORK = ROOT / ".bench"
WARM_UP, STEPS = 5, 20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--compute", choices=("bfloat16", "fp8", "both"), default="bfloat16")
    parser.add_argument("--peers", type=Path, help="peers.py of the benchmark machine")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    write_text(WORK / "random.jsonl", num_records=(WARM_UP + STEPS) * 8)
    computes = ("bfloat16", "fp8") if args.compute == "both" else (args.compute,)
    rows = [run_ours(n, o) for n, o in in_each(computes, cases(args.gpus)) if args.only in n]
    compare_losses(rows)
    if args.peers is not None and args.gpus == 1:
        rows += [run_peer(args.peers, case) for case in ("nf4-liger", "nf4-liger-gc") if args.only in case]
    for row in rows:
        print(json.dumps({k: v for k, v in row.items() if k not in ("losses", "command")}), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")


def cases(gpus: int) -> list[tuple[str, list[str]]]:
    """(name, overrides); with two GPUs the same global batch on every strategy, so that losses compare."""
    if gpus == 1:
        return [
            (f"{method}-{recompute}", [f"adapter.method={method}", f"train.recompute={recompute}"])
            for method in ("map", "lora")
            for recompute in ("none", "selective", "full", "offloaded")
        ]
    common = ["adapter.method=map", "train.global_batch_size=8"]
    ddp = [*common, "parallel.strategy=ddp", f"parallel.gpus_per_node={gpus}"]
    fsdp = [*common, "parallel.strategy=fsdp", f"parallel.gpus_per_node={gpus}"]
    return [
        ("map-single", [*common, "parallel.strategy=single", "parallel.gpus_per_node=1"]),
        ("map-ddp", ddp),
        ("map-fsdp", fsdp),
        ("map-fsdp-full", [*fsdp, "train.recompute=full"]),
    ]


def in_each(computes: Sequence[str], known: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Each case in each compute, one after the other."""
    return [
        (
            name if compute == "bfloat16" else f"{name}-{compute}",
            [*overrides, f"quantization.compute={compute}"],
        )
        for name, overrides in known
        for compute in computes
    ]


def compare_losses(rows: list[dict[str, Any]]) -> None:
    """`loss_apart` of fp8 rows: the largest relative difference from the same case, weights and data in bfloat16."""
    of = {row["case"]: row["losses"] for row in rows if "losses" in row}
    for row in rows:
        beside = of.get(row["case"].removesuffix("-fp8"))
        if "losses" in row and row["compute"] == "fp8" and beside:
            pairs = zip(row["losses"], beside, strict=True)
            row["loss_apart"] = max(abs(one - other) / other for one, other in pairs)


def run_ours(
    name: str, overrides: list[str], *, recipe: Path = RECIPE, warm_up: int = WARM_UP, reordered: bool = False
) -> dict[str, Any]:
    """A run through `launch`, as a user starts it; `reordered` through reordered.py. Its figures, or its error."""
    run = WORK / "runs" / name
    shutil.rmtree(run, ignore_errors=True)
    start = "import sys; from decompft.launcher.cli import main; sys.exit(main())"
    argv = [sys.executable, "-c", start, "launch", str(recipe), *overrides, "--run-dir", str(run)]
    if reordered:
        argv = [sys.executable, str(ROOT / "benchmarks" / "reordered.py"), str(recipe), str(run), *overrides]
    began = time.perf_counter()
    done = subprocess.run(argv, capture_output=True, text=True)
    wall = time.perf_counter() - began
    if done.returncode:
        logs = "".join(p.read_text()[-3000:] for p in sorted(run.glob("logs/*/rank-*.log")))
        return {
            "stack": "decompft",
            "case": name,
            "ok": False,
            "error": (done.stdout + done.stderr)[-3000:] + logs,
        }
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = {e["event"]: e for e in map(json.loads, (run / "events.jsonl").open())}
    plan = json.loads((run / "plan.json").read_text())
    asked, losses = plan["recipe"], [r["loss"] for r in rows]
    return {
        "stack": "decompft", "case": name, "adapter": asked["adapter"]["method"],
        "format": asked["quantization"]["format"], "compute": asked["quantization"]["compute"],
        "recompute": plan["recompute"], "strategy": plan["strategy"], "ranks": plan["world"]["ranks_per_node"],
        "micro_batch": plan["batch"]["micro_size"], "accumulation": plan["batch"]["accumulation"],
        "sequence_length": asked["data"]["sequence_length"], "losses": losses, "ok": losses[-1] < losses[0],
        "tokens_per_s": round(statistics.median(r["tokens_per_s"] for r in rows[warm_up:])),
        **memory(events["memory"]), "load": events["load"] | {"cache_dir": None}, "wall_s": round(wall, 1),
        "command": command(recipe, overrides),
    }  # fmt: skip


def memory(peak: dict[str, Any]) -> dict[str, Any]:
    """Of the event that a run leaves, or of a PeakMemory: GiB, measured beside forecast; GPUs only."""
    gib = 2**30
    return {
        "peak_gib": round(peak["measured"] / gib, 3), "forecast_gib": round(peak["forecast"] / gib, 3),
        "forecast_error_percent": round(100 * (peak["forecast"] / peak["measured"] - 1), 1),
        "peak_in_tensors_gib": round(peak["allocated"] / gib, 3),
        "forecast_in_tensors_gib": round(peak["allocated_forecast"] / gib, 3),
        "host_gib": round(peak["host"] / gib, 3), "host_forecast_gib": round(peak["host_forecast"] / gib, 3),
    }  # fmt: skip


def command(recipe: Path, overrides: list[str]) -> str:
    return f"decompft launch benchmarks/{recipe.name} {' '.join(overrides)}"


def run_peer(script: Path, case: str) -> dict[str, Any]:
    argv = [sys.executable, str(script), "--case", case, "--bs", "4", "--steps", str(WARM_UP + STEPS)]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        return {"stack": "peft", "case": case, "error": (done.stdout + done.stderr)[-3000:]}
    row = json.loads(done.stdout.strip().splitlines()[-1])
    return {
        "stack": "peft", "case": case, "adapter": "lora", "quantization": "nf4+dq", "compute": "bfloat16",
        "recompute": "full" if "gc" in case else "none", "strategy": "single", "ranks": 1, "micro_batch": 4,
        "sequence_length": 2048, "tokens_per_s": row["tok_s"], "peak_in_tensors_gib": row["peak_GiB"],
        "command": f"python peers.py --case {case} --bs 4 --steps {WARM_UP + STEPS}",
    }  # fmt: skip


def write_text(path: Path, *, num_records: int) -> None:
    """Records that fill a row of the byte tokenizer: 2,047 letters and the end token."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(num_records):
            text = "".join(draw.choices(string.ascii_lowercase + " ", k=2047))
            file.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    main()
