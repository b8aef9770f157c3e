"""A run that stands still names the rank it waits for, with its stack; honest slow work is let alone."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import fork

from decompft.launcher.hangs import (
    Hang,
    Reading,
    find_hang,
    post_mortem,
    pulse_path,
    read_all,
    read_hang,
    slowest,
    to_json,
)
from decompft.launcher.outcome import Outcome, write_rank
from decompft.launcher.worker.pulse import Beat, Pulse
from decompft.launcher.worker.watchdog import StepTimes, Watchdog, patience

HANG_S = 1.0
IN_COLLECTIVE = (
    "train.py:9 in train: engine.reduce()",
    "/x/torch/distributed/distributed_c10d.py:3 in all_reduce: w()",
)
IN_ITEM = ("train.py:9 in train: loss_sum.item()",)
IN_READER = ("train.py:3 in train: ahead.step(7)", "records.py:5 in read: file.read()")


def at(rank: int, what: str, step: int = 7, still_s: float = 100.0, **more: Any) -> Reading:
    return Reading(rank=rank, node=f"n{rank}", what=what, step=step, still_s=still_s, **more)


# -- the decision --


@pytest.mark.parametrize(
    ("readings", "culprit"),
    [
        ([at(0, "reducing"), at(1, "data")], 1),
        ([at(0, "data"), at(1, "optimizer", step=6)], 1),  # the lowest step comes first
        ([at(0, "forward", stack=IN_COLLECTIVE), at(1, "forward", stack=IN_READER)], 1),
        # one micro batch ahead: an earlier phase, but it waits
        ([at(0, "forward", stack=IN_COLLECTIVE), at(1, "backward", stack=("k.py:1 in f: loop()",))], 1),
        ([at(0, "reducing", stack=IN_ITEM), at(1, "optimizer", stack=("adam.py:1 in f: loop()",))], 1),
        ([at(0, "data"), at(1, "reducing", is_stale=True)], 1),  # gone
        ([at(0, "data", step=6), at(1, "reducing", is_stale=True)], 0),
        ([at(0, "loading", step=0), at(1, "starting", step=-1, is_stale=True)], 1),
        ([at(0, "data", still_s=90.0), at(1, "data", still_s=100.0)], 1),
        ([at(0, "ended", step=6), at(1, "reducing")], 1),
        ([at(0, "evaluating", stack=IN_COLLECTIVE), at(1, "logging", stack=IN_READER)], 1),
    ],
)  # fmt: skip
def test_the_slowest_rank_is_the_one_furthest_behind(readings: list[Reading], culprit: int) -> None:
    assert slowest(readings).rank == culprit
    hang = find_hang(readings, 50.0)
    assert hang is not None and hang.rank == culprit and f"rank {culprit} on n{culprit}" in hang.words


def test_a_rank_that_moves_is_waited_for() -> None:
    readings = [at(0, "reducing", stack=IN_COLLECTIVE), at(1, "data", still_s=3.0)]
    assert find_hang(readings, 50.0) is None
    assert find_hang([at(0, "ended"), at(1, "ended")], 50.0) is None


def test_where_all_wait_nobody_is_blamed_alone() -> None:
    readings = [at(rank, "reducing", stack=IN_ITEM) for rank in range(2)]
    hang = find_hang(readings, 50.0)
    assert hang is not None and hang.words.startswith("every rank waits, rank 0 on n0 for 100 s in reducing")


def test_auto_patience_lets_slow_steps_and_the_first_ones_be() -> None:
    assert patience(None, 600, 1.0) is None
    assert patience(30.0, 600, None) == patience(30.0, 600, 1000.0) == 30.0
    assert patience("auto", 600, 1.0) == 480  # before the collectives give up
    assert patience("auto", 600, 60.0) == 1200
    assert patience("auto", 600, None) == 3600
    assert patience("auto", 7200, None) == 7200


def test_step_times_are_a_median_over_steps() -> None:
    times = StepTimes()
    for step, passed in ((5, 50.0), (6, 2.0), (8, 4.0), (9, 90.0), (9, 1.0), (10, 1.0)):
        times.see(Beat("data", step), passed)
    assert times.median() == 2.0
    few = StepTimes()
    few.see(Beat("data", 0), 1.0)
    few.see(Beat("data", 1), 1.0)
    assert few.median() is None


def test_a_run_that_died_of_a_timeout_is_read_afterwards(tmp_path: Path) -> None:
    assert post_mortem(tmp_path, 2) is None
    for rank, what in ((0, "reducing"), (1, "data")):
        pulse_path(tmp_path, rank).write_text(to_json(at(rank, what, still_s=5.0)))
    now = time.time()
    os.utime(pulse_path(tmp_path, 0), (now, now - 300))
    hang = post_mortem(tmp_path, 2)
    assert hang is not None and (hang.rank, hang.still_s) == (0, 305.0)
    assert "no sign of life" in hang.words


# -- the thread --


class Watched:
    """A watchdog on this process's main thread."""

    def __init__(
        self, run: Path, *, rank: int = 0, world_size: int = 1, hang_s: float | None = HANG_S
    ) -> None:
        self.folder = run / "incarnations" / "1"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pulse = Pulse()
        self.found: list[Hang] = []
        self.hung = threading.Event()
        self.said: list[str] = []
        self.watchdog = Watchdog(
            self.pulse, self.folder, rank=rank, world_size=world_size, hang_s=hang_s, timeout_s=600,
            on_hang=self._on_hang, say=self.said.append,
        )  # fmt: skip
        self.watchdog.start()

    def _on_hang(self, hang: Hang) -> None:
        self.found.append(hang)
        self.hung.set()

    def until(self, is_true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not is_true():
            assert time.monotonic() < deadline, "it never came to that"
            time.sleep(0.01)


def test_a_thread_that_stands_still_is_found_with_its_line(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.pulse.at("data", 3)
    assert watched.hung.wait(60)
    watched.watchdog.stop()
    (hang,) = watched.found
    assert (hang.rank, hang.what, hang.step) == (0, "data", 3)
    # the main thread stands in this test's wait
    assert any("test_a_thread_that_stands_still" in line and "hung.wait(60)" in line for line in hang.stack)
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["rank"], event["node"], event["stack"]) == (
        "hang",
        0,
        hang.node,
        list(hang.stack),
    )
    assert watched.said[0] == f"hang: {hang.words}" and len(watched.said) == 1 + len(hang.stack)
    assert read_hang(watched.folder) == hang
    assert hang.outcome().exit_code == 3 and hang.outcome().cause == "hang"


def test_a_thread_that_waits_for_the_reader_shows_the_readers_line(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    watched = Watched(tmp_path)

    def read_a_record() -> None:
        watched.hung.wait(60)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") as pool:
        watched.pulse.at("data", 3)
        pool.submit(read_a_record).result()
    watched.watchdog.stop()
    assert any("in read_a_record: watched.hung.wait(60)" in line for line in watched.found[0].stack)


def test_a_thread_that_moves_is_never_called_hanging(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    began = time.monotonic()
    while time.monotonic() - began < 3 * HANG_S:
        watched.pulse.at("loading")  # the same words again are a sign of life, too
        time.sleep(0.01)
    watched.watchdog.stop()
    assert not watched.found
    assert read_all(watched.folder, 1)[0].what == "ended"


def test_time_in_which_the_process_was_suspended_does_not_count(tmp_path: Path) -> None:
    def work(_: int) -> None:
        watched = Watched(tmp_path)
        (tmp_path / "pid").write_text(str(os.getpid()))
        while not (tmp_path / "end").exists():
            watched.pulse.at("data")
            time.sleep(0.01)
        assert not watched.found

    runner = threading.Thread(target=fork, args=(work, 1))
    runner.start()
    Watched.until(Watched.__new__(Watched), (tmp_path / "pid").exists)
    pid = int((tmp_path / "pid").read_text() or 0)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(3 * HANG_S)
    os.kill(pid, signal.SIGCONT)
    time.sleep(HANG_S / 4)
    (tmp_path / "end").touch()
    runner.join()
    assert not (tmp_path / "events.jsonl").exists()


def test_null_never_calls_a_hang_but_leaves_pulses(tmp_path: Path) -> None:
    watched = Watched(tmp_path, hang_s=None)
    watched.pulse.at("forward", 5)
    watched.until(lambda: pulse_path(watched.folder, 0).exists())
    watched.watchdog.stop()
    (reading,) = read_all(watched.folder, 1)
    assert reading.pid == os.getpid() and not watched.found


def test_nobody_is_blamed_while_a_failed_rank_is_waited_for(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    write_rank(watched.folder, 1, Outcome(result="failed", message="x"))
    assert not watched.hung.wait(3 * HANG_S)
    watched.watchdog.stop()


def hanging_pair(folder: Path, sleep: Callable[[], None]) -> list[dict[str, Any]]:
    """Two ranks; rank 1 sleeps in `data` for ever, rank 0 waits for it in a collective. What each was told."""

    def work(rank: int) -> None:
        store = dist.FileStore(str(folder / "store"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        watched = Watched(folder, rank=rank, world_size=2, hang_s=HANG_S)

        def leave(hang: Hang) -> None:
            (folder / f"told-{rank}").write_text(to_json(hang))
            (folder / f"told-{rank}").rename(folder / f"told-{rank}.json")
            watched.until(lambda: rank == 1 or (folder / "enough").exists() or len(told()) == 2)
            os._exit(0)

        watched.watchdog._on_hang = leave
        for step in range(3):
            watched.pulse.at("data", step)
            if rank == 1 and step == 2:
                sleep()
            watched.pulse.at("reducing")
            dist.all_reduce(torch.ones(1))

    def told() -> list[Path]:
        return sorted(folder.glob("told-*.json"))

    fork(work, 2)
    return [json.loads(path.read_text()) for path in told()]


def sleep_forever() -> None:
    time.sleep(10_000)


@pytest.mark.dist
def test_the_rank_that_sleeps_is_named_not_the_one_that_waits_for_it(tmp_path: Path) -> None:
    told = hanging_pair(tmp_path, sleep_forever)
    assert len(told) == 2, "each rank is told, so that each can save its part"
    for hang in told:
        assert (hang["rank"], hang["what"], hang["step"]) == (1, "data", 2)
        assert "in sleep_forever: time.sleep(10_000)" in hang["stack"][-1]
        assert "in sleep_forever: time.sleep(10_000)" in hang["words"]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["rank"]) for event in events] == [("hang", 1)]
    waiting = json.loads((tmp_path / "incarnations" / "1" / "pulse-0.json").read_text())
    assert (
        any("all_reduce" in line for line in waiting["stack"]) and "thread MainThread" in waiting["threads"]
    )


def hold_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(10_000)  # a C function that keeps the lock


@pytest.mark.dist
def test_a_rank_whose_interpreter_is_held_is_named_with_its_line(tmp_path: Path) -> None:
    def stop_the_other() -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        (tmp_path / "enough").touch()
        hold_the_interpreter()

    def end() -> None:
        Watched.until(Watched.__new__(Watched), (tmp_path / "told-0.json").exists)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)

    killer = threading.Thread(target=end)
    killer.start()
    with pytest.raises(AssertionError, match="SIGKILL"):
        hanging_pair(tmp_path, stop_the_other)
    killer.join()
    hang = json.loads((tmp_path / "told-0.json").read_text())
    assert hang["rank"] == 1 and "no sign of life" in hang["words"]
    assert hang["stack"][-1].endswith("in hold_the_interpreter")
