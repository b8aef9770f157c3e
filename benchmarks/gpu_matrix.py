"""Formats x engines on GPUs: does each cell train, what does it need, and is the forecast right?

python gpu_matrix.py cells      every format, 7B shape, one GPU, in one process, three steps each
torchrun gpu_matrix.py sharded  every format on one engine of two GPUs, two layers of 7B, the same way
python gpu_matrix.py engines    every engine, 7B shape, two GPUs beside one, through `launch`
python gpu_matrix.py big --only fsdp,zero3    70B shape on two GPUs, through `launch`
python gpu_matrix.py load       7B from a real file written on the spot, then from the cache
python gpu_matrix.py summary --out benchmarks/results    matrix.json from all matrix-*.jsonl
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

# as the launcher sets it; before torch is imported
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

from gpu_7b import ROOT, WORK, write_text  # noqa: E402

RECIPE_7B = ROOT / "benchmarks" / "llama7b_shape.yaml"
RECIPE_70B = ROOT / "benchmarks" / "llama70b_shape.yaml"
WARM_UP, STEPS = 5, 15
FORMATS = ("none", "int8", "nf4", "fp4", "fp8")
TWO = "parallel.gpus_per_node=2"
_STARTED: list[Any] = []  # the engine that joined the process group


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("phase", choices=("cells", "engines", "sharded", "big", "load", "summary"))
    parser.add_argument("--part", default="0/1", help="cells: k/n, every n-th cell from the k-th on")
    parser.add_argument(
        "--only", default="single,reordered,ddp,fsdp,zero1,zero2,zero3", help="engines: which"
    )
    parser.add_argument("--micro", type=int, default=4, help="engines: rows of a micro batch")
    parser.add_argument("--steps", type=int, default=WARM_UP + STEPS, help="engines: optimizer steps")
    parser.add_argument("--strategy", default="fsdp", help="sharded: fsdp, zero1, zero2 or zero3")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; summary: the folder of results")
    args = parser.parse_args()
    if args.phase == "summary":
        summarize(args.out)
        return
    WORK.mkdir(exist_ok=True)
    records = WORK / "random.jsonl"
    if not records.exists():
        write_text(records, num_records=(WARM_UP + STEPS) * 16)
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def say(row: dict[str, Any]) -> None:
        if row.pop("rank", 0) == 0:
            print(json.dumps({k: v for k, v in row.items() if k not in ("losses", "command")}), flush=True)
            with args.out.open("a") as file:
                file.write(json.dumps({"phase": args.phase, **row}, sort_keys=True) + "\n")

    if args.phase == "cells":
        part, parts = map(int, args.part.split("/"))
        for overrides in cells()[part::parts]:
            say(in_process(overrides))
    elif args.phase == "engines":
        for name in args.only.split(","):
            say(engine_row(name, args.micro, args.steps))
    elif args.phase == "sharded":
        for overrides in sharded_cells(args.strategy):
            say(in_process(overrides))
    elif args.phase == "big":
        for strategy in args.only.split(","):
            say(launch(RECIPE_70B, f"70b-{strategy}", [f"parallel.strategy={strategy}"], warm_up=2))
    else:
        for row in load_twice():
            say(row)


def cells() -> list[list[str]]:
    return [
        [
            f"quantization.format={form}", f"train.recompute={recompute}",
            f"train.micro_batch_size={micro}", f"train.global_batch_size={micro}",
            "parallel.strategy=single", "parallel.gpus_per_node=1",
        ]
        for recompute in ("none", "full")
        for micro in (1, 4)
        for form in FORMATS
    ]  # fmt: skip


def in_process(overrides: list[str]) -> dict[str, Any]:
    """Build, three steps, measure, forget."""
    import torch

    from decompft.launcher.planner import make
    from decompft.launcher.source import load
    from decompft.launcher.worker.build import build
    from decompft.launcher.worker.data.batches import collate
    from decompft.launcher.worker.data.rows import Row
    from decompft.launcher.worker.engines.choose import make_engine
    from decompft.launcher.worker.optimizer import make_optimizer
    from decompft.launcher.worker.report import peak_memory

    plan = make(load(RECIPE_7B, overrides))
    recipe, engine = plan.recipe, make_engine(plan)
    torch.cuda.reset_peak_memory_stats()
    if _STARTED:  # one process group for all cells
        engine._cpu_group = _STARTED[0]._cpu_group
    else:
        engine.start()
        _STARTED.append(engine)
    built = build(
        recipe.model, recipe.quantization, recipe.adapter, engine,
        seed=0, model_dir=None, recompute=plan.recompute == "full",
    )  # fmt: skip
    parameters = list(built.trained.values())
    optimizer = make_optimizer(built.model.model, built.trained, recipe.train, engine)
    optimizer = engine.prepare_training(built.model, optimizer, parameters)
    length, draw, rows = recipe.data.sequence_length, torch.Generator().manual_seed(0), []
    for _ in range(plan.batch.micro_size):
        tokens = torch.randint(0, 256, (length,), generator=draw, dtype=torch.int32).numpy()
        rows.append(Row(id=0, tokens=tokens, trained=tokens >= 0, doc_lengths=(length,)))
    batch = collate(rows, 0).to(engine.device)
    built.model.train()
    losses, seconds = [], []
    for _ in range(3):
        began = time.perf_counter()
        with engine.accumulate(last=True):
            loss = engine.forward(built.model, batch) / batch.num_targets / engine.world_size
            engine.backward(loss)
        engine.reduce_gradients()
        optimizer.step()
        engine.zero_gradients(parameters)
        losses.append(loss.item() * engine.world_size)
        seconds.append(time.perf_counter() - began)
    row = {
        "rank": engine.rank, "format": recipe.quantization.format, "strategy": plan.strategy,
        "ranks": engine.world_size, "layers": recipe.model.config["num_hidden_layers"],
        "recompute": plan.recompute, "micro_batch": plan.batch.micro_size, "ok": losses[2] < losses[0],
        "losses": losses, "tokens_per_s_third_step": round(len(rows) * length / seconds[2]),
        **_memory(asdict(peak_memory(plan, engine))), "load": built.loaded.fields() | {"cache_dir": None},
        "command": _command(RECIPE_7B, overrides),
    }  # fmt: skip
    del built, optimizer, parameters, batch, loss, engine
    gc.collect()
    torch.cuda.empty_cache()
    return row


def sharded_cells(strategy: str) -> list[list[str]]:
    """Every format on an engine of two GPUs; two layers are enough to see it train."""
    formats = FORMATS if strategy in ("fsdp", "zero3") else ("none", "nf4")
    return [
        [
            "model.config.num_hidden_layers=2", "train.global_batch_size=2", "train.micro_batch_size=1",
            "parallel.gpus_per_node=2", f"parallel.strategy={strategy}", f"quantization.format={form}",
        ]
        for form in formats
    ]  # fmt: skip


def engine_row(name: str, micro: int, steps: int) -> dict[str, Any]:
    """7B through `launch`, the same global batch of two micro batches whoever shares it."""
    strategy = "single" if name == "reordered" else name
    gpus = 1 if strategy == "single" else 2
    overrides = [
        f"parallel.strategy={strategy}", f"parallel.gpus_per_node={gpus}", f"train.micro_batch_size={micro}",
        f"train.global_batch_size={2 * micro}", f"train.max_steps={steps}",
    ]  # fmt: skip
    return launch(RECIPE_7B, name, overrides, reordered=name == "reordered")


def summarize(folder: Path) -> None:
    """Ratios, loss differences and the cells that ran, from the JSON lines of all calls.

    A row's `call`, added by hand, names the loan of a machine: speeds compare within one alone.
    """
    texts = [path.read_text() for path in sorted(folder.glob("matrix-*.jsonl"))]
    rows = [json.loads(line) for text in texts for line in text.splitlines()]
    for row in rows:
        if row["phase"] in ("cells", "sharded"):
            row["case"] = f"{row['format']}-{row['strategy']}-{row['recompute']}-{row['micro_batch']}"
        if row["phase"] == "sharded":  # one process after the other cell's: correct, but no clean peak
            for key in [k for k in row if k.endswith(("_gib", "_error_percent"))]:
                del row[key]
        mine = [r for r in rows if r["phase"] == "engines" and r["micro_batch"] == row.get("micro_batch")]
        named = {r["case"]: r for r in mine if "error" not in r}
        if row["phase"] == "engines" and "error" not in row and "single" in named:
            is_same_call = named["single"].get("call") == row.get("call")
            ratio = "times_single" if is_same_call else "times_single_of_another_call"
            row[ratio] = round(row["tokens_per_s"] / named["single"]["tokens_per_s"], 3)
            if len(row["losses"]) == len(named["single"]["losses"]):  # else another schedule
                row["loss_difference_to_single"] = difference(named["single"], row)
            if "reordered" in named:
                row["tolerance"] = 3 * difference(named["single"], named["reordered"])
    text = json.dumps(rows, indent=1, sort_keys=True).replace(f"{ROOT}/", "")
    (folder / "matrix.json").write_text(text + "\n")
    keys = (
        "phase", "case", "call", "micro_batch", "tokens_per_s", "times_single", "times_single_of_another_call",
        "loss_difference_to_single", "tolerance", "peak_gib", "forecast_gib", "forecast_error_percent", "ok",
    )  # fmt: skip
    for row in rows:
        print("  ".join(f"{k}={row[k]}" for k in keys if k in row), row.get("error", "")[-200:])


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    return max(abs(x - y) / abs(x) for x, y in zip(a["losses"], b["losses"], strict=True))


def launch(
    recipe: Path, name: str, overrides: list[str], *, warm_up: int = WARM_UP, reordered: bool = False
) -> dict[str, Any]:
    run = WORK / "runs" / f"{name}-{time.time_ns()}"
    start = "import sys; from decompft.launcher.cli import main; sys.exit(main())"
    argv = [sys.executable, "-c", start, "launch", str(recipe), *overrides, "--run-dir", str(run)]
    if reordered:
        argv = [
            sys.executable,
            str(Path(__file__).with_name("reordered.py")),
            str(recipe),
            str(run),
            *overrides,
        ]
    began = time.perf_counter()
    done = subprocess.run(argv, capture_output=True, text=True)
    wall = time.perf_counter() - began
    if done.returncode:
        logs = "".join(p.read_text()[-3000:] for p in sorted(run.glob("logs/*/rank-*.log")))
        return {"case": name, "ok": False, "error": (done.stdout + done.stderr)[-2500:] + logs}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = {e["event"]: e for e in map(json.loads, (run / "events.jsonl").open())}
    plan = json.loads((run / "plan.json").read_text())
    losses = [r["loss"] for r in rows]
    return {
        "case": name, "format": plan["recipe"]["quantization"]["format"], "strategy": plan["strategy"],
        "ranks": plan["world"]["ranks_per_node"], "recompute": plan["recompute"],
        "micro_batch": plan["batch"]["micro_size"], "accumulation": plan["batch"]["accumulation"],
        "adapter": plan["recipe"]["adapter"]["method"], "losses": losses, "ok": losses[-1] < losses[0],
        "tokens_per_s": round(statistics.median(r["tokens_per_s"] for r in rows[warm_up:])),
        **_memory(events["memory"]), "load": events["load"] | {"cache_dir": None}, "wall_s": round(wall, 1),
        "command": _command(recipe, overrides),
    }  # fmt: skip


def load_twice() -> Iterator[dict[str, Any]]:
    """7B from safetensors; the second start reads the cache of quantized rows."""
    from decompft.launcher.worker.tokenizers import byte_tokenizer, save_tokenizer

    folder = WORK / "llama7b"
    began = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "benchmarks/write_checkpoint.py"), str(folder)], check=True)
    save_tokenizer(byte_tokenizer(), folder)
    written = time.perf_counter() - began
    common = ["model.config=null", "model.weights=checkpoint", f"model.id={folder}", "train.max_steps=3",
              "train.global_batch_size=8"]  # fmt: skip
    one, two = ["parallel.gpus_per_node=1", "parallel.strategy=single"], [TWO, "parallel.strategy=fsdp"]
    for name, overrides in (
        ("load-first", one),
        ("load-cached", one),
        ("load-file-fsdp", [*two, "quantization.cache=false"]),
    ):
        yield {**launch(RECIPE_7B, name, [*common, *overrides], warm_up=1), "write_s": round(written, 1)}


def _memory(peak: dict[str, Any]) -> dict[str, Any]:
    gib = 2**30
    return {
        "peak_gib": round(peak["measured"] / gib, 3), "forecast_gib": round(peak["forecast"] / gib, 3),
        "forecast_error_percent": round(100 * (peak["forecast"] / peak["measured"] - 1), 1),
        "peak_in_tensors_gib": round(peak["allocated"] / gib, 3),
        "forecast_in_tensors_gib": round(peak["allocated_forecast"] / gib, 3),
        "host_gib": round(peak["host"] / gib, 3), "host_forecast_gib": round(peak["host_forecast"] / gib, 3),
    }  # fmt: skip


def _command(recipe: Path, overrides: list[str]) -> str:
    return f"decompft launch benchmarks/{recipe.name} {' '.join(overrides)}"


if __name__ == "__main__":
    main()
