"""Which checkpoints stay: the newest, the best, one every so many hours, and never none."""

from __future__ import annotations

import pytest

from decompft.launcher.worker.retention import Kept, Retention, choose

HOUR = 3600.0


def saves(losses: list[float | None], hours: float = 1.0) -> list[Kept]:
    return [Kept(step=10 * (i + 1), time_s=i * hours * HOUR, eval_loss=loss) for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("rule", "stay"),
    [
        (Retention(newest=1), {60}),
        (Retention(newest=3), {40, 50, 60}),
        (Retention(newest=1, best=1), {20, 60}),
        # of equal losses the earlier one; what was not evaluated is never best
        (Retention(newest=1, best=2), {20, 40, 60}),
        (Retention(newest=1, best=9), {10, 20, 40, 50, 60}),
        (Retention(newest=1, every_hours=2.0), {10, 30, 50, 60}),
        (Retention(newest=2, best=1, every_hours=100.0), {10, 20, 50, 60}),
    ],
)
def test_what_stays(rule: Retention, stay: set[int]) -> None:
    assert choose(saves([3.0, 1.0, None, 2.0, 2.0, 5.0]), rule) == stay


def test_the_last_one_always_stays() -> None:
    for newest in (1, 2, 5):
        for losses in ([1.0], [1.0, 2.0, 3.0], [None, None]):
            found = saves(losses)
            assert found[-1].step in choose(found, Retention(newest=newest, best=1, every_hours=0.5))


def test_spans_are_counted_from_the_last_that_was_kept_for_one() -> None:
    # every 0.9 h, one an hour: the 0th, then the first that is an hour later
    assert choose(saves([None] * 5, hours=0.9), Retention(newest=1, every_hours=1.0)) == {10, 30, 50}


def test_suspect_ones_take_no_place_and_go_when_a_newer_one_is_good() -> None:
    good = saves([3.0, 2.0, None, None])
    suspect = [Kept(step=25, time_s=good[1].time_s, eval_loss=0.1, is_suspect=True)]
    found = [*good[:2], *suspect, *good[2:]]
    for rule in (Retention(newest=3), Retention(newest=1, best=1), Retention(newest=1, every_hours=1.0)):
        assert choose(found, rule) == choose(good, rule)
    # as far as any rule goes the newest stays whatever it is, and beside it what is good
    assert choose([*good[:2], *suspect], Retention(newest=1)) == {20, 25}
