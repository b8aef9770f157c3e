"""Tokens/s and peak memory of training steps at 7B's shape (and 8B's, 70B's), ours beside PEFT + Liger.

    python benchmarks/gpu_7b.py --gpus 1 --peers PEERS.PY --out benchmarks/results/single_gpu.json
    python benchmarks/gpu_7b.py --gpus 2 --out benchmarks/results/multi_gpu.json

The runs are those of speed_cases.py, each in a process of its own, ours through `launch` as a user starts it. A figure
is the median of 20 steps after 5. The peer is ../shared/gpu/peers.py, timed in the same call. A second start skips what
is in --out; fp8 rows say how far their losses are from the same case's in bfloat16. A row's adapter has trained if the
loss of rows that it never trains on has fallen, and is as its twin's: the same work without a kernel of Triton, ours or
Liger's, and without recomputation, which is run once for all rows that it is the twin of and not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import statistics
import string
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speed_cases import RECIPE, RECIPE_8B, TOLERANCES, Case, cases, with_twins

SWITCH = "DECOMPFT_TRITON"  # 0: no kernel of Triton runs
ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".bench"
WARM_UP, STEPS = 5, 20
BFLOAT16_FLOPS = 989e12  # an H200's, dense


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[""], help="names of cases, or parts of names")
    parser.add_argument("--part", default="0/1", help="K/N: every N-th case from the K-th on")
    parser.add_argument("--override", nargs="*", default=[], help="KEY=VALUE of the recipe, for trials")
    parser.add_argument("--peers", type=Path, help="peers.py of the benchmark machine")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    write_text(WORK / "random.jsonl", num_records=(WARM_UP + STEPS) * 8)
    write_text(WORK / "random4096.jsonl", num_records=(WARM_UP + STEPS) * 4, length=4096)
    write_text(WORK / "fixed.jsonl", num_records=4, seed=1)
    write_text(WORK / "fixed4096.jsonl", num_records=2, length=4096, seed=1)
    first, step = map(int, args.part.split("/"))
    known = {c.name: c for c in cases(args.gpus)}
    chosen = [
        c for name, c in known.items() if any(o == name or (o not in known and o in name) for o in args.only)
    ][first::step]
    rows: list[dict[str, Any]] = json.loads(args.out.read_text()) if args.out.exists() else []
    peers = [] if args.peers is None else sorted({c.peer for c in chosen} - {""})
    for case in (*peers, *with_twins(chosen)):
        if isinstance(case, Case):
            overrides = [*case.overrides, fixed(case.recipe), *args.override]
            asked = command(case.recipe, overrides, unfused=case.is_unfused)
        else:
            asked = peer_command(case)
        if any(row.get("command") == asked and "error" not in row for row in rows):
            continue
        if isinstance(case, Case):
            row = run_ours(case.name, overrides, recipe=case.recipe, unfused=case.is_unfused)
            row = beside_targets(row, case, rows)
        else:
            row = run_peer(args.peers, case)
        rows = [r for r in rows if r.get("command") != asked] + [row | {"command": asked}]
        print(json.dumps({k: v for k, v in row.items() if k not in ("losses", "command")}), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    print(table(rows))


def fixed(recipe: Path) -> str:
    """The override that evaluates on rows of its own, at the start and at the end."""
    return f"data.eval=[{{path: .bench/fixed{4096 if recipe == RECIPE_8B else ''}.jsonl, format: text}}]"


def beside_targets(row: dict[str, Any], case: Case, others: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """With its ratios to the targets, to the peer's row, and for fp8 to the losses in bfloat16."""
    if "error" in row:
        return row
    speed = row["tokens_per_s"] / row["ranks"]
    if case.tokens_per_s is not None:
        row["over_target"] = round(speed / case.tokens_per_s, 3)
    if case.peak_gib is not None and row["peak_in_tensors_gib"] is not None:
        row["memory_over_target"] = round(row["peak_in_tensors_gib"] / case.peak_gib, 3)
    if case.flops_share is not None:
        row["flops_share"] = round(speed * row["flops_per_token"] / BFLOAT16_FLOPS, 3)
        row["over_target"] = round(row["flops_share"] / case.flops_share, 3)
    asked = command(case.recipe, [*case.twin, fixed(case.recipe)], unfused=True)
    for other in others:
        if case.twin and other.get("command") == asked and "error" not in other:
            start, end = row["fixed_loss"]
            row["twin_apart"] = round(abs(end / other["fixed_loss"][1] - 1), 5)
            row["ok"] = end < start and row["twin_apart"] <= TOLERANCES[row["compute"]]
        if case.peer and other.get("case") == case.peer and "error" not in other:
            row["over_peer"] = round(speed / other["tokens_per_s"], 3)
        if other.get("case") == case.name.replace("-fp8", "-bfloat16") != case.name and "losses" in other:
            pairs = zip(row["losses"], other["losses"], strict=True)
            row["loss_apart"] = max(abs(one - before) / before for one, before in pairs)
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: ratios over 1 are faster, or larger."""
    lines = [
        "| case | tokens/s a GPU | over target | over peer | GiB in tensors | over target | trained; from its twin |",
        "| --- " * 7 + "|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['case']} | failed | | | | | |")
            continue
        speed = row["tokens_per_s"] / row.get("ranks", 1)
        target, peer, memory_target = (
            row.get(k, "") for k in ("over_target", "over_peer", "memory_over_target")
        )
        peak = row["peak_in_tensors_gib"] or row["peak_gib"]
        loss = "" if "twin_apart" not in row else f"{'yes' if row['ok'] else 'NO'}; {row['twin_apart']:.2%}"
        lines.append(
            f"| {row['case']} | {speed:,.0f} | {target} | {peer} | {peak:.1f} | {memory_target} | {loss} |"
        )
    return "\n".join(lines)


def run_ours(
    name: str,
    overrides: list[str],
    *,
    recipe: Path = RECIPE,
    warm_up: int = WARM_UP,
    reordered: bool = False,
    unfused: bool = False,
) -> dict[str, Any]:
    """A run through `launch`, as a user starts it; `reordered` through reordered.py. Its figures, or its error."""
    run = WORK / "runs" / name
    shutil.rmtree(run, ignore_errors=True)
    start = "import sys; from decompft.launcher.cli import main; sys.exit(main())"
    argv = [sys.executable, "-c", start, "launch", str(recipe), *overrides, "--run-dir", str(run)]
    if reordered:
        argv = [sys.executable, str(ROOT / "benchmarks" / "reordered.py"), str(recipe), str(run), *overrides]
    began = time.perf_counter()
    environment = os.environ | ({SWITCH: "0"} if unfused else {})
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, cwd=ROOT)
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
    events: dict[str, dict[str, Any]] = {}
    evaluated = []
    for event in map(json.loads, (run / "events.jsonl").open()):
        events[event["event"]] = event
        if event["event"] == "eval":
            evaluated.append(event["loss"])
    plan = json.loads((run / "plan.json").read_text())
    asked, losses = plan["recipe"], [r["loss"] for r in rows]
    return {
        "stack": "decompft", "case": name, "adapter": asked["adapter"]["method"],
        "quantization": _format(asked["quantization"]), "compute": asked["quantization"]["compute"],
        "recompute": plan["recompute"], "strategy": plan["strategy"], "ranks": plan["world"]["ranks_per_node"],
        "micro_batch": plan["batch"]["micro_size"], "accumulation": plan["batch"]["accumulation"],
        "sequence_length": asked["data"]["sequence_length"], "losses": losses, "ok": losses[-1] < losses[0],
        "tokens_per_s": round(statistics.median(r["tokens_per_s"] for r in rows[warm_up:])),
        "flops_per_token": flops_per_token(plan),
        **memory(events["memory"]), "load": events["load"] | {"cache_dir": None}, "wall_s": round(wall, 1),
        "command": command(recipe, overrides, unfused=unfused),
        **({"fixed_loss": [evaluated[0], evaluated[-1]]} if evaluated else {}),
    }  # fmt: skip


def _format(asked: dict[str, Any]) -> str:
    is_double = asked["format"] in ("nf4", "fp4") and asked["double_quant"]
    return asked["format"] + "+dq" * is_double


def flops_per_token(plan: dict[str, Any]) -> float:
    """Needed: 4 a weight, of a causal attention 6 a pair of tokens and width (half of them are masked)."""
    config, length = plan["recipe"]["model"]["config"], plan["recipe"]["data"]["sequence_length"]
    hidden, inner, layers = (config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    keys = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    weights = layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner)
    return float(4 * (weights + hidden * config["vocab_size"]) + 6 * length * hidden * layers)


def memory(peak: dict[str, Any]) -> dict[str, Any]:
    """Of the event that a run leaves, or of a PeakMemory: GiB, measured beside forecast; on a CPU no tensors' part."""

    def gib(name: str) -> float | None:
        return None if peak[name] is None else round(peak[name] / 2**30, 3)

    return {
        "peak_gib": gib("measured"), "forecast_gib": gib("forecast"),
        "forecast_error_percent": round(100 * (peak["forecast"] / peak["measured"] - 1), 1),
        "peak_in_tensors_gib": gib("allocated"), "forecast_in_tensors_gib": gib("allocated_forecast"),
        "host_gib": gib("host"), "host_forecast_gib": gib("host_forecast"),
    }  # fmt: skip


def command(recipe: Path, overrides: list[str], *, unfused: bool = False) -> str:
    return f"{SWITCH}=0 " * unfused + f"decompft launch benchmarks/{recipe.name} {shlex.join(overrides)}"


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
        "command": peer_command(case),
    }  # fmt: skip


def peer_command(case: str) -> str:
    return f"python peers.py --case {case} --bs 4 --steps {WARM_UP + STEPS}"


def write_text(path: Path, *, num_records: int, length: int = 2048, seed: int = 0) -> None:
    """Records that fill a row of the byte tokenizer: letters and the end token."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(num_records):
            text = "".join(draw.choices(string.ascii_lowercase + " ", k=length - 1))
            file.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    main()
