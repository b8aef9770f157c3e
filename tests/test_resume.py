"""N steps equal k + (N - k) steps, and a checkpoint loads on other numbers of ranks."""

import json

import pytest
import torch
from tiny import WORLDS, losses, make_run, run_ranks

from decompft.launcher.checkpoints import newest_valid
from decompft.launcher.runs import RunDir
from decompft.launcher.worker.restore import load_adapter, open_checkpoint

pytestmark = pytest.mark.dist

TRAIN = {
    "max_steps": 6,
    "learning_rate": 0.01,
    "global_batch_size": 4,
    "micro_batch_size": 1,
    "warmup_steps": 2,
}
# every engine writes and reads once; all pairs are another issue's
MOVES = [
    ("single", "ddp"), ("ddp", "fsdp"), ("fsdp", "single"), ("fsdp", "zero3"), ("zero3", "single"), ("hsdp", "zero2"),
    ("zero2", "hsdp"), ("zero1", "zero3"), ("zero3", "zero1"),
]  # fmt: skip


def start(folder, name, world="single", **sections):
    return make_run(folder, name, **{"train": TRAIN, "parallel": WORLDS[world]} | sections)


def continue_as(folder, name, first: RunDir, world="single", **sections):
    """A new incarnation of the same run, under another world if asked."""
    run = start(folder, name, world, **sections)
    checkpoint, skipped = newest_valid(first.checkpoints_dir)
    assert checkpoint is not None and not skipped
    run_ranks(run, resume=checkpoint)
    return run


@pytest.mark.parametrize(
    ("method", "world"),
    [("lora", "single"), ("lora", "fsdp"), ("lora", "zero3"), *(("map", w) for w in WORLDS)],
)
def test_stopped_and_resumed_equals_unbroken_bit_for_bit(tmp_path, world, method):
    adapter = {"adapter": {"method": method, "rank": 4, "alpha": 8.0, "dropout": 0.1}}
    unbroken = start(tmp_path, "unbroken", world, **adapter)
    run_ranks(unbroken)
    first = start(tmp_path, "first", world, **adapter, train={**TRAIN, "stop_after_steps": 3})
    run_ranks(first)
    rest = continue_as(tmp_path, "rest", first, world, **adapter)
    assert losses(first) + losses(rest) == losses(unbroken)
    tensors, _ = load_adapter(rest.path / "adapter")
    expected, _ = load_adapter(unbroken.path / "adapter")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[n], expected[n]) for n in tensors)


@pytest.mark.parametrize(("before", "after"), MOVES)
def test_resume_on_another_world(tmp_path, before, after):
    first = start(tmp_path, "first", before, train={**TRAIN, "stop_after_steps": 3})
    run_ranks(first)
    rest = continue_as(tmp_path, "rest", first, after)
    unbroken = start(tmp_path, "unbroken", "single")
    run_ranks(unbroken)
    # the tolerance of the parity tests' fp32 cap
    assert losses(first) + losses(rest) == pytest.approx(losses(unbroken), rel=1e-4)


@pytest.mark.parametrize(("before", "after"), [("fsdp", "single"), ("zero2", "zero3"), ("zero3", "fsdp")])
def test_parameters_and_moments_are_bit_equal_right_after_loading(tmp_path, before, after):
    """Another engine reads and stops at once: its own checkpoint holds the same numbers."""
    first = start(tmp_path, "first", before, train={**TRAIN, "stop_after_steps": 3})
    run_ranks(first)
    written = open_checkpoint(newest_valid(first.checkpoints_dir)[0])

    second = start(tmp_path, "second", after, train={**TRAIN, "stop_after_steps": 3})
    run_ranks(second, resume=newest_valid(first.checkpoints_dir)[0])
    read = open_checkpoint(newest_valid(second.checkpoints_dir)[0])
    for kind in ("param", "exp_avg", "exp_avg_sq", "step"):
        assert read.names(kind) == written.names(kind)
        for name in read.names(kind):
            assert torch.equal(read.read(name, kind), written.read(name, kind))


def test_no_pickle_in_a_checkpoint(tmp_path):
    run = start(tmp_path, "run")
    run_ranks(run)
    kinds = {p.suffix for p in run.checkpoints_dir.rglob("*") if p.is_file() and p.name != "COMPLETE"}
    assert kinds == {".safetensors", ".json"}


def test_a_checkpoint_of_another_base_is_refused(tmp_path):
    first = start(tmp_path, "first", train={**TRAIN, "stop_after_steps": 3})
    run_ranks(first)
    other = start(tmp_path, "other", quantization={"format": "none", "compute": "float32"})
    with pytest.raises(AssertionError, match="trained over another base: quantization"):
        run_ranks(other, resume=newest_valid(first.checkpoints_dir)[0])


def test_stop_file_stops_after_a_checkpoint(tmp_path):
    """What Ctrl-C does: every rank ends at the same step, saved, with the outcome `checkpointed`."""
    run = start(tmp_path, "run", "ddp")

    def ask_to_stop_at_step_2() -> None:
        from decompft.launcher.worker.data import ahead

        original = ahead.Ahead.step

        def step(self, number):
            if number == 2:
                run.stop_file(1).touch()
            return original(self, number)

        ahead.Ahead.step = step

    run_ranks(run, patch=ask_to_stop_at_step_2)
    assert len(losses(run)) == 3
    assert newest_valid(run.checkpoints_dir)[0].name == "step-00000003"
    assert not (run.path / "adapter").exists()


def test_adapter_file_describes_itself(tmp_path):
    run = start(tmp_path, "run")
    run_ranks(run)
    description = json.loads((run.path / "adapter" / "adapter.json").read_text())
    assert description["adapter"]["method"] == "map"
    assert description["adapter"]["options"]["eps"] == 1e-6
    assert description["formulas"]["map"]["is_reading"] is False
    assert len(description["base"]["sha256"]) == 64
