"""What saves cost and what survives at 7B's shape, nf4: pause, time and size of a save, resume times, and the drills.

    python benchmarks/gpu_resume.py --gpus 2 --out benchmarks/results/resume.json [--strategies ddp fsdp] [--drills ...]

Each row is a run through `launch`, as a user starts it: 30 steps with a checkpoint every 10, then the same run stopped
at 15 and resumed, by the next strategy and by its own. The pause is beside the median step of the run itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_7b import RECIPE, WORK, write_text

STEPS, EVERY, STOP = 30, 10, 15
BATCH = "train.micro_batch_size=4"
COMMON = [f"train.max_steps={STEPS}", f"checkpoint.every_steps={EVERY}", "train.recompute=none", BATCH]
DRILLS = ("resume", "kill", "preempt")
START = "import sys; from decompft.launcher.cli import main; sys.exit(main())"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--strategies", nargs="*", default=["ddp", "fsdp"])
    parser.add_argument("--deterministic", nargs="*", default=[], help="strategies that run with it")
    parser.add_argument("--method", default="map")
    parser.add_argument("--drills", nargs="*", choices=DRILLS, default=list(DRILLS), help="none: without any")
    parser.add_argument("--drill-strategy", default="fsdp")
    parser.add_argument("--override", nargs="*", default=[], help="KEY=VALUE of the recipe, for trials")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    write_text(WORK / "random.jsonl", num_records=8 * STEPS * args.gpus)
    common = [*COMMON, f"adapter.method={args.method}", f"train.global_batch_size={4 * args.gpus}"]
    rows = []
    for place, strategy in enumerate(args.strategies):
        other = args.strategies[(place + 1) % len(args.strategies)]
        fixed = [f"train.deterministic={str(strategy in args.deterministic).lower()}"]
        try:
            row = measure([*common, *fixed, *args.override], args.gpus, strategy, other)
        except Exception as error:
            row = {"strategy": strategy, "error": f"{type(error).__name__}: {error}"[-3000:]}
        rows.append(row | {"deterministic": strategy in args.deterministic})
        print(json.dumps({k: v for k, v in rows[-1].items() if k != "losses"}), flush=True)
        write(args.out, rows)
    for drill in args.drills:
        # how long its runs are and when they save is the drill's own matter
        options = [BATCH, f"adapter.method={args.method}", f"train.global_batch_size={4 * args.gpus}"]
        strategy = args.drill_strategy
        rows.append(run_drill(drill, [*options, *args.override, *parallel(args.gpus, strategy)], strategy))
        print(json.dumps(rows[-1]), flush=True)
        write(args.out, rows)


def measure(common: list[str], gpus: int, strategy: str, other: str) -> dict[str, Any]:
    mine = [*common, *parallel(gpus, strategy)]
    whole = launch(f"save-{strategy}", mine)
    steps = [row["step_s"] for row in whole["rows"]]
    median = statistics.median(steps[5:])
    saves = [event for event in whole["events"] if event["event"] == "save"]
    inside = [save for save in saves if save["reason"] == "interval"]
    newest = sorted((WORK / "runs" / f"save-{strategy}" / "checkpoints").glob("step-*"))[-1]
    found: dict[str, Any] = {
        "strategy": strategy, "gpus": gpus, "step_s": median, "stall_s": [save["stall_s"] for save in inside],
        "worst_stall_over_step": max(save["stall_s"] for save in inside) / median,
        "save_s": [save["save_s"] for save in saves],
        # the step in whose loop the save began, and those while it was written
        "step_after_save_s": [steps[save["step"]] for save in inside if save["step"] < len(steps)],
        "checkpoint_bytes": sum(p.stat().st_size for p in newest.rglob("*") if p.is_file()),
        "start_s": first_step_s(whole), "wall_s": whole["wall_s"],
    }  # fmt: skip
    run = f"resume-{strategy}"
    first = launch(run, [*mine, f"train.stop_after_steps={STOP}"], code=75)
    for then in dict.fromkeys((other, strategy)):
        name = run if then == strategy else copy_of(run, then)
        rest = launch(name, [*common, *parallel(gpus, then), "--resume", "auto"], keep=True)
        losses = [row["loss"] for row in rest["rows"]]
        unbroken = [row["loss"] for row in whole["rows"]]
        found[f"resume_as_{then}" if then != strategy else "resume"] = {
            "to_first_step_s": first_step_s(rest), "to_first_step_of_a_new_run_s": first_step_s(first),
            "steps": len(losses), "bit_equal": losses == unbroken,
            "worst_relative_difference": max(
                abs(a - b) / abs(b) for a, b in zip(losses, unbroken, strict=True)
            ),
        }  # fmt: skip
    return found


def copy_of(run: str, then: str) -> str:
    """Of a stopped run, so that it can be resumed more than once; its name."""
    name = f"{run}-as-{then}"
    shutil.rmtree(WORK / "runs" / name, ignore_errors=True)
    shutil.copytree(WORK / "runs" / run, WORK / "runs" / name, symlinks=True)
    return name


def parallel(gpus: int, strategy: str) -> list[str]:
    return [f"parallel.strategy={strategy}", f"parallel.gpus_per_node={gpus}"]


def launch(name: str, options: list[str], *, keep: bool = False, code: int = 0) -> dict[str, Any]:
    """A run through `launch`; its metrics, and the events of its last start."""
    run = WORK / "runs" / name
    if not keep:
        shutil.rmtree(run, ignore_errors=True)
    began = time.time()
    argv = [sys.executable, "-c", START, "launch", str(RECIPE), *options, "--run-dir", str(run)]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode != code:
        logs = "".join(p.read_text()[-1500:] for p in sorted(run.glob("logs/*/rank-*.log")))
        raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-1500:]}{logs}")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return {
        "rows": rows, "events": [e for e in events if e["time_s"] >= began], "began": began,
        "wall_s": round(time.time() - began, 1), "metrics": run / "metrics.jsonl",
    }  # fmt: skip


def first_step_s(run: dict[str, Any]) -> float | None:
    """From the command to the end of loading, as the `load` event says it."""
    load = [event["time_s"] for event in run["events"] if event["event"] == "load"]
    return round(load[0] - run["began"], 2) if load else None


def run_drill(kind: str, options: list[str], strategy: str) -> dict[str, Any]:
    verdicts = WORK / f"drill-{kind}.json"
    verdicts.unlink(missing_ok=True)
    began = time.time()
    argv = [sys.executable, "-c", START, "drill", kind, str(RECIPE), *options, "--json", str(verdicts)]
    done = subprocess.run(argv, capture_output=True, text=True)
    rows = json.loads(verdicts.read_text()) if verdicts.exists() else (done.stdout + done.stderr)[-3000:]
    return {
        "drill": kind, "strategy": strategy, "exit_code": done.returncode, "wall_s": round(time.time() - began, 1),
        "command": " ".join(["decompft drill", kind, f"benchmarks/{RECIPE.name}", *options]), "verdicts": rows,
    }  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
