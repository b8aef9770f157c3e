"""What adapters are told of the base while it loads: norms and zeros of the weight that is used, on every engine."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import CPU, WORLDS, fork, recipe_data
from tiny_models import FAMILIES, NF4, PLAIN, built, plain_model, section

from decompft.adapters.inject import adapters
from decompft.adapters.spec import ADAPTER_SPECS
from decompft.launcher.planner import make
from decompft.launcher.recipe import AdapterSection
from decompft.launcher.source import parse
from decompft.launcher.worker import reading
from decompft.launcher.worker.engines.base import full_shape
from decompft.launcher.worker.engines.choose import make_engine

METHODS = ("dora", "delora", "map", "liera")
MODULES = (
    "mlp.gate_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
# the n-th layer carries the n-th method in turn: gate_proj and up_proj of two blocks have all four
PLACES = {f"model.layers.{i}.{m}": METHODS[(7 * i + k) % 4] for i in range(2) for k, m in enumerate(MODULES)}
ADAPTER = AdapterSection(
    method="lora", rank=4, alpha=8.0,
    overrides=[{"targets": place, "method": method} for place, method in PLACES.items()],
)  # fmt: skip
# two halves of 129 rows meet inside one, and so do three thirds of 128 or of 64
CASES = {"none": (PLAIN, 129, 2), "nf4": (NF4, 128, 3)}
KEPT = ("rn2", "m", "column_norms", "base_norm", "a")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """case -> folder of a llama whose weights hold zeros, more of them in some rows and columns than in others."""
    folders = {}
    for case, (_, width, _) in CASES.items():
        model = plain_model({**FAMILIES["llama"], "intermediate_size": width})
        with torch.no_grad():
            for parameter in model.model.layers.parameters():
                if parameter.dim() == 2:
                    out, in_ = parameter.shape
                    share = torch.linspace(0, 0.8, out)[:, None] * torch.linspace(0.2, 1, in_)
                    parameter[torch.rand(out, in_, generator=torch.Generator().manual_seed(1)) < share] = 0
        folders[case] = tmp_path_factory.mktemp(case)
        model.save_pretrained(folders[case])
    return folders


def started(folder, case, engine=None):
    return built(section(folder), CASES[case][0], ADAPTER, engine=engine).model.model


def placed(model):
    """Adapters by their layer; those that measure nothing are left out."""
    found = {n: a for n, a in adapters(model) if n in PLACES}
    assert found.keys() == PLACES.keys()
    return found


def facts_in(adapter):
    """What an adapter made of its facts: tensors, whole or cut, and the share of zeros."""
    found = {n: getattr(adapter, n) for n in KEPT if hasattr(adapter, n)}
    return found, getattr(adapter, "zero_fraction", None)


def expected_of(adapter):
    W = adapter.base.dense(torch.float64)
    row, column, whole = W.square().sum(1), W.norm(dim=0), W.norm().reshape(1)
    of = {"rn2": row, "m": row.sqrt(), "column_norms": column, "base_norm": whole, "a": whole}
    return {n: of[n] for n in facts_in(adapter)[0]}, (W == 0).double().mean().item()


@pytest.mark.parametrize("rows_at_once", [None, 7], ids=["whole", "chunks"])
@pytest.mark.parametrize("case", CASES)
def test_facts_are_those_of_the_weight_that_is_used(checkpoints, case, rows_at_once, monkeypatch):
    if rows_at_once is not None:
        # 64 float32 numbers a row
        monkeypatch.setattr(reading, "CHUNK_BYTES", rows_at_once * 64 * 4)
    for name, adapter in placed(started(checkpoints[case], case)).items():
        found, zeros = facts_in(adapter)
        expected, share = expected_of(adapter)
        assert bool(found) != (zeros is not None), name
        for own, value in found.items():
            torch.testing.assert_close(value.detach().double(), expected[own], rtol=1e-6, atol=0, msg=own)
        if zeros is not None:
            assert zeros == share and 0.1 < share < 0.9, name


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_facts_are_singles_however_the_weight_is_cut(checkpoints, tmp_path, strategy, case):
    """ZeRO-3 cuts in the middle of rows: each rank counts its own part of one."""
    world_size = CASES[case][2]
    alone = placed(started(checkpoints[case], case))
    data = recipe_data(
        tmp_path, parallel={**WORLDS[strategy], "gpus_per_node": world_size}, train={"global_batch_size": 6}
    )
    plan = make(parse(json.dumps(data), where="test", base_dir=tmp_path, overrides=()), machine=CPU)

    def rank_main(rank):
        engine = make_engine(plan)
        engine.start()
        try:
            cuts = 0
            for name, adapter in placed(started(checkpoints[case], case, engine)).items():
                codes = adapter.base.storage()[0]
                cuts += engine.span(codes)[rank == 0] % full_shape(codes)[1] != 0
                found, zeros = facts_in(adapter)
                expected, share = facts_in(alone[name])
                assert zeros == share, name
                for own, value in found.items():
                    start, stop = engine.span(value)
                    mine = engine.local(value).detach().view(-1)
                    # the order of addition
                    torch.testing.assert_close(
                        mine, expected[own].detach().view(-1)[start:stop], rtol=1e-6, atol=0
                    )
            assert bool(cuts) == (strategy == "zero3")
        finally:
            engine.stop()

    fork(rank_main, world_size)


def test_every_fact_that_is_measured_is_tested_here():
    config = {n: ADAPTER.config(o) for n, o in zip(METHODS, ADAPTER.overrides, strict=False)}
    needs = {w for c in config.values() for w in ADAPTER_SPECS[c.method].needs(c)}
    assert needs == {"row_norms", "column_norms", "frobenius_norm", "zero_fraction"}
