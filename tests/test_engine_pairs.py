"""Every engine reads every engine's checkpoint: the same numbers right after loading, and the same next step."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import LLAMA, TRAIN, WORLDS, losses, make_run, run_ranks
from torch import Tensor

from decompft.launcher.checkpoints import newest_valid
from decompft.launcher.runs import RunDir
from decompft.launcher.worker.restore import Checkpoint, open_checkpoint

pytestmark = pytest.mark.dist

LAST, SAVED = TRAIN["max_steps"], 3
MODEL = {"config": {**LLAMA, "num_hidden_layers": 1}}
KINDS = ("param", "exp_avg", "exp_avg_sq", "step")
TOLERANCE = 1e-4  # of losses: the cap of the parity tests in float32
# Of the parameters after one step more: a thousandth of the learning rate, which is about what a step moves each
# number by. Rounding comes to 2e-7 here; Adam divides by the gradient's size, so it is larger where that is near zero.
MOVED = 1e-3 * TRAIN["learning_rate"]
# the same engine on twice as many ranks, by name
GROWN = {
    f"{name}-4": {**WORLDS[name], "gpus_per_node": 4} for name in ("ddp", "fsdp", "zero1", "zero2", "zero3")
}
CHAINS = [
    ("fsdp", "single", "hsdp"), ("zero2", "single", "zero3-4"), ("fsdp", "zero3", "single"),
    *((grown.removesuffix("-4"), grown, grown.removesuffix("-4")) for grown in GROWN), ("fsdp-4", "fsdp", "single"),
]  # fmt: skip

Pieces = list[tuple[str, str, int, Tensor]]  # name, kind, start in the flattened tensor, numbers


@pytest.fixture(scope="module", autouse=True)
def deepspeed_before_fork() -> None:
    """Imported once: seconds for each of a hundred forked ranks."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    # what deepspeed.initialize imports late: it even tries compilers
    import deepspeed.ops.op_builder.all_ops
    import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs")  # one for all: the data is tokenized once


@pytest.fixture(scope="module")
def written(folder: Path) -> dict[str, RunDir]:
    """A run of each engine that saved at step 3 and took one step more."""
    runs = {}
    for world in WORLDS:
        runs[world] = start(folder, f"{world}-writes", world, stop=SAVED + 1, every=SAVED)
        run_ranks(runs[world])
    return runs


@pytest.mark.parametrize("reader", WORLDS)
def test_an_engine_goes_on_from_every_engines_checkpoint(
    folder: Path, written: dict[str, RunDir], reader: str
) -> None:
    expected = open_checkpoint(written["single"].checkpoints_dir / f"step-{SAVED + 1:08d}")
    for writer in WORLDS:
        run = start(folder, f"{reader}-reads-{writer}", reader, stop=SAVED + 1)
        checkpoint = written[writer].checkpoints_dir / f"step-{SAVED:08d}"
        run_ranks(run, resume=checkpoint, patch=keep_what_is_loaded(run))
        assert_loaded(run, open_checkpoint(checkpoint))
        (loss,) = losses(run)
        assert loss == pytest.approx(losses(written["single"])[SAVED], rel=TOLERANCE), (writer, reader)
        after = open_checkpoint(run.checkpoints_dir / f"step-{SAVED + 1:08d}")
        if writer == reader:
            assert loss == losses(written[writer])[SAVED]
            assert_equal(after, open_checkpoint(written[writer].checkpoints_dir / f"step-{SAVED + 1:08d}"))
        assert after.names("param") == expected.names("param")
        for name in expected.names("param"):
            moved = (after.read(name, "param") - expected.read(name, "param")).abs().max()
            assert moved < MOVED, (writer, reader, name, float(moved))


def test_the_steps_and_the_checkpoints_could_be_told_apart(written: dict[str, RunDir]) -> None:
    """Else the pairs would prove nothing: a step moves parameters and loss by more than is allowed between engines."""
    before, after = (
        open_checkpoint(written["single"].checkpoints_dir / f"step-{step:08d}") for step in (SAVED, SAVED + 1)
    )
    moved = [(after.read(n, "param") - before.read(n, "param")).abs().max() for n in before.names("param")]
    assert sum(m > 100 * MOVED for m in moved) > len(moved) / 2
    assert abs(losses(written["single"])[SAVED] - losses(written["single"])[SAVED - 1]) > 10 * TOLERANCE
    worlds = {name: run.read_plan().world.size for name, run in written.items()}
    assert worlds == {"single": 1, "hsdp": 4} | dict.fromkeys(("ddp", "fsdp", "zero1", "zero2", "zero3"), 2)
    strategies = {run.read_plan().strategy for run in written.values()}
    assert strategies == set(WORLDS)


@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
def test_a_chain_of_engines_and_ranks_is_one_run(folder: Path, chain: tuple[str, ...]) -> None:
    """Six steps, two on each: every one goes on with the very numbers of the one before."""
    unbroken = start(folder, f"{'-'.join(chain)}-unbroken", "single")
    run_ranks(unbroken)
    found: list[float] = []
    checkpoint: Path | None = None
    for place, world in enumerate(chain, start=1):
        run = start(folder, f"{'-'.join(chain)}-{place}", world, stop=2 * place)
        run_ranks(run, resume=checkpoint, patch=keep_what_is_loaded(run))
        if checkpoint is not None:
            assert_loaded(run, open_checkpoint(checkpoint))
        found += losses(run)
        checkpoint, skipped = newest_valid(run.checkpoints_dir)
        assert checkpoint is not None and not skipped
    assert found == pytest.approx(losses(unbroken), rel=TOLERANCE)


def start(folder: Path, name: str, world: str, *, stop: int = LAST, every: int | None = None) -> RunDir:
    train = {**TRAIN, "stop_after_steps": None if stop == LAST else stop}
    parallel = (WORLDS | GROWN)[world]
    return make_run(
        folder, name, model=MODEL, train=train, parallel=parallel, checkpoint={"every_steps": every}
    )


def keep_what_is_loaded(run: RunDir) -> Callable[[], None]:
    """In a forked rank: right after a checkpoint is loaded, write down all that lives here."""

    def patch() -> None:
        from decompft.launcher.worker import train
        from decompft.launcher.worker.optimizer import read_moments

        original = train.restore

        def restore(checkpoint, built, optimizer, engine, averages):  # type: ignore[no-untyped-def]
            result = original(checkpoint, built, optimizer, engine, averages)
            pieces: Pieces = [(name, "param", 0, b.reshape(-1).clone()) for name, b in built.buffers.items()]
            for name, parameter in built.trained.items():
                local = engine.local(parameter).detach().reshape(-1)
                pieces.append((name, "param", engine.span(parameter)[0], local.clone()))
                for kind, values in read_moments(optimizer, parameter, engine).items():
                    first = 0 if kind == "step" else engine.piece(parameter)[0]
                    pieces.append((name, kind, first, values.reshape(-1).clone()))
            torch.save(pieces, run.path / f"loaded-{engine.rank}.pt")
            return result

        train.restore = restore

    return patch


def assert_loaded(run: RunDir, checkpoint: Checkpoint) -> None:
    """Every rank's piece is bit for bit the checkpoint's, and together they are all of it."""
    covered: dict[tuple[str, str], set[int]] = {}
    for rank in range(run.read_plan().world.size):
        for name, kind, first, values in torch.load(run.path / f"loaded-{rank}.pt"):
            stop = first + values.numel()
            assert torch.equal(values, checkpoint.read_span(name, kind, first, stop)), (rank, name, kind)
            covered.setdefault((name, kind), set()).update(range(first, stop))
    stored = {(name, kind) for kind in KINDS for name in checkpoint.names(kind)}
    assert covered.keys() == stored and checkpoint.names("exp_avg")
    assert all(len(found) == checkpoint.read(*key).numel() for key, found in covered.items())


def assert_equal(one: Checkpoint, other: Checkpoint) -> None:
    for kind in KINDS:
        assert one.names(kind) == other.names(kind)
        assert all(torch.equal(one.read(n, kind), other.read(n, kind)) for n in one.names(kind)), kind
