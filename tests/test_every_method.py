"""Every method on every engine: one model whose layers each carry another method, trained once an engine."""

from __future__ import annotations

import pytest
import torch
from test_adapter_contract import VARIANTS
from test_engine_parity import reorder
from tiny import LLAMA, WORLDS, losses, make_run, run_ranks

from decompft.adapters.formats import FORMAT_SPECS
from decompft.launcher.checkpoints import newest_valid
from decompft.launcher.runs import RunDir
from decompft.launcher.worker.restore import load_adapter

pytestmark = pytest.mark.dist

MODULES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
STEPS = 6
# so that what happens at a step happens while these runs last
_RANKS = {"interval": 1, "init_warmup": 0.0, "final_warmup": 1.0}
SOON: dict[str, dict[str, object]] = {
    "lora_dash": {"start_step": 2},
    "lora_init": {"start_step": 4},
    "lora_tsd": {"start_step": 2},
    "adalora": _RANKS,
    "flexlora": _RANKS,
}


def mixed(folder, name: str, world: str, *, base: str = "nf4", **train: object) -> RunDir:
    """A planned run of a model in which the n-th linear layer carries the n-th variant."""
    num_layers = -(-len(VARIANTS) // len(MODULES))
    places = [f"model.layers.{i}.{module}" for i in range(num_layers) for module in MODULES]
    overrides = [
        {"targets": place, "method": method, "options": {**SOON.get(method, {}), **options}}
        for place, (method, options) in zip(places, VARIANTS.values(), strict=False)
    ]
    return make_run(
        folder,
        name,
        model={"config": {**LLAMA, "num_hidden_layers": num_layers}},
        adapter={"method": "lora", "rank": 4, "alpha": 8.0, "overrides": overrides},
        train={
            "max_steps": STEPS, "learning_rate": 0.003, "global_batch_size": 4, "micro_batch_size": 1, **train,
        },
        parallel=WORLDS[world],
        quantization={"format": base, "compute": "float32"},
    )  # fmt: skip


def trained(run: RunDir) -> dict[str, torch.Tensor]:
    return load_adapter(run.path / "adapter")[0]


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Tensor -> norm of the difference over the norm."""
    assert found.keys() == expected.keys()
    norm = torch.linalg.norm
    return {n: float(norm(found[n] - t) / norm(t).clamp_min(1e-12)) for n, t in expected.items()}


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> RunDir:
    run = mixed(tmp_path_factory.mktemp("every"), "single", "single")
    run_ranks(run)
    return run


@pytest.fixture(scope="module")
def reordered(tmp_path_factory) -> dict[str, float]:
    """What the order of addition alone does to each tensor."""
    folder = tmp_path_factory.mktemp("reordered")
    plain, other = mixed(folder, "plain", "single"), mixed(folder, "other", "single")
    run_ranks(plain)
    run_ranks(other, patch=reorder("reversed"))
    return differences(trained(other), trained(plain))


def test_every_method_trains(single):
    tensors = trained(single)
    assert losses(single)[-1] < losses(single)[0]
    assert all(t.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize("world", [w for w in WORLDS if w != "single"])
def test_every_engine_repeats_single(tmp_path, single, reordered, world):
    run = mixed(tmp_path, world, world)
    run_ranks(run)
    assert losses(run) == pytest.approx(losses(single), rel=1e-4)
    found = differences(trained(run), trained(single))
    # AdamW makes a step of any gradient, so that one which is nearly 0 may turn round
    off = {n: (d, reordered[n]) for n, d in found.items() if d > max(10 * reordered[n], 3e-3)}
    assert not off


@pytest.mark.parametrize(
    ("before", "after"), [("single", "single"), ("fsdp", "fsdp"), ("fsdp", "zero3"), ("zero2", "ddp")]
)
def test_stopped_and_resumed(tmp_path, single, reordered, before, after):
    """Bit-equal on the same engine; on another as near as engines are to each other."""
    first = mixed(tmp_path, "first", before, stop_after_steps=3)
    run_ranks(first)
    rest = mixed(tmp_path, "rest", after)
    checkpoint, _ = newest_valid(first.checkpoints_dir)
    run_ranks(rest, resume=checkpoint)
    if before == after == "single":
        expected, unbroken = trained(single), losses(single)
        assert losses(first) + losses(rest) == unbroken
        assert all(torch.equal(t, expected[n]) for n, t in trained(rest).items())
    elif before == after:
        whole = mixed(tmp_path, "whole", before)
        run_ranks(whole)
        assert losses(first) + losses(rest) == losses(whole)
        assert all(torch.equal(t, trained(whole)[n]) for n, t in trained(rest).items())
    else:
        assert losses(first) + losses(rest) == pytest.approx(losses(single), rel=1e-4)
        found = differences(trained(rest), trained(single))
        assert not {n: (d, reordered[n]) for n, d in found.items() if d > max(10 * reordered[n], 3e-3)}


@pytest.mark.slow
@pytest.mark.parametrize("base", [f for f in FORMAT_SPECS if f != "nf4"])
def test_every_base_format_under_every_method_when_sharded(tmp_path, base):
    """With the tests above, every method over every format on an engine that cuts rows, and on one rank."""
    alone, cut = mixed(tmp_path, "alone", "single", base=base), mixed(tmp_path, "cut", "fsdp", base=base)
    run_ranks(alone)
    run_ranks(cut)
    assert losses(alone)[-1] < losses(alone)[0]
    assert losses(cut) == pytest.approx(losses(alone), rel=1e-4)
