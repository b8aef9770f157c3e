"""Tokens/s and peak memory of training steps at 7B's shape (and 8B's, 70B's), ours beside PEFT + Liger.

    python benchmarks/gpu_7b.py --gpus 1 --peers FOLDER --out benchmarks/results/single_gpu.json
    python benchmarks/gpu_7b.py --gpus 2 --out benchmarks/results/multi_gpu.json

The runs are those of speed_cases.py, each in a process of its own, ours through `launch` as a user starts it. A figure
is the median of 20 steps after 5. Peers are PEFT and unsloth (../shared/gpu), timed in the call of the rows beside
them. A second start skips what is in --out; fp8 rows say how far their losses are from the same case's in bfloat16. A
row's adapter has trained if the loss of rows that it never trains on has fallen, and is as its twin's: the same work
without a kernel of Triton, ours or Liger's, and without recomputation, which is run once for all rows that it is the
twin of.
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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from speed_cases import RECIPE, RECIPE_8B, TOLERANCES, Case, cases, with_twins
from waiting import waiting

SWITCH = (
    "DECOMPFT_TRITON"  # of adapters/kernels/proved.py, which would bring torch; 0: no kernel of Triton runs
)
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
    parser.add_argument("--peers", type=Path, help="the folder of peers.py and peer_unsloth.py")
    parser.add_argument(
        "--together", type=int, default=1, help="twins, which are not timed, that run at once"
    )
    parser.add_argument(
        "--ahead",
        action="store_true",
        help="start the next run meanwhile; it waits for the GPU (one_at_a_time/)",
    )
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
    done = {row.get("command") for row in rows if "error" not in row}
    pending = [
        (case, overrides, asked)
        for case in with_twins(chosen)
        for overrides in [[*case.overrides, fixed(case.recipe), *args.override]]
        if (asked := command(case.recipe, overrides, unfused=case.is_unfused)) not in done
    ]
    call = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    # beside each row of this call, whatever earlier calls found
    peers = [] if args.peers is None else sorted({peer for case, *_ in pending for peer in case.peers})
    for peer in peers:
        add(rows, run_peer(args.peers, peer) | {"call": call, "command": peer_command(peer)}, args.out)

    for (case, _, asked), row in made(pending, args.together, ahead=args.ahead):
        row = beside_targets(row | {"call": call, "command": asked}, case, rows, args.override)
        add(rows, row, args.out)
    print(table(rows))


Job = tuple[Case, list[str], str]  # its overrides, and its command


def made(
    pending: Sequence[Job], together: int, *, ahead: bool = False
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Each row as soon as it is there: a machine may be taken away at any moment.

    Args:
        together: of 7B's twins, first; nothing is timed meanwhile, and two of them fill the memory.
        ahead: of the others, the next one begins while one runs, and waits for the GPU.
    """

    def run(job: Job, *, waits: bool = False) -> tuple[Job, dict[str, Any]]:
        case, overrides, _ = job
        return job, run_ours(case.name, overrides, recipe=case.recipe, unfused=case.is_unfused, waits=waits)

    first = [j for j in pending if j[0].is_unfused and j[0].recipe == RECIPE] if together > 1 else []
    with ThreadPoolExecutor(together) as pool:
        yield from pool.map(run, first)
    rest = [job for job in pending if job not in first]
    if not ahead:
        yield from map(run, rest)
        return
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(partial(run, waits=True), rest)


def add(rows: list[dict[str, Any]], row: dict[str, Any], out: Path) -> None:
    """In the place of what ended in an error; a peer's beside those of other calls."""
    is_peer = row["stack"] != "decompft"
    rows[:] = [
        r for r in rows
        if r.get("command") != row["command"] or (is_peer and r.get("call") != row["call"])
    ] + [row]  # fmt: skip
    print(json.dumps({k: v for k, v in row.items() if k not in ("losses", "command")}), flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")


def fixed(recipe: Path) -> str:
    """The override that evaluates on rows of its own, at the start and at the end."""
    return f"data.eval=[{{path: .bench/fixed{4096 if recipe == RECIPE_8B else ''}.jsonl, format: text}}]"


def beside_targets(
    row: dict[str, Any], case: Case, others: Sequence[dict[str, Any]], override: Sequence[str] = ()
) -> dict[str, Any]:
    """With its ratios to the targets and the peers' rows of its call, and its losses' distance from its twin's.

    In fp8 the distance of all its losses from the same case's in bfloat16, too.

    Args:
        override: of the row's command, behind its case's.
    """
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
    whole = [other for other in others if "error" not in other]
    if case.twin:
        asked = command(case.recipe, [*case.twin, fixed(case.recipe), *override], unfused=True)
        row |= trained(row, next((other for other in whole if other.get("command") == asked), None))
    for other in whole:
        if other.get("case") in case.peers and other.get("call") == row.get("call"):
            row["over_unsloth" if other["stack"] == "unsloth" else "over_peer"] = round(
                speed / other["tokens_per_s"], 3
            )
        if other.get("case") == case.name.replace("-fp8", "-bfloat16") != case.name and "losses" in other:
            pairs = zip(row["losses"], other["losses"], strict=True)
            row["loss_apart"] = max(abs(one - before) / before for one, before in pairs)
    return row


def trained(row: dict[str, Any], twin: dict[str, Any] | None) -> dict[str, Any]:
    """Whether the loss of fixed rows has fallen as the twin's: `ok`, and the distance of what the twin's fell."""
    if twin is None:  # it failed, too
        return {"ok": False, "twin_apart": None}
    (start, end), (twin_start, twin_end) = row["fixed_loss"], twin["fixed_loss"]
    if twin_end >= twin_start:
        return {"ok": False, "twin_apart": None}
    apart = round(abs(end - twin_end) / (twin_start - twin_end), 5)
    return {"ok": end < start and apart <= TOLERANCES[row["compute"]], "twin_apart": apart}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: ratios over 1 are faster, or larger."""
    lines = [
        "| case | tokens/s a GPU | over target | over PEFT | over unsloth | GiB in tensors | over target "
        "| trained; from its twin |",
        "| --- " * 8 + "|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['case']} | failed | | | | | | |")
            continue
        speed = row["tokens_per_s"] / row.get("ranks", 1)
        target, peft, unsloth, memory_target = (
            row.get(k, "") for k in ("over_target", "over_peer", "over_unsloth", "memory_over_target")
        )
        peak, loss = row["peak_in_tensors_gib"] or row["peak_gib"], ""
        if "twin_apart" in row:
            apart = "no twin" if row["twin_apart"] is None else f"{row['twin_apart']:.2%}"
            loss = f"{'yes' if row['ok'] else 'NO'}; {apart}"
        lines.append(
            f"| {row['case']} | {speed:,.0f} | {target} | {peft} | {unsloth} | {peak:.1f} | {memory_target} | {loss} |"
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
    waits: bool = False,
) -> dict[str, Any]:
    """A run through `launch`, as a user starts it; `reordered` through reordered.py. Its figures, or its error.

    Args:
        waits: for the GPU, which others may have that wait likewise.
    """
    run = WORK / "runs" / name
    shutil.rmtree(run, ignore_errors=True)
    start = "import sys; from decompft.launcher.cli import main; sys.exit(main())"
    argv = [sys.executable, "-c", start, "launch", str(recipe), *overrides, "--run-dir", str(run)]
    if reordered:
        argv = [sys.executable, str(ROOT / "benchmarks" / "reordered.py"), str(recipe), str(run), *overrides]
    began = time.perf_counter()
    environment = os.environ | ({SWITCH: "0"} if unfused else {})
    if waits:
        environment = waiting(environment, WORK / "gpu.lock")
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
        **memory(events["memory"]), "load": events["load"] | {"cache_dir": None},
        "wall_s": None if waits else round(wall, 1),
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


def run_peer(folder: Path, case: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, *peer_argv(case, folder)], capture_output=True, text=True, cwd=ROOT
    )  # fmt: skip
    stack, kind = ("unsloth", case.removeprefix("unsloth-")) if case.startswith("unsloth") else ("peft", case)
    if done.returncode:
        return {"stack": stack, "case": case, "error": (done.stdout + done.stderr)[-3000:]}
    row = json.loads(done.stdout.strip().splitlines()[-1])
    recompute = {"true": "full", "unsloth": "offloaded"}.get(kind, "full" if "gc" in kind else "none")
    return {
        "stack": stack, "case": case, "adapter": "dora" if "dora" in case else "lora", "quantization": "nf4+dq",
        "compute": "bfloat16", "recompute": recompute, "strategy": "single", "ranks": 1, "micro_batch": 4,
        "sequence_length": 2048, "tokens_per_s": row["tok_s"],
        # all that their scripts measure
        "peak_gib": row["peak_GiB"], "peak_in_tensors_gib": row["peak_GiB"],
    }  # fmt: skip


def peer_argv(case: str, folder: Path = Path()) -> list[str]:
    if case.startswith("unsloth-"):
        return [str(folder / "peer_unsloth.py"), case.removeprefix("unsloth-"), "4", "32"]
    return [str(folder / "peers.py"), "--case", case, "--bs", "4", "--steps", str(WARM_UP + STEPS)]


def peer_command(case: str) -> str:
    return shlex.join(["python", *peer_argv(case)])


def write_text(path: Path, *, num_records: int, length: int = 2048, seed: int = 0) -> None:
    """Records that fill a row of the byte tokenizer: letters and the end token."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(num_records):
            text = "".join(draw.choices(string.ascii_lowercase + " ", k=length - 1))
            file.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    main()
