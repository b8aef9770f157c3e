"""What the optimizer is made of the recipe, and that 8-bit moments train, stop and go on."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import losses, make_run, run_ranks
from tiny_models import FAMILIES, NF4, built, row, saved, section, single
from torch._subclasses import FakeTensorMode
from transformers import get_scheduler

from decompft.adapters.base import Settling
from decompft.adapters.inject import adapters
from decompft.launcher.checkpoints import newest_valid
from decompft.launcher.recipe import AdapterSection, TrainSection
from decompft.launcher.worker.data.batches import collate
from decompft.launcher.worker.optimizer import (
    _beside,
    clip_gradients,
    make_optimizer,
    read_moments,
    schedule,
    set_learning_rate,
    write_moments,
)  # fmt: skip
from decompft.launcher.worker.restore import load_adapter

KINDS = ("adamw", "adamw8bit")
# A and B of 4096 numbers and more are quantized, smaller ones stay float32
WIDE = AdapterSection(method="map", rank=64, alpha=64.0, train_modules=["norm", "embed_tokens"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("llama"), FAMILIES["llama"])[0]


def train_section(**fields) -> TrainSection:
    return TrainSection(**{"max_steps": 10, "learning_rate": 0.01, **fields})


def optimizer_of(found, **fields):
    return make_optimizer(found.model.model, found.trained, train_section(**fields), single())


def group_of(optimizer, parameter):
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


def take_steps(found, optimizer, steps):
    found.model.train()
    for step in steps:
        optimizer.zero_grad()
        found.model(collate([row((20,), seed=step)], pad_id=0)).backward()
        optimizer.step()


# -- groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_weight_decay_is_for_matrices_only(folder, kind):
    found = built(section(folder), NF4, WIDE)
    optimizer = optimizer_of(found, optimizer=kind, weight_decay=0.1)
    for name, parameter in found.trained.items():
        is_matrix = name.endswith((".A", ".B", "embed_tokens.weight"))
        assert group_of(optimizer, parameter)["weight_decay"] == (0.1 if is_matrix else 0.0), name
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(found.trained)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["pissa", "milora", "olora", "lora_init", "lora_tsd", "mpc_o"])
def test_what_holds_a_part_of_the_weight_is_not_decayed(folder, kind, method):
    """Decayed, it would take that part of the weight with it; its neighbour with plain LoRA decays."""
    options = {"over": "pissa"} if method == "mpc_o" else {}
    lora = {"targets": "q_proj", "method": "lora"}
    adapter = AdapterSection(method=method, rank=4, alpha=8.0, options=options, overrides=[lora])
    found = built(section(folder), NF4, adapter)
    optimizer = optimizer_of(found, optimizer=kind, weight_decay=0.1)
    for name, parameter in found.trained.items():
        expected = 0.1 if "q_proj" in name else 0.0
        assert group_of(optimizer, parameter)["weight_decay"] == expected, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("method", "options", "scales"),
    [
        ("lora", {"lr_ratio": 16.0}, {"A": 1, "B": 16}),
        ("map", {"lr_ratio": 4.0, "magnitude_lr_ratio": 0.5}, {"A": 1, "B": 4, "a": 0.5, "b": 0.5}),
        ("lora_dash", {"coordinate_lr_ratio": 4.0}, {"A": 1, "B": 1, "c": 4}),
        ("lora_init", {}, {"A": 1, "B": 1}),
        ("lora_tsd", {"coordinate_lr_ratio": 4.0}, {"A": 1, "B": 1, "c": 4}),
    ],
)
def test_a_methods_learning_rate_ratios_reach_the_step(folder, kind, method, options, scales):
    """In the groups, and in the first AdamW step itself, which is the rate whatever the gradient."""
    section_ = AdapterSection(method=method, rank=4, alpha=8.0, options=options)
    found = built(section(folder), NF4, section_)
    optimizer = optimizer_of(found, optimizer=kind)
    set_learning_rate(optimizer, schedule(optimizer, train_section(schedule="constant"), 10)(0))
    before = {n: p.detach().clone() for n, p in found.trained.items()}
    for parameter in found.trained.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in found.trained.items():
        rate = 0.01 * scales[name.rpartition(".")[2]]
        assert float(group_of(optimizer, parameter)["lr"]) == pytest.approx(rate)
        # a is a norm of about 10: 0.005 of it in float32
        torch.testing.assert_close(
            before[name] - parameter, torch.full_like(parameter, rate), rtol=1e-3, atol=0
        )


@pytest.mark.parametrize("kind", KINDS)
def test_betas_and_eps_are_the_recipes(folder, kind):
    optimizer = optimizer_of(
        built(section(folder), NF4, WIDE), optimizer=kind, betas=(0.8, 0.95), adam_eps=1e-6
    )
    for group in optimizer.param_groups:
        assert tuple(group["betas"]) == (0.8, 0.95) and group["eps"] == 1e-6


# -- schedules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TrainSection.model_fields["schedule"].annotation.__args__)
def test_schedules_are_transformers_own(name):
    """Ours is a function of the step, theirs is stepped: the rates of each step are the same."""
    total, fields = 12, {"schedule": name, "warmup_steps": 0 if name == "constant" else 3}
    ours, theirs = (torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.01) for _ in range(2))
    factor = schedule(ours, train_section(**fields), total)
    stepped = get_scheduler(name, theirs, fields["warmup_steps"], total)
    for step in range(total):
        set_learning_rate(ours, factor(step))
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], abs=1e-12), step
        theirs.step()
        stepped.step()


# -- clipping --------------------------------------------------------------------------------------


def clipped(found, max_norm):
    before = {n: p.grad.clone() for n, p in found.trained.items()}
    norm = clip_gradients(list(adapters(found.model.model)), found.trained, single(), max_norm)
    return norm, before, {n: p.grad for n, p in found.trained.items()}


def total_norm(grads):
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads])).item()


def test_clipping_is_by_the_global_norm(folder):
    found = built(
        section(folder), NF4, AdapterSection(method="lora", rank=4, alpha=8.0, train_modules=["norm"])
    )
    take_steps(found, torch.optim.SGD(found.trained.values(), lr=0.0), [0])
    expected = total_norm([p.grad for p in found.trained.values()])
    for max_norm in (expected / 10, expected * 10, 0.0):
        norm, before, after = clipped(found, max_norm)
        assert norm == pytest.approx(total_norm(before.values()), rel=1e-5)
        scale = max_norm / norm if 0 < max_norm < norm else 1.0
        for name in after:
            torch.testing.assert_close(after[name], before[name] * scale, rtol=1e-5, atol=0)
        found.model.zero_grad()
        take_steps(found, torch.optim.SGD(found.trained.values(), lr=0.0), [0])


def test_what_still_settles_neither_counts_nor_is_clipped(folder):
    """MAP at B = 0: B's slope is a million times the others', which clipping must not feel."""
    found = built(section(folder), NF4, AdapterSection(method="map", rank=4, alpha=8.0))
    take_steps(found, torch.optim.SGD(found.trained.values(), lr=0.0), [0])
    others = [p.grad for n, p in found.trained.items() if not n.endswith(".B")]
    expected = total_norm(others)
    norm, before, after = clipped(found, expected / 2)
    assert total_norm(before.values()) > 1e3 * expected
    assert norm == pytest.approx(expected, rel=1e-5)
    for name in after:
        # at N(D) = 0 the factor is eps / settle_norm
        scale = 1e-6 / 1e-3 if name.endswith(".B") else 0.5
        torch.testing.assert_close(after[name], before[name] * scale, rtol=1e-4, atol=0)


def test_factors_of_layers_that_settle_otherwise():
    sizes, options = (0.0, 2.0, 0.5, math.nan), ((1e-6, 1e-3), (0.5, 5.0), (0.0, 1.0), (1e-6, 1e-3))
    waits = [
        Settling(size=torch.tensor([s]), offset=o, limit=m) for s, (o, m) in zip(sizes, options, strict=True)
    ]
    expected = [1e-3, 0.5, 0.5, 1.0]
    assert Settling.factors(waits).tolist() == pytest.approx(expected)
    assert [Settling.factors([w]).item() for w in waits] == pytest.approx(expected)


@pytest.mark.parametrize("order", [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda"), ("cpu", "cpu")])
def test_gradients_on_host_and_device_can_be_scaled_in_any_order(order):
    """fsdp's under offload: matrices of the host beside vectors of the device."""
    with FakeTensorMode():  # which knows what cannot be multiplied, without a GPU
        gradients = [torch.ones(3, device=device) for device in order]
        number = _beside(torch.ones((), dtype=torch.float64, device="cuda"), gradients)
        assert number.dtype == torch.float32
        for gradient in gradients:
            gradient.mul_(number)


# -- 8-bit moments ---------------------------------------------------------------------------------

TARGETS = [
    "q_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
]  # k_proj and v_proj are narrower than the rank


@pytest.mark.parametrize("kind", KINDS)
def test_moments_written_are_the_moments_read(folder, kind):
    """What was quantized once gets the same codes again, however often it is saved and loaded."""
    found, again = (built(section(folder), NF4, WIDE) for _ in range(2))
    optimizer, other = (optimizer_of(b, optimizer=kind, weight_decay=0.1) for b in (found, again))
    take_steps(found, optimizer, range(3))
    for name, parameter in found.trained.items():
        moments = read_moments(optimizer, parameter, single())
        assert moments["exp_avg"].shape == parameter.shape and moments["exp_avg"].any(), name
        assert moments["step"].item() == 3
        with torch.no_grad():
            again.trained[name].copy_(parameter)
        for _ in range(20):
            write_moments(other, again.trained[name], {k: v.clone() for k, v in moments.items()}, single())
            moments = read_moments(other, again.trained[name], single())
        for kind_ in ("exp_avg", "exp_avg_sq"):
            before = read_moments(optimizer, parameter, single())[kind_]
            # the scale of a block may move by a last bit each time
            torch.testing.assert_close(moments[kind_], before, rtol=20 * 2**-23, atol=0)
    take_steps(found, optimizer, [3])
    take_steps(again, other, [3])
    for name, parameter in found.trained.items():
        torch.testing.assert_close(parameter, again.trained[name], rtol=1e-6, atol=1e-7)


def test_large_tensors_have_8_bit_moments_and_small_ones_do_not(folder):
    found = built(section(folder), NF4, WIDE)
    optimizer = optimizer_of(found, optimizer="adamw8bit")
    take_steps(found, optimizer, [0])
    for name, parameter in found.trained.items():
        expected = torch.uint8 if parameter.numel() >= 4096 else torch.float32
        assert optimizer.state[parameter]["state1"].dtype == expected, name


TARGETS = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# three ranks divide no tensor evenly, and two of them hold no row of a magnitude
WORLDS = {"single": {}, "fsdp": {"strategy": "fsdp", "gpus_per_node": 3}}
TRAIN = {
    "max_steps": 6,
    "learning_rate": 0.005,
    "global_batch_size": 6,
    "micro_batch_size": 2,
    "weight_decay": 0.01,
}


def launched(folder, name, world, *, resume=None, **train):
    run = make_run(
        folder, name, adapter={"method": "map", "rank": 64, "alpha": 64.0, "targets": TARGETS},
        parallel=WORLDS[world], train={**TRAIN, "optimizer": "adamw8bit", **train},
    )  # fmt: skip
    run_ranks(run, resume=resume)
    return run


@pytest.fixture(scope="module")
def eight_bit(tmp_path_factory):
    """world -> (a whole run, one stopped at half)."""
    folders = {world: tmp_path_factory.mktemp(world) for world in WORLDS}
    return {
        world: (launched(folder, "whole", world), launched(folder, "first", world, stop_after_steps=3))
        for world, folder in folders.items()
    }


@pytest.mark.dist
@pytest.mark.parametrize("world", WORLDS)
def test_8_bit_moments_train_nearly_as_whole_ones_do(eight_bit, tmp_path, world):
    run, _ = eight_bit[world]
    full = losses(launched(tmp_path, "full", world, optimizer="adamw"))
    assert losses(run)[-1] < losses(run)[0]
    assert losses(run) != full
    assert losses(run) == pytest.approx(full, rel=0.02)  # 8 bits a moment
    tensors, _ = load_adapter(run.path / "adapter")
    for name, tensor in tensors.items():
        if name.endswith(".B"):
            assert tensor.any(dim=1).all(), f"{name}: each rank's rows have left 0"


@pytest.mark.dist
@pytest.mark.parametrize(
    ("before", "after", "rel"),
    # the same rows: the same codes. Other rows: quantized again in other blocks
    [("single", "single", 1e-6), ("fsdp", "fsdp", 1e-6), ("single", "fsdp", 5e-3), ("fsdp", "single", 5e-3)],
)
def test_8_bit_moments_are_resumed(eight_bit, tmp_path, before, after, rel):
    whole, first = eight_bit[before]
    rest = launched(tmp_path, "rest", after, resume=newest_valid(first.checkpoints_dir)[0])
    assert losses(first) + losses(rest) == pytest.approx(losses(whole), rel=rel)


@pytest.mark.dist
@pytest.mark.parametrize(
    "parallel",
    [{"strategy": "ddp", "gpus_per_node": 2}, {"strategy": "hsdp", "gpus_per_node": 4, "shard_size": 2}],
    ids=lambda parallel: parallel["strategy"],
)
def test_8_bit_moments_under_engines_that_replicate(tmp_path, parallel):
    train = {"max_steps": 4, "learning_rate": 0.005, "global_batch_size": 8, "micro_batch_size": 2}
    train |= {"optimizer": "adamw8bit"}
    run, single = (
        make_run(tmp_path, n, train=train, parallel=p) for n, p in (("run", parallel), ("single", {}))
    )
    for each in (run, single):
        run_ranks(each)
    assert losses(run) == pytest.approx(losses(single), rel=5e-3)  # other rows, other blocks
