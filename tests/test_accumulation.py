"""Gradient accumulation: in place, and without a word between ranks until the last micro batch."""

from __future__ import annotations

import json

import pytest
from tiny import WORLDS, make_run, run_ranks

pytestmark = pytest.mark.dist

MICRO_BATCHES = 3


def watch_collectives(folder):
    """In a forked rank: note the collectives that carry gradients, and where each gradient lies, a micro batch."""

    def patch() -> None:
        from torch.utils._python_dispatch import TorchDispatchMode

        from decompft.launcher.worker.engines.base import Engine
        from decompft.launcher.worker.engines.ddp import DdpEngine

        seen: list[str] = []

        class Reductions(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if "c10d" in func.namespace and "reduce" in func.overloadpacket.__name__:
                    seen.append(str(func))
                return func(*args, **(kwargs or {}))

        counts: list[int] = []
        places: list[int] = []
        backward = Engine.backward

        def counted(self, loss):
            before = len(seen)
            with Reductions():  # on a CPU the backward pass runs in this thread
                backward(self, loss)
            counts.append(len(seen) - before)
            if isinstance(self, DdpEngine):
                places.append(self.gradients().data_ptr())
            if len(counts) == MICRO_BATCHES:
                found = {"counts": counts, "places": len(set(places))}
                (folder / f"rank-{self.rank}.json").write_text(json.dumps(found))

        Engine.backward = counted

    return patch


@pytest.mark.parametrize("world", ["single", "ddp", "fsdp"])
def test_no_gradient_travels_before_the_last_micro_batch(tmp_path, world):
    ranks = WORLDS[world].get("gpus_per_node", 1)
    train = {"max_steps": 1, "global_batch_size": MICRO_BATCHES * ranks, "micro_batch_size": 1}
    run = make_run(tmp_path, world, train=train, parallel=WORLDS[world])
    run_ranks(run, patch=watch_collectives(tmp_path))
    for rank in range(ranks):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert found["counts"][:-1] == [0] * (MICRO_BATCHES - 1), found
        # while the last backward pass runs fsdp reduces each block, ddp the upper of its two stretches
        last = found["counts"][-1]
        assert last > 0 if world == "fsdp" else last == {"single": 0, "ddp": 1}[world], found
        assert found["places"] == (world == "ddp")  # one flat buffer, which every pass adds to
