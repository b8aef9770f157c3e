"""Saves beside training: the loop pauses for a copy, a thread of each rank writes it.

All ranks begin a save at the same step and never two at once: when one is slower than the interval between two, the
loop waits for it (back-pressure). A save that failed on some rank ends the run on all of them, at the step where they
next agree.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from decompft.launcher.checkpoint_survey import size_of
from decompft.launcher.checkpoints import SUSPECT_REASON
from decompft.launcher.errors import RunFailed
from decompft.launcher.runs import RunDir
from decompft.launcher.worker.checkpoint import Slice, save
from decompft.launcher.worker.engines.base import Engine
from decompft.launcher.worker.meeting import AnotherRankFailed, Patience
from decompft.launcher.worker.pulse import Pulse
from decompft.launcher.worker.retention import Retention
from decompft.launcher.worker.snapshot import Snapshot, Snapshots

_JOIN_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Held:
    """A rank's training state between two steps."""

    step: int
    slices: Iterable[Slice]  # live: what training goes on to change
    state: Mapping[str, Any]  # JSON, see checkpoint.save
    eval_loss: float | None  # of this very step


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that is in place."""

    step: int
    path: Path
    reason: str
    stall_s: float  # for which training stood still, waiting for the save before included
    save_s: float  # from its first byte to its rename
    bytes: int  # of the whole folder, all ranks' files; only rank 0, which tells it, looks


class Saver:
    """One for each rank; `begin`, `check` and `finish` are called by all ranks at the same step.

    Args:
        held: the state of now, on the thread that asks.
        saved_step: of the run's checkpoint that was resumed from.
    """

    def __init__(
        self,
        run: RunDir,
        engine: Engine,
        held: Callable[[bool], Held],
        pulse: Pulse,
        *,
        incarnation: int,
        retention: Retention,
        adapter_json: Mapping[str, Any],
        saved_step: int | None,
    ) -> None:
        self._run, self._engine, self._held, self._incarnation = run, engine, held, incarnation
        self._pulse = pulse
        self._retention, self._adapter_json = retention, adapter_json
        self._snapshots = Snapshots(engine.device)
        self._thread: threading.Thread | None = None
        self._called_off = threading.Event()
        self._is_given_up = False
        self._failure: RunFailed | None = None
        self._done: list[Saved] = []
        self.begun = saved_step  # the newest save's step, in place or under way
        self._in_place = saved_step
        self._settled = torch.cuda.Event() if engine.device.type == "cuda" else None

    @property
    def failed(self) -> bool:
        """Whether a save of this rank failed, not one that was called off; the others learn it where all agree."""
        return self._failure is not None

    @property
    def writing(self) -> bool:
        """Whether this rank still writes; asked before `failed`, which is then final where this is not."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, step: int, reason: str) -> None:
        """Copy this rank's slices and write them in the background, unless this step's were already.

        What was saved before is written again where it has become suspect: its manifest must say so.

        Raises:
            RunFailed: the save before failed.
        """
        if step == self.begun and reason != SUSPECT_REASON:
            return
        self._pulse.at("saving")
        began = time.perf_counter()
        self.finish()
        held = self._held(False)
        snapshot = self._snapshots.take(held.slices)
        stall_s = time.perf_counter() - began
        self._thread = threading.Thread(
            target=self._write, args=(held, snapshot, reason, stall_s), name="save", daemon=True
        )
        self._thread.start()
        self.begun = step

    def check(self, any_failed: bool, any_writing: bool) -> None:
        """What all ranks know of each other's saves: end the run where one failed, forget those that are done.

        Raises:
            RunFailed: some rank's save failed.
        """
        if not any_failed:
            if not any_writing:
                self._thread = None
            return
        self._called_off.set()
        if self._thread is not None:
            self._thread.join()
        if self._failure is None:
            self._failure = AnotherRankFailed("not saved, because another rank could not write its part")
        raise self._failure

    def finish(self) -> None:
        """Wait until the save that is under way is in place, on every rank.

        Raises:
            RunFailed: it failed.
        """
        while self._thread is not None:
            self._pulse.at("saving")
            self._thread.join(_JOIN_S)
            writing, failed = self._engine.sum_ranks([float(self.writing), float(self.failed)])
            self.check(failed > 0, writing > 0)

    def news(self) -> list[Saved]:
        """What was saved since the last call."""
        found, self._done = self._done, []
        return found

    def settle(self) -> None:
        """Note that a step was handed to the device: `write` waits for no more than that."""
        if self._settled is not None:
            self._settled.record()

    def saved_step(self, wait_s: float) -> int | None:
        """The step of the newest checkpoint in place; a save under way has so long to end. Any thread."""
        thread = self._thread
        if thread is not None:
            thread.join(wait_s)
        return self._in_place

    def call_off(self, wait_s: float) -> None:
        """Give up the save under way, for one that takes its place. Any thread."""
        self._is_given_up = True
        self._called_off.set()
        if self._thread is not None:
            self._thread.join(wait_s)

    def write(self, patience: Patience, tag: str, leader: int) -> Path:
        """This rank's part of a save of now, on the calling thread; nothing changes the state meanwhile.

        Args:
            leader: the rank that commits: 0 unless it is gone.

        Raises:
            RunFailed: it is not complete.
        """
        held = self._held(leader == self._engine.rank != 0)
        if self._settled is None:
            return self._save(held, None, "emergency", patience, tag, leader)
        # a stream of its own: on the usual one a collective may hang
        torch.cuda.set_device(self._engine.device)
        stream = torch.cuda.Stream()
        stream.wait_event(self._settled)
        with torch.cuda.stream(stream):
            return self._save(held, None, "emergency", patience, tag, leader)

    def _write(self, held: Held, snapshot: Snapshot, reason: str, stall_s: float) -> None:
        began = time.perf_counter()
        try:
            snapshot.wait()
            path = self._save(held, snapshot, reason, Patience(called_off=self._called_off.is_set))
            num_bytes = size_of(path)[0] if self._engine.rank == 0 else 0
        except RunFailed as error:
            # a rank whose main thread fails meanwhile waits for the other save all the same
            self._failure = None if self._is_given_up else error
        except Exception as error:  # a thread's error must end the run, whatever it is
            self._failure = RunFailed(f"step {held.step}: not saved: {type(error).__name__}: {error}")
        else:
            self._in_place = held.step
            saved = Saved(
                step=held.step, path=path, reason=reason, stall_s=stall_s,
                save_s=time.perf_counter() - began, bytes=num_bytes,
            )  # fmt: skip
            self._done.append(saved)

    def _save(
        self,
        held: Held,
        snapshot: Snapshot | None,
        reason: str,
        patience: Patience,
        tag: str = "",
        leader: int = 0,
    ) -> Path:
        return save(
            self._run.path, held.step, held.slices if snapshot is None else snapshot.slices, held.state,
            rank=self._engine.rank, world_size=self._engine.world_size, incarnation=self._incarnation,
            retention=self._retention, adapter_json=self._adapter_json, reason=reason,
            eval_loss=held.eval_loss, patience=patience, tag=tag, leader=leader,
        )  # fmt: skip
