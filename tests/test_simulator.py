"""The simulator: collectives and steps against arithmetic by hand, and what must follow from more of something."""

from __future__ import annotations

import math
from typing import Any

import pytest
from test_forecast import layout, work

from decompft.launcher.collectives import Fabric, Group, Link, all_gather_s, all_reduce_s
from decompft.launcher.plan import StepTime
from decompft.launcher.rates import H200, Rates, fabric
from decompft.launcher.simulator import flops, simulate

SEVEN_B = "meta-llama/Llama-2-7b-hf"
FABRIC = Fabric(
    in_node=Link(bytes_per_s=100.0, latency_s=1.0), network=Link(bytes_per_s=50.0, latency_s=10.0)
)


def step(model: Any = SEVEN_B, *, nodes: int = 1, accumulation: int = 1, **changes: Any) -> StepTime:
    return simulate(work(model), layout(**changes), H200, fabric(), nodes=nodes, accumulation=accumulation)


def seconds(time: StepTime, *names: str) -> float:
    return sum(term.seconds for term in time.terms if term.name in names)


def test_ring_of_one_node_has_n_minus_1_hops_and_shares_of_the_bytes() -> None:
    assert all_gather_s(400.0, Group(ranks=4), FABRIC) == 3 * 1.0 + 400 * 3 / 4 / 100


def test_ring_over_nodes_crosses_as_many_times_as_there_are_nodes_and_has_the_slower_link() -> None:
    assert all_gather_s(400.0, Group(ranks=4, nodes=2), FABRIC) == 1 * 1.0 + 2 * 10.0 + 400 * 3 / 4 / 50


def test_all_reduce_takes_the_tree_where_its_latency_is_lower() -> None:
    group = Group(ranks=64, nodes=32)
    tree = 2 * (math.log2(32) * 10 + 1 * 1)
    assert all_reduce_s(0.0, group, FABRIC) == tree < 2 * all_gather_s(0.0, group, FABRIC)


def test_groups_at_once_share_the_network() -> None:
    alone, shared = (all_gather_s(1000.0, Group(ranks=2, nodes=2, at_once=n), FABRIC) for n in (1, 4))
    assert shared - 10 == pytest.approx(4 * (alone - 10))


@pytest.mark.parametrize("collective", [all_gather_s, all_reduce_s])
def test_one_rank_communicates_nothing(collective: Any) -> None:
    assert collective(1e9, Group(ranks=1), FABRIC) == 0


def test_flops_of_7b_are_28_giga_a_token_and_6_a_number_of_the_adapter() -> None:
    # shared/gpu/README.md: 4 a weight and token, and causal attention at sequence 2048
    found = work(SEVEN_B)
    assert sum(flops(found, 1)) - 6 * found.num_adapter_params == pytest.approx(28.0e9, rel=0.002)


def test_a_step_is_the_sum_of_its_terms_and_recomputing_is_a_forward_but_its_last_products() -> None:
    full = step(recompute="full")
    block = 4 * 4_096**2 + 3 * 4_096 * 11_008
    share = 1 - 4_096 * 11_008 / block
    assert seconds(full, "recomputation") == pytest.approx(share * seconds(full, "forward"))
    assert full.seconds == pytest.approx(sum(term.seconds for term in full.terms))


def test_small_micro_batches_are_bound_by_the_host_and_large_ones_by_arithmetic() -> None:
    small, large = (step(micro_size=n) for n in (1, 8))
    assert (small.limit, large.limit) == ("host's launches", "arithmetic")
    assert seconds(small, "waiting for the host") > 0 == seconds(large, "waiting for the host")


def test_recorded_passes_do_not_wait_for_the_host() -> None:
    plain, recorded = (
        simulate(
            work(SEVEN_B, train={"cuda_graph": recorded}), layout(micro_size=1), H200, fabric(), nodes=1,
            accumulation=1,
        )
        for recorded in (False, True)
    )  # fmt: skip
    wait = "waiting for the host"
    assert (
        seconds(recorded, wait) == 0 < seconds(plain, wait) == pytest.approx(plain.seconds - recorded.seconds)
    )


def test_accumulation_does_not_communicate_under_ddp() -> None:
    one, four = (
        step(strategy="ddp", world_size=16, nodes=2, micro_size=8, accumulation=n) for n in (1, 4)
    )  # fmt: skip
    assert seconds(four, "waiting for links") == pytest.approx(seconds(one, "waiting for links"))
    assert seconds(four, "forward") == pytest.approx(4 * seconds(one, "forward"))


def test_a_slow_network_binds_fsdp_and_not_hsdp() -> None:
    given = {"world_size": 16, "micro_size": 1, "recompute": "full"}
    slow = fabric(network_gbit_per_s=10)
    fsdp, hsdp = (
        simulate(
            work("meta-llama/Llama-2-70b-hf"), layout(**given, **more), H200, slow, nodes=2, accumulation=4
        )
        for more in ({"strategy": "fsdp"}, {"strategy": "hsdp", "group_size": 8})
    )
    assert fsdp.limit == "links" != hsdp.limit
    assert fsdp.seconds > 2 * hsdp.seconds


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_more_gpus_are_never_faster_each(strategy: str) -> None:
    times = [step(strategy=strategy, world_size=8 * n, nodes=n, micro_size=4).seconds for n in (1, 8, 128)]
    assert times == sorted(times)


def test_without_overlap_all_parts_add_up() -> None:
    slow = Rates(name="CPU", flops=1e9, launch_s=1e-3, tail_s={}, overlaps=False)
    time = simulate(work(), layout(strategy="fsdp", world_size=2), slow, FABRIC, nodes=1, accumulation=1)
    assert seconds(time, "waiting for links") > 0 and seconds(time, "waiting for the host") > 0
