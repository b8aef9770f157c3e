"""Under fsdp, hsdp and zero3 no rank holds the model whole, from the first empty parameter to the last step."""

from __future__ import annotations

import ctypes

import pytest
import torch
from tiny import fork, make_run
from torch import nn

from decompft.launcher.worker.build import Built, build
from decompft.launcher.worker.engines.base import Engine, full_shape
from decompft.launcher.worker.engines.choose import make_engine
from decompft.launcher.worker.optimizer import make_optimizer

pytestmark = pytest.mark.dist

MIB = 2**20
M_MMAP_THRESHOLD = -3  # malloc.h
# 45 MiB of matrices that no threshold counts as small; the embedding is the largest with 4 MiB
CONFIG = {
    "model_type": "llama", "vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1408,
    "num_hidden_layers": 3, "num_attention_heads": 8, "max_position_embeddings": 64,
}  # fmt: skip
LARGEST = 2048 * 512 * 4
WORLDS = {
    "fsdp": ({"strategy": "fsdp", "gpus_per_node": 2}, 2),
    "hsdp": ({"strategy": "hsdp", "gpus_per_node": 4, "shard_size": 2}, 2),
    "zero3": ({"strategy": "zero3", "gpus_per_node": 2}, 2),
    "zero3 on 3": ({"strategy": "zero3", "gpus_per_node": 3}, 3),
}


def held(engine: Engine, model: nn.Module) -> tuple[int, int]:
    """Bytes of parameters that have memory on this rank, and of the whole model."""
    here = whole = 0
    for parameter in model.parameters():
        size = parameter.element_size()
        here += engine.local(parameter).numel() * size
        if hasattr(parameter, "ds_tensor"):  # gathered, and not given back
            here += parameter.numel() * size
        whole += torch.Size(full_shape(parameter)).numel() * size
    return here, whole


def resident() -> int:
    """Anonymous memory of this process in bytes."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


@pytest.mark.parametrize(
    ("world", "form"), [*((w, "none") for w in WORLDS), ("hsdp", "nf4"), ("zero3", "nf4")]
)
def test_bytes_of_a_rank_are_total_over_ranks_at_every_moment(tmp_path, world, form):
    parallel, shards = WORLDS[world]
    run = make_run(
        tmp_path,
        model={"config": CONFIG, "weights": "random"},
        quantization={"format": form, "compute": "float32"},
        train={"max_steps": 2, "global_batch_size": 12, "micro_batch_size": 1},
        data={"train": [{"path": "data.jsonl", "format": "instruction"}], "sequence_length": 256},
        parallel=parallel,
    )
    plan = run.read_plan()

    def rank_main(rank: int) -> None:
        engine = make_engine(plan)
        engine.start()
        try:
            check(engine)
        finally:
            engine.stop()

    def check(engine: Engine) -> None:
        # what is freed goes back to the system at once, so that resident memory is what is held
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 512 * 1024)
        moments: list[int] = []
        before = resident()
        built = build(
            plan.recipe.model, plan.recipe.quantization, plan.recipe.adapter, engine, seed=0, model_dir=None,
            recompute="none", progress=lambda done, total: moments.append(resident() - before),
        )  # fmt: skip
        assert len(moments) > 20
        sharded(engine, built)
        _, whole = held(engine, built.model)
        assert whole > (40 * MIB if form == "none" else 12 * MIB)
        # while it loads: its share, two tensors' slices on their way, and their temporary copies
        assert max(moments) < whole / shards + 4 * LARGEST, [m // MIB for m in moments]
        optimizer = make_optimizer(built.model.model, built.trained, plan.recipe.train, engine)
        optimizer = engine.prepare_training(built.model, optimizer, list(built.trained.values()))
        sharded(engine, built)
        step(engine, built, optimizer)
        sharded(engine, built)

    def sharded(engine: Engine, built: Built) -> None:
        here, whole = held(engine, built.model)
        small = sum(p.numel() * 4 for p in built.model.parameters() if p.dim() == 1)
        assert here <= whole / shards + small + 64 * 1024, (here, whole)

    fork(rank_main, plan.world.size)


def step(engine: Engine, built: Built, optimizer: torch.optim.Optimizer) -> None:
    from tiny_models import row

    from decompft.launcher.worker.data.batches import collate

    built.model.train()
    with engine.accumulate(last=True):
        engine.backward(engine.forward(built.model, collate([row((17,), seed=engine.rank)], pad_id=0)) / 17)
    engine.reduce_gradients()
    optimizer.step()
    engine.zero_gradients(list(built.trained.values()))
