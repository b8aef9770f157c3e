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
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

# as the launcher sets it; before torch is imported
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

from gpu_7b import RECIPE as RECIPE_7B  # noqa: E402
from gpu_7b import ROOT, WORK, command, memory, run_ours, write_text  # noqa: E402

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
            say(run_ours(f"70b-{strategy}", [f"parallel.strategy={strategy}"], recipe=RECIPE_70B, warm_up=2))
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
    from trial import prepare

    from decompft.launcher.planner import make
    from decompft.launcher.source import load
    from decompft.launcher.worker.engines.choose import make_engine
    from decompft.launcher.worker.report import peak_memory

    plan = make(load(RECIPE_7B, overrides))
    recipe, engine = plan.recipe, make_engine(plan)
    torch.cuda.reset_peak_memory_stats()
    if _STARTED:  # one process group for all cells
        engine._cpu_group = _STARTED[0]._cpu_group
    else:
        engine.start()
        _STARTED.append(engine)
    trial = prepare(plan, engine)
    losses, seconds = [], []
    for _ in range(3):
        began = time.perf_counter()
        with engine.accumulate(last=True):
            loss = trial.forward()
            engine.backward(loss)
        engine.reduce_gradients()
        trial.optimizer.step()
        engine.zero_gradients(trial.parameters)
        losses.append(loss.item() * engine.world_size)
        seconds.append(time.perf_counter() - began)
    tokens = plan.batch.micro_size * recipe.data.sequence_length
    row = {
        "rank": engine.rank, "format": recipe.quantization.format, "strategy": plan.strategy,
        "ranks": engine.world_size, "layers": recipe.model.config["num_hidden_layers"],
        "recompute": plan.recompute, "micro_batch": plan.batch.micro_size, "ok": losses[2] < losses[0],
        "losses": losses, "tokens_per_s_third_step": round(tokens / seconds[2]),
        **memory(asdict(peak_memory(plan, engine))), "load": trial.built.loaded.fields() | {"cache_dir": None},
        "command": command(RECIPE_7B, overrides),
    }  # fmt: skip
    del trial, loss, engine
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
    return run_ours(name, overrides, reordered=name == "reordered")


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
        yield {**run_ours(name, [*common, *overrides], warm_up=1), "write_s": round(written, 1)}


if __name__ == "__main__":
    main()
