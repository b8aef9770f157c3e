"""Tokens/s over ranks, sequence length, adapter rank and depth: each cell a launch of its own, finished cells skipped.

    python benchmarks/scaling.py --device cuda --out benchmarks/results/scaling_h200.json
    python benchmarks/scaling.py --device cpu  --out benchmarks/results/scaling_cpu.json

`cuda` is Llama-2-7B's shape (nf4, random weights) on one and two GPUs; `cpu` the same sweep of a tiny shape on one and
two gloo ranks of one thread each, to prove the script. The row `links` has what joins two ranks: all-reduces of two
sizes. A cell that fails stands in the file with its error, and is tried again by the next call. `scaling_page.py` draws
the plots of docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from waiting import waiting

HERE = Path(__file__).resolve().parent
ROWS_FILE = Path(".bench") / "scaling.jsonl"  # in the repository


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One launch; what is swept differs from the others of its sweep."""

    sweep: str
    ranks: int
    strategy: str
    sequence_length: int
    adapter_rank: int
    layers: int
    micro_batch: int
    accumulation: int = 1

    @property
    def name(self) -> str:
        return f"{self.sweep}-{self.strategy}{self.ranks}-t{self.sequence_length}-r{self.adapter_rank}-l{self.layers}"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a device sweeps, around which middle."""

    recipe: Path
    fixed: tuple[str, ...]
    middle: Cell
    tokens: int  # of a micro batch: rows shrink as the sequence grows
    lengths: tuple[int, ...]
    adapter_ranks: tuple[int, ...]
    layers: tuple[int, ...]
    steps: int
    skipped: int


CUDA = Setting(
    recipe=HERE / "llama7b_shape.yaml",
    fixed=("train.recompute=full", "model.config.max_position_embeddings=32768"),
    middle=Cell(
        sweep="", ranks=1, strategy="single", sequence_length=2048, adapter_rank=16, layers=32, micro_batch=8
    ),
    tokens=16384,
    lengths=(1024, 2048, 4096, 8192, 16384, 32768),
    adapter_ranks=(4, 16, 64, 256),
    layers=(8, 16, 32, 64),
    steps=12,
    skipped=4,
)
CPU = Setting(
    recipe=HERE / "llama7b_shape.yaml",
    fixed=(
        "model.config.hidden_size=256", "model.config.intermediate_size=768", "model.config.num_attention_heads=4",
        "model.config.num_key_value_heads=4", "model.config.vocab_size=2048",
        "model.config.max_position_embeddings=2048",
        "quantization.compute=float32", "train.recompute=none",
    ),
    middle=Cell(
        sweep="", ranks=1, strategy="single", sequence_length=256, adapter_rank=16, layers=4, micro_batch=2
    ),
    tokens=512,
    lengths=(128, 256, 512, 1024, 2048),
    adapter_ranks=(4, 16, 64, 256),
    layers=(2, 4, 8),
    steps=10,
    skipped=3,
)  # fmt: skip
SETTINGS = {"cuda": CUDA, "cpu": CPU}


def cells(setting: Setting) -> Iterator[Cell]:
    """All of a device's, in the order in which they run."""
    middle = asdict(setting.middle)
    for ranks, strategy in ((1, "single"), (2, "ddp"), (2, "fsdp")):
        yield Cell(**middle | {"sweep": "ranks", "ranks": ranks, "strategy": strategy})
    for length in setting.lengths:
        rows = max(1, setting.tokens // length)
        yield Cell(**middle | {"sweep": "length", "sequence_length": length, "micro_batch": rows})
    for rank in setting.adapter_ranks:
        yield Cell(**middle | {"sweep": "adapter", "adapter_rank": rank})
    for layers in setting.layers:
        yield Cell(**middle | {"sweep": "depth", "layers": layers})


def overrides(cell: Cell, setting: Setting) -> list[str]:
    """What makes the recipe this cell."""
    return [
        *setting.fixed,
        f"data.train=[{{path: {ROWS_FILE}, format: text}}]",
        "adapter.method=lora",
        f"adapter.rank={cell.adapter_rank}",
        f"adapter.alpha={2 * cell.adapter_rank}",
        f"model.config.num_hidden_layers={cell.layers}",
        f"data.sequence_length={cell.sequence_length}",
        f"parallel.strategy={cell.strategy}",
        f"parallel.gpus_per_node={cell.ranks}",
        f"train.micro_batch_size={cell.micro_batch}",
        f"train.global_batch_size={cell.micro_batch * cell.accumulation * cell.ranks}",
        f"train.max_steps={setting.steps}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=tuple(SETTINGS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[], help="sweeps: ranks, length, adapter, depth")
    parser.add_argument("--part", default="0/1", help="K/N: every N-th cell from the K-th on")
    parser.add_argument(
        "--ahead", action="store_true", help="start the next run meanwhile, which waits for the GPU"
    )
    parser.add_argument("--note", default="", help="what else the machine did")
    args = parser.parse_args()
    setting = SETTINGS[args.device]
    first, step = map(int, args.part.split("/"))
    chosen = [c for c in cells(setting) if not args.only or c.sweep in args.only][first::step]
    write_rows()
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    done = {row["name"] for row in rows if "error" not in row}
    if "links" not in done and (not args.only or "ranks" in args.only):
        rows.append({"name": "links", "note": args.note, "device": args.device, **measure_links(args.device)})
        args.out.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    # the middle of each sweep is one run
    alike: dict[tuple[str, ...], list[Cell]] = {}
    for cell in chosen:
        if cell.name not in done:
            alike.setdefault(tuple(overrides(cell, setting)), []).append(cell)
    one = partial(measure, setting=setting, device=args.device, waits=args.ahead)
    with ThreadPoolExecutor(1 + args.ahead) as pool:
        for cells_, row in zip(alike.values(), pool.map(one, [c[0] for c in alike.values()]), strict=True):
            names = {cell.name for cell in cells_}
            rows = [other for other in rows if other["name"] not in names]
            rows += [row | asdict(cell) | {"name": cell.name, "note": args.note} for cell in cells_]
            print(json.dumps(rows[-1]), flush=True)
            args.out.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")


def measure(cell: Cell, setting: Setting, device: str, *, waits: bool = False) -> dict[str, Any]:
    """Launch a cell; tokens/s are the median of the steps after the first ones.

    Args:
        waits: for the GPU, which another cell may have.
    """
    words = overrides(cell, setting)
    row: dict[str, Any] = {
        **asdict(cell),
        "name": cell.name,
        "device": device,
        "load_average": os.getloadavg()[0],
    }
    row["command"] = f"decompft launch benchmarks/{setting.recipe.name} {shlex.join(words)}"
    env = os.environ | ({"DECOMPFT_DEVICE": "cpu", "OMP_NUM_THREADS": "1"} if device == "cpu" else {})
    if waits:
        env = waiting(env, Path(tempfile.gettempdir()) / "gpu.lock")
    with tempfile.TemporaryDirectory() as folder:
        run, began = Path(folder) / "run", time.perf_counter()
        argv = [sys.executable, "-m", "decompft.launcher.cli", "launch", str(setting.recipe), *words]
        child = subprocess.run(
            [*argv, "--run-dir", str(run)], env=env, capture_output=True, text=True, cwd=HERE.parent
        )
        row["wall_s"] = round(time.perf_counter() - began, 1)
        if child.returncode:
            return row | {"error": (child.stdout + child.stderr)[-1500:]}
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][
            setting.skipped :
        ]
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    speeds = [step["tokens_per_s"] for step in steps]
    startup = next((event for event in events if event["event"] == "startup"), {})
    return row | {
        "tokens_per_s": round(statistics.median(speeds), 1),
        "fastest_tokens_per_s": round(max(speeds), 1),
        "peak_memory_gib": round(max(step["peak_mem_bytes"] for step in steps) / 2**30, 2),
        "first_step_s": startup.get("seconds"),
    }


def measure_links(device: str) -> dict[str, float]:
    """Latency and one-way bandwidth between two ranks, of the fastest of several all-reduces of 4 KiB and of 64 MiB."""
    import torch.multiprocessing as mp

    if device == "cuda":
        import torch

        if torch.cuda.device_count() < 2:
            return {}
    queue: Any = mp.get_context("spawn").SimpleQueue()
    mp.start_processes(_time_links, args=(device, queue), nprocs=2, start_method="spawn")
    small, large = queue.get()
    return {"latency_s": small / 2, "bytes_per_s": LARGE_BYTES / max(large - small, 1e-9)}


SMALL_BYTES, LARGE_BYTES, REPEATS = 4 << 10, 64 << 20, 8


def _time_links(rank: int, device: str, queue: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571", "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    place = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    best = []
    for num_bytes in (SMALL_BYTES, LARGE_BYTES):
        numbers, times = torch.zeros(num_bytes // 4, device=place), []
        for _ in range(REPEATS):
            if device == "cuda":
                torch.cuda.synchronize(place)
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(numbers)
            if device == "cuda":
                torch.cuda.synchronize(place)
            times.append(time.perf_counter() - began)
        best.append(min(times))
    if rank == 0:
        queue.put(best)
    dist.destroy_process_group()


def write_rows() -> None:
    """Random text for every length, if it is not there."""
    path = HERE.parent / ROWS_FILE
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    draw = random.Random(0)
    lines = (json.dumps({"text": "".join(draw.choices("abcdefgh ", k=40_000))}) + "\n" for _ in range(64))
    path.write_text("".join(lines))


if __name__ == "__main__":
    main()
