"""The sampler: one order whatever the ranks, every row once an epoch, weights exact."""

from __future__ import annotations

from collections import Counter

import pytest

from decompft.launcher.worker.data.sampler import Sampler, step_indices


def sampler(
    rows: list[int], weights: list[float] | None = None, *, shuffle: bool = True, epochs: float | None = None
) -> Sampler:
    return Sampler(rows, weights or [1.0] * len(rows), seed=3, shuffle=shuffle, epochs=epochs)


@pytest.mark.parametrize("world, micro", [(1, 1), (1, 4), (2, 3), (3, 2), (4, 3), (6, 2), (12, 1)])
def test_order_of_a_step_does_not_depend_on_ranks_or_micro_batch(world: int, micro: int) -> None:
    accumulation = 12 // (world * micro)
    by_rank = [
        step_indices(
            5, global_batch=12, world_size=world, rank=rank, micro_batch=micro, accumulation=accumulation
        )
        for rank in range(world)
    ]
    joined = [index for a in range(accumulation) for rank in range(world) for index in by_rank[rank][a]]
    assert joined == list(range(60, 72))


def test_every_row_exactly_once_an_epoch() -> None:
    order = sampler([7, 4])
    for epoch in range(3):
        seen = [order.row_at(epoch * 11 + i) for i in range(11)]
        assert sorted(seen) == list(range(11))


def test_epochs_differ_and_repeat_by_seed() -> None:
    order, again = sampler([50]), sampler([50])
    first = [order.row_at(i) for i in range(50)]
    second = [order.row_at(50 + i) for i in range(50)]
    assert first != second
    # asked in another order, as a resume does, the answers are the same
    assert [again.row_at(50 + i) for i in range(50)] == second
    assert [again.row_at(i) for i in range(50)] == first
    other_seed = Sampler([50], [1.0], seed=4, shuffle=True, epochs=None)
    assert [other_seed.row_at(i) for i in range(50)] != first


def test_order_is_pinned() -> None:
    # a resume on another machine must see the same order: this may never change
    assert [sampler([8]).row_at(i) for i in range(16)] == [0, 4, 7, 1, 5, 6, 3, 2, 7, 3, 5, 1, 2, 4, 6, 0]


def test_without_shuffle_rows_come_in_order() -> None:
    order = sampler([2, 3], shuffle=False)
    assert [order.row_at(i) for i in range(7)] == [0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize("shuffle", [True, False])
def test_weights_are_times_a_row_is_seen(shuffle: bool) -> None:
    order = sampler([10, 10, 10], [1.0, 2.5, 0.5], shuffle=shuffle)
    assert order.rows_per_epoch == 10 + 25 + 5
    two_epochs = Counter(order.row_at(i) for i in range(80))
    # a half is another half the next epoch: after two, each row was seen equally often
    assert [two_epochs[row] for row in range(30)] == [2] * 10 + [5] * 10 + [1] * 10


def test_a_fraction_of_epochs_ends_with_none() -> None:
    order = sampler([10], epochs=1.5)
    seen = [order.row_at(i) for i in range(20)]
    assert None not in seen[:15] and seen[15:] == [None] * 5
