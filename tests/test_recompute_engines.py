"""Recomputation changes no number under any engine, and a run may change the mode when it resumes."""

from __future__ import annotations

import gc
import os

import pytest
from tiny import WORLDS, losses, make_run, metrics, run_ranks

from decompft.launcher.recompute import MODES
from decompft.launcher.resume import check_resume

pytestmark = pytest.mark.dist

# dropout's numbers must be drawn again; two micro batches a step
ADAPTER = {"method": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.1}
TRAIN = {"max_steps": 3, "learning_rate": 0.01, "global_batch_size": 4, "micro_batch_size": 1}


@pytest.fixture(scope="module", autouse=True)
def deepspeed_before_fork() -> None:
    """Imported once: seconds for each forked rank."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops.op_builder.all_ops
    import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.mark.parametrize("world", ["single", "ddp", "fsdp", "zero2", "zero3"])
def test_no_engine_has_other_numbers(tmp_path, world) -> None:
    found = {}
    # of two blocks one, and none, run their MLP again: the others their activation
    for mode, blocks in (*((m, None) for m in MODES), ("selective", 1), ("selective", 0)):
        train = {**TRAIN, "recompute": mode, "recompute_blocks": blocks}
        name = f"{mode}-{blocks}" if blocks is not None else mode
        run = make_run(tmp_path, name, adapter=ADAPTER, train=train, parallel=WORLDS[world])
        assert run.read_plan().recompute == mode and run.read_plan().recompute_blocks == blocks
        run_ranks(run)
        found[name] = [(row["loss"], row["grad_norm"]) for row in metrics(run)]
    assert all(rows == found["none"] for rows in found.values()), found


def test_a_run_goes_on_under_another_mode(tmp_path) -> None:
    modes = ["full", "selective", "norms"]
    unbroken = make_run(tmp_path, "unbroken", train={**TRAIN, "recompute": "none"})
    run_ranks(unbroken)
    told, before = [], None
    for step, mode in enumerate(modes, start=1):
        stop = {"stop_after_steps": step} if step < TRAIN["max_steps"] else {}
        run = make_run(tmp_path, mode, train={**TRAIN, **stop, "recompute": mode})
        checkpoint = None
        if before is not None:
            check_resume(before.read_plan(), run.read_plan())
            (checkpoint,) = before.checkpoints_dir.glob("step-*")
        run_ranks(run, resume=checkpoint)
        told += losses(run)
        before = run
    assert told == losses(unbroken)
