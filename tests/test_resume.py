"""N steps equal k + (N - k) steps on every engine; from one engine to another: test_engine_pairs.py."""

import json

import pytest
import torch
from tiny import TRAIN, WORLDS, losses, make_run, run_ranks

from decompft.launcher.checkpoints import newest_valid
from decompft.launcher.runs import RunDir
from decompft.launcher.worker.restore import load_adapter

pytestmark = pytest.mark.dist


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


@pytest.mark.parametrize("world", ["single", "fsdp"])
def test_a_deterministic_run_uses_no_operation_without_a_fixed_order(tmp_path, world):
    """Torch refuses such operations by name then; on a CPU the numbers are any run's, which can go on as one."""
    adapter = {"adapter": {"method": "map", "rank": 4, "alpha": 8.0}}
    plain = start(tmp_path, "plain", world, **adapter)
    run_ranks(plain)
    train = {**TRAIN, "deterministic": True, "stop_after_steps": 3}
    fixed = start(tmp_path, "fixed", world, **adapter, train=train)
    run_ranks(fixed)
    rest = continue_as(tmp_path, "rest", fixed, world, **adapter)
    assert losses(fixed) + losses(rest) == losses(plain)
