"""Which mode of recomputation a plan takes, and what it says where the one that was asked for cannot be."""

from __future__ import annotations

import pytest
from planning import GIB, LLAMA_70B, gpus, make, recipe

from decompft.launcher import planner
from decompft.launcher.errors import PlanError
from decompft.launcher.machine import Machine
from decompft.launcher.recipe import Recipe
from decompft.launcher.recompute import BY_PIECES, Recompute


def test_only_as_much_recomputation_as_needed() -> None:
    found = [make(gpus(1, gib), train={"micro_batch_size": 4}).recompute for gib in (80, 36, 24, 12, 8)]
    assert found == ["none", "norms", "selective", "full", "offloaded"]
    with pytest.raises(PlanError, match="memory: single with recomputation at micro batch 4"):
        make(
            Machine(host_memory_bytes=GIB), train={"micro_batch_size": 4}
        )  # not from the host: it is the host


def test_what_gathers_for_each_micro_batch_takes_more_rows_instead_of_norms_or_selective() -> None:
    away = {"parallel": {"strategy": "fsdp", "cpu_offload": True}}
    free = make(gpus(2, 24), LLAMA_70B, **away)
    assert (free.recompute, free.batch.micro_size) == ("full", 4)
    assert make(gpus(2, 24), LLAMA_70B, **away, train={"micro_batch_size": 1}).recompute == "selective"
    # what norms keep of one row of 70B, at its smallest machine: named, it is taken
    named = make(gpus(2, 80), LLAMA_70B, **away, train={"recompute": "norms"})
    assert (named.recompute, named.warnings) == ("norms", ())


@pytest.mark.parametrize("mode", BY_PIECES)
def test_a_block_whose_pieces_are_not_known_is_recomputed_whole_in_words(mode: Recompute) -> None:
    found = recipe({"model_type": "bert"}, data={"sequence_length": 512}, train={"recompute": mode})
    raw = found.model_dump(mode="json")
    raw["data"]["packing"] = False
    raw["model"]["task"], raw["data"]["train"][0]["format"] = "sequence-classification", "classification"
    plan = planner.make(Recipe.model_validate(raw), machine=gpus(1, 80))
    assert plan.recompute == "full"
    assert f"train.recompute: {mode} does not know the blocks of bert; full is taken" in plan.warnings
