"""Adapters that change while they train: an unbroken run equals one resumed before or after the change."""

import pytest
import torch
from tiny import WORLDS, losses, make_run, run_ranks

from decompft.launcher.worker.restore import load_adapter, open_checkpoint

pytestmark = pytest.mark.dist

TRAIN = {"max_steps": 6, "learning_rate": 0.01, "global_batch_size": 4, "micro_batch_size": 1}
SWITCH = {"start_step": 3}
RANKS = {"interval": 1, "init_warmup": 0.0, "final_warmup": 1.0}
VARIANTS = {
    "dash": ("lora_dash", SWITCH),
    "init": ("lora_init", SWITCH),
    "init-residual": ("lora_init", {**SWITCH, "base": "residual"}),
    "tsd-residual": ("lora_tsd", {**SWITCH, "base": "residual"}),
    "adalora": ("adalora", {**RANKS, "target_rank": 2}),
    "flexlora": ("flexlora", RANKS),
}
LAUNCHED = [v for v in VARIANTS if v not in ("adalora", "flexlora")]


FEW = [
    ("dash", "zero2", 2), ("init-residual", "fsdp", 2), ("adalora", "fsdp", 2), ("adalora", "zero2", 2),
    ("flexlora", "fsdp", 2),
]  # fmt: skip
# that each engine makes the change as single does is test_every_method's, in one run for all methods
MOVES = [*FEW, *(
    pytest.param(v, w, 4, marks=pytest.mark.slow)
    for v in ("dash", "init-residual", "adalora", "flexlora") for w in ("hsdp", "zero3")
)]  # fmt: skip


def plan(folder, name, variant, world="single", **train):
    method, options = VARIANTS[variant]
    return make_run(
        folder, name, train={**TRAIN, **train}, parallel=WORLDS[world],
        adapter={"method": method, "rank": 4, "alpha": 8.0, "options": options},
        checkpoint={"every_steps": 2, "keep": 9},
    )  # fmt: skip


def checkpoint(run, step):
    return run.checkpoints_dir / f"step-{step:08d}"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A variant and a world -> a run of 6 steps with a checkpoint every 2, made once."""
    made = {}

    def get(variant, world="single"):
        if (variant, world) not in made:
            run = plan(tmp_path_factory.mktemp("runs"), "unbroken", variant, world)
            run_ranks(run)
            made[variant, world] = run
        return made[variant, world]

    return get


def same_adapter(first, second):
    a, b = (load_adapter(run.path / "adapter")[0] for run in (first, second))
    assert a.keys() == b.keys()
    return all(torch.equal(a[n], b[n]) for n in a)


def never_decompose():
    """In a forked rank: a resumed run has its directions in the checkpoint."""
    from decompft.adapters.launched import LaunchedAdapter

    def directions(*_):
        raise AssertionError("decomposed a weight again")

    LaunchedAdapter.directions = directions


@pytest.mark.parametrize(
    ("variant", "world"), [*((v, "single") for v in VARIANTS), ("dash", "ddp"), ("adalora", "ddp")]
)
@pytest.mark.parametrize("step", [2, 4])
def test_resumed_before_or_after_the_change_equals_unbroken_bit_for_bit(
    tmp_path, unbroken, variant, world, step
):
    whole = unbroken(variant, world)
    rest = plan(tmp_path, "rest", variant, world)
    patch = never_decompose if step == 4 else None
    run_ranks(rest, resume=checkpoint(whole, step), patch=patch)
    assert losses(rest) == losses(whole)[step:]
    assert same_adapter(rest, whole)


@pytest.mark.parametrize(("variant", "world", "step"), MOVES)
def test_the_change_is_the_same_on_another_world(tmp_path, unbroken, variant, world, step):
    """From step 2 the other engine makes the change itself; from step 4 it goes on after it."""
    rest = plan(tmp_path, "rest", variant, world)
    run_ranks(rest, resume=checkpoint(unbroken(variant), step))
    # the tolerance of the parity tests' fp32 cap
    assert losses(rest) == pytest.approx(losses(unbroken(variant))[step:], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["init-residual", "tsd-residual", "adalora"])
@pytest.mark.parametrize("world", ["fsdp", "zero3"])
def test_every_engine_repeats_singles_losses_across_the_change(unbroken, variant, world):
    assert losses(unbroken(variant, world)) == pytest.approx(losses(unbroken(variant)), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["init-residual", "adalora"])
@pytest.mark.parametrize("world", ["fsdp", "zero3"])
def test_a_sharded_run_resumes_on_one_rank(tmp_path, unbroken, variant, world):
    for step in (2, 4):
        rest = plan(tmp_path, f"rest{step}", variant)
        run_ranks(rest, resume=checkpoint(unbroken(variant, world), step))
        assert losses(rest) == pytest.approx(losses(unbroken(variant))[step:], rel=1e-4)


def test_averages_of_importance_are_bit_equal_right_after_loading(tmp_path, unbroken):
    """Another engine reads and stops at once: its own checkpoint holds the same numbers."""
    written = open_checkpoint(checkpoint(unbroken("adalora"), 2))
    run = plan(tmp_path, "run", "adalora", "fsdp", stop_after_steps=2)
    run_ranks(run, resume=checkpoint(unbroken("adalora"), 2))
    read = open_checkpoint(checkpoint(run, 2))
    for kind in ("importance", "uncertainty"):
        assert read.names(kind) == written.names(kind) and read.names(kind)
        assert all(torch.equal(read.read(n, kind), written.read(n, kind)) for n in read.names(kind))


@pytest.mark.parametrize("variant", LAUNCHED)
def test_the_phase_is_in_the_checkpoint(unbroken, variant):
    run = unbroken(variant)
    for step, phase in ((2, 0), (4, 1)):
        tensors, _ = load_adapter(checkpoint(run, step))
        phases = [t.item() for n, t in tensors.items() if n.endswith(".phase")]
        assert phases and set(phases) == {phase}
        indices = [t for n, t in tensors.items() if n.endswith(".indices")]
        assert all(t.any() for t in indices) == bool(phase)


RESTARTING = {"dash": ("c",), "init": ("A", "B"), "tsd": ("A", "B", "c")}


@pytest.mark.parametrize(("variant", "world"), [*((v, "single") for v in RESTARTING), ("tsd", "zero2")])
def test_the_optimizer_starts_anew_with_what_the_second_phase_places(tmp_path, variant, world):
    """Moments of the first phase would push A and B off the factors that they have just been given."""
    method = {"dash": "lora_dash", "init": "lora_init", "tsd": "lora_tsd"}[variant]
    run = make_run(
        tmp_path, train={**TRAIN, "max_steps": 3}, parallel=WORLDS[world],
        adapter={"method": method, "rank": 4, "alpha": 8.0, "options": {"start_step": 2}},
        checkpoint={"every_steps": 1, "keep": 9},
    )  # fmt: skip
    run_ranks(run)
    before, switch, after = (open_checkpoint(checkpoint(run, step)) for step in (1, 2, 3))
    num_seen = 0
    for name in switch.names("exp_avg"):
        own = name.rpartition(".")[2]
        restarts = own in RESTARTING[variant]
        num_seen += restarts
        assert before.read(name, "step") == 1, name
        assert switch.read(name, "step") == (0 if restarts else 2), name
        assert after.read(name, "step") == (1 if restarts else 3), name
        for kind in ("exp_avg", "exp_avg_sq"):
            assert switch.read(name, kind).any() != restarts, (name, kind)
            assert after.read(name, kind).any(), (name, kind)
    assert num_seen == 14 * len(RESTARTING[variant])


def test_ranks_end_at_the_target(unbroken):
    tensors, _ = load_adapter(unbroken("adalora").path / "adapter")
    masks = {n: t for n, t in tensors.items() if n.endswith(".mask")}
    assert sum(t.sum() for t in masks.values()) == 2 * len(masks)
    for name, mask in masks.items():
        assert not tensors[name.removesuffix("mask") + "e"][mask == 0].any()
    kinds = open_checkpoint(checkpoint(unbroken("adalora"), 6))
    assert not kinds.names("importance")


@pytest.mark.parametrize("world", ["single", "zero2"])
def test_what_the_last_allocation_ends_has_no_momentum(unbroken, world):
    """AdamW would move a masked e on for dozens of steps, and peft's too."""
    last = open_checkpoint(checkpoint(unbroken("adalora", world), 6))
    masks = {
        n.removesuffix("mask"): last.read(n, "param") for n in last.names("param") if n.endswith(".mask")
    }
    assert len(masks) == 14
    for name, mask in masks.items():
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(last.read(f"{name}e", kind) != 0, mask != 0), (name, kind)


def test_directions_change_hands_and_none_is_lost(unbroken):
    tensors, _ = load_adapter(unbroken("flexlora").path / "adapter")
    ranks = [int(t.sum()) for n, t in tensors.items() if n.endswith(".mask")]
    assert sum(ranks) == 4 * len(ranks) and len(set(ranks)) > 1


def test_a_run_that_ends_before_the_second_phase_says_so(tmp_path):
    run = make_run(
        tmp_path, train={**TRAIN, "max_steps": 2},
        adapter={"method": "lora_dash", "rank": 4, "alpha": 8.0},
    )  # fmt: skip
    incarnation = run_ranks(run)
    assert (
        "end before its second phase (adapter.options.start_step: 100)"
        in run.rank_log(incarnation, 0).read_text()
    )


@pytest.mark.parametrize(
    ("variant", "world"), [*((v, "single") for v in LAUNCHED), ("init-residual", "fsdp")]
)
def test_no_second_phase_begins_after_the_last_step_and_a_longer_run_begins_it(tmp_path, variant, world):
    """lora_init would throw away all that was learned, and dash's c would never train."""
    short = plan(tmp_path / "short", "short", variant, world, max_steps=3, schedule="constant")
    whole = plan(tmp_path / "whole", "whole", variant, world, schedule="constant")
    incarnation = run_ranks(short)
    run_ranks(whole)
    assert "end before its second phase" in short.rank_log(incarnation, 0).read_text()
    tensors, _ = load_adapter(short.path / "adapter")
    for name, tensor in tensors.items():
        learned = name.endswith((".A", ".B"))
        assert bool(tensor.any()) == learned, name
    rest = plan(tmp_path / "rest", "rest", variant, world, schedule="constant")
    run_ranks(rest, resume=checkpoint(short, 3))
    assert losses(rest) == losses(whole)[3:]
    assert same_adapter(rest, whole)


@pytest.mark.parametrize(("variant", "world"), [("dash", "single"), ("init", "ddp")])
def test_directions_are_not_chosen_while_b_is_zero(tmp_path, variant, world):
    """A rate so small that B stays 0, as it does under a warm-up; every rank stops, none waits for another."""
    run = make_run(
        tmp_path, train={**TRAIN, "learning_rate": 1e-60}, parallel=WORLDS[world],
        # before the proof of step 3, which would blame the model's wiring
        adapter={
            "method": VARIANTS[variant][0], "rank": 4, "alpha": 8.0, "options": {"start_step": 2}
        },
    )  # fmt: skip
    with pytest.raises(
        AssertionError, match="(?s)B has not moved yet after the 2 steps.*lower train.warmup_steps"
    ):
        run_ranks(run)


def test_warmups_that_leave_no_step_are_refused_in_words(tmp_path):
    run = make_run(
        tmp_path, train=TRAIN,
        adapter={"method": "adalora", "rank": 4, "options": {"init_warmup": 4.0, "final_warmup": 4.0}},
    )  # fmt: skip
    with pytest.raises(AssertionError, match="init_warmup 4 and final_warmup 4 leave none of the 6 steps"):
        run_ranks(run)
