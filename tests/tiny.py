"""Tiny runs for tests: a real recipe, a real run directory, real ranks as forked processes."""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# the whole stack is imported here, before any fork: 0.3 s a run instead of 15
import bitsandbytes  # noqa: F401
import torch
import torch.multiprocessing as mp
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import AutoModelForCausalLM, get_scheduler  # noqa: F401

import decompft.launcher.worker.description
import decompft.launcher.worker.engines.fsdp
import decompft.launcher.worker.report
import decompft.launcher.worker.train  # noqa: F401
from decompft.launcher.machine import Machine
from decompft.launcher.planner import make
from decompft.launcher.runs import RunDir
from decompft.launcher.source import parse
from decompft.launcher.worker.main import Rank, run_rank
from decompft.launcher.worker.tools import prepare

# no forked rank looks through what was imported: a third of a second for each collection
gc.collect()
gc.freeze()

LLAMA = {
    "model_type": "llama", "vocab_size": 260, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
# a parallel section of each engine, on as few CPU ranks as it needs
WORLDS: dict[str, dict[str, Any]] = {
    "single": {},
    "ddp": {"strategy": "ddp", "gpus_per_node": 2},
    "fsdp": {"strategy": "fsdp", "gpus_per_node": 2},
    "hsdp": {"strategy": "hsdp", "gpus_per_node": 4, "shard_size": 2},
    "zero1": {"strategy": "zero1", "gpus_per_node": 2},
    "zero2": {"strategy": "zero2", "gpus_per_node": 2},
    "zero3": {"strategy": "zero3", "gpus_per_node": 2},
}
# what differs in every step: a rate that rises, then falls
TRAIN: dict[str, Any] = {
    "max_steps": 6,
    "learning_rate": 0.01,
    "global_batch_size": 4,
    "micro_batch_size": 1,
    "warmup_steps": 2,
}
CPU = Machine(num_cores=2, host_memory_bytes=16 * 2**30)


def recipe_data(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe for a model of 100,000 weights and 40 short records; sections are merged over it."""
    path = folder / "data.jsonl"
    if not path.exists():
        rows = [{"instruction": f"Say {i} times {i}.", "output": f"It is {i * i}."} for i in range(40)]
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    base: dict[str, Any] = {
        "model": {"config": LLAMA, "weights": "random"},
        "quantization": {"format": "nf4", "compute": "float32"},
        "adapter": {"method": "map", "rank": 4, "alpha": 8.0},
        "data": {
            "train": [{"path": str(path), "format": "instruction"}],
            "sequence_length": 256,
            "cache_dir": str(folder / "cache"),
        },
        "train": {"max_steps": 4, "learning_rate": 0.01, "global_batch_size": 4, "micro_batch_size": 1},
        "logging": {"tensorboard": False},
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section}
    return base


def make_run(folder: Path, name: str = "run", **sections: dict[str, Any]) -> RunDir:
    """A planned and prepared run directory."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(recipe_data(folder, **sections))  # JSON is YAML
    recipe = parse(text, where="test", base_dir=folder, overrides=())
    run = RunDir.create(folder / name, recipe_text=text, plan=make(recipe, machine=CPU))
    prepare.main([str(run.path)])
    return run


def run_ranks(run: RunDir, *, resume: Path | None = None, patch: Callable[[], None] | None = None) -> int:
    """Run one incarnation with the plan's world size; returns its number. A failing rank fails the test."""
    incarnation = run.next_incarnation()

    def rank_main(rank: int) -> None:
        if patch is not None:
            patch()
        with open(run.rank_log(incarnation, rank), "w") as stream:
            run_rank(Rank(run=run, incarnation=incarnation, resume=resume, rank=rank, stream=stream))

    fork(rank_main, run.read_plan().world.size)
    return incarnation


def fork(work: Callable[[int], None], world_size: int) -> None:
    """Run `work(rank)` in forked processes joined by gloo's environment; errors are raised here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = mp.get_context("fork").SimpleQueue()
    context = mp.start_processes(
        _child, args=(work, world_size, port, queue), nprocs=world_size, join=False, start_method="fork"
    )
    try:
        while not context.join(timeout=120):
            pass
    except Exception as error:
        told = "" if queue.empty() else queue.get()
        raise AssertionError(f"a rank failed:\n{told or error}") from None


def metrics(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics_path.read_text().splitlines()]


def losses(run: RunDir) -> list[float]:
    return [row["loss"] for row in metrics(run)]


def _child(rank: int, work: Callable[[int], None], world_size: int, port: int, queue: Any) -> None:
    torch.set_num_threads(1)  # first: a forked process hangs in the parent's OpenMP pool
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    try:
        work(rank)
    except BaseException:
        queue.put(traceback.format_exc())
        sys.stderr.flush()
        os._exit(1)
