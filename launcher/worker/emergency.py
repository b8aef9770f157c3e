"""The last resort: threads write the state of the last completed step when the loop of some rank cannot.

Asked for by a stop that is not obeyed in time (a rank hangs in an evaluation, or still loads), by an exception in one
rank, or by the hang watchdog. No collective is used: each rank's thread freezes its rank between two steps, says at
which step in a file of the incarnation's folder, waits for the others' word, and all write the same step. The request
is a file as well, so that any rank's thread may make it. Who is frozen stays so: the incarnation ends.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from decompft.launcher.checkpoints import step_of
from decompft.launcher.errors import RunFailed
from decompft.launcher.outcome import Outcome, write_atomic, write_outcome
from decompft.launcher.runs import RunDir
from decompft.launcher.worker.meeting import Patience
from decompft.launcher.worker.pulse import Pulse

Reason = Literal["stop", "deadline", "failed", "hang"]
TAG = "-emergency"  # of its temporary folder
REQUEST = "emergency.json"  # in the incarnation's folder: the ranks are being saved
_POLL_S, _SLOWEST_POLL_S = 0.25, 5.0
_GATHER_S = 8.0  # for the other ranks' word; who is silent is taken for dead
_CATCH_UP_S = 20.0  # for a rank that is one step behind
_WRITE_S = 120.0

logger = logging.getLogger(__name__)


class Holder(Protocol):
    """What the training loop lends: its state between two steps, and what it has saved of it."""

    begun: int | None  # the step of the newest save, in place or under way

    @property
    def failed(self) -> bool:
        """Whether a save has just failed: another one would, too."""

    def saved_step(self, wait_s: float) -> int | None:
        """The step of the newest checkpoint in place, after a save under way had so long to end."""

    def call_off(self, wait_s: float) -> None:
        """Give up the save under way."""

    def write(self, patience: Patience, tag: str, leader: int) -> Path:
        """This rank's part of a save of now, from any thread; `leader` commits it."""


@dataclass(frozen=True, kw_only=True)
class _Word:
    """What a rank says when it is asked."""

    step: int
    armed: bool  # it trains
    torn: bool  # it is in the middle of an update, or behind the others, and does not come out of it

    @property
    def trains(self) -> bool:
        """Whether its state can be saved."""
        return self.armed and not self.torn


class Emergency:
    """One for each rank, started before the model is built."""

    def __init__(
        self,
        run: RunDir,
        incarnation: int,
        *,
        rank: int,
        world_size: int,
        pulse: Pulse,
        resumed_from: Path | None,
    ) -> None:
        self._run, self._folder = run, run.incarnation_dir(incarnation)
        self._incarnation, self._rank, self._world_size = incarnation, rank, world_size
        self._stop_file = run.stop_file(incarnation)
        self._pulse, self._resumed_from = pulse, resumed_from
        # a thousand ranks look at one shared folder
        self._poll_s = min(_SLOWEST_POLL_S, max(_POLL_S, world_size / 50))
        self._start_step = 0 if resumed_from is None else step_of(resumed_from)
        self.grace_s = 60.0  # until the plan has been read
        self._holder: Holder | None = None
        self._lock = threading.Lock()
        self._is_changing = False
        self._ended = threading.Event()
        self._done = threading.Event()
        self._save_s = 0.0
        self._is_leaving = False
        self._has_failed = False  # the main thread of this rank, which takes no further step
        self._is_told_to_end = False
        self.saved: int | None = None  # the step that was written here

    def start(self) -> None:
        threading.Thread(target=self._watch, name="emergency", daemon=True).start()

    def arm(self, holder: Holder) -> None:
        """Training begins: from now on there is something to save."""
        self._holder = holder

    def disarm(self) -> None:
        """The loop is over and its last save in place."""
        self._ended.set()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around whatever changes parameters, moments or the step; an exception in it leaves them torn."""
        with self._lock:
            self._is_changing = True
            yield
            self._is_changing = False

    def stand_aside(self) -> None:
        """For a main thread that failed: where this process is leaving in order, its errors are the others leaving."""
        self._has_failed = True
        if self._is_leaving:
            threading.Event().wait(_WRITE_S)

    def outlasts_sigterm(self) -> bool:
        """Whether this rank has a state to save before it may go; it goes by itself then. For a signal's handler.

        torchrun sends SIGTERM to the survivors of a dead rank at once, and SIGKILL when its patience is over.
        """
        if self._has_failed:
            return True  # its main thread is on its way out, through `call`
        if self._ended.is_set() or not self._has_request():
            return False
        self._is_told_to_end = True
        return not self._done.is_set()

    def note_save(self, seconds: float) -> None:
        """How long a save takes here: so much earlier than the deadline it has to begin."""
        self._save_s = seconds

    def call(self, reason: Reason, words: str, *, wait_s: float = _GATHER_S + _CATCH_UP_S + _WRITE_S) -> None:
        """Have all ranks save what they can, and return when that is done; for a rank that is about to die."""
        if self._holder is None or self._ended.is_set() or self._pulse.beat.step == self._start_step:
            return
        if self._holder.failed or self._holder.saved_step(wait_s=_GATHER_S) == self._pulse.beat.step:
            return
        self._ask(reason, words)
        self._done.wait(wait_s)
        if self.saved is None:  # then what is being written is the newest that there will be
            self._holder.saved_step(wait_s=_WRITE_S)

    def _watch(self) -> None:
        asked_at: float | None = None
        while not self._ended.wait(self._poll_s):
            try:
                if (request := self._request()) is not None:
                    self._answer(request)
                    return
                if not self._stop_file.exists():
                    continue
                asked_at = asked_at or time.monotonic()
                if self._holder is None:
                    self._ask("stop", "it was asked to stop before the first step")
                elif time.monotonic() - asked_at > self._patience_s() and self._pulse.beat.what != "saving":
                    beat = self._pulse.beat
                    self._ask("deadline", f"it was asked to stop and rank {self._rank} was still {beat.what}")
            except Exception:
                logger.exception("the emergency thread of rank %d failed", self._rank)
                self._done.set()
                return

    def _patience_s(self) -> float:
        """How long the loop may take to obey: the grace less what a save needs, but half of it at least."""
        return max(self.grace_s / 2, self.grace_s - 2 * self._save_s - _GATHER_S)

    def _ask(self, reason: Reason, words: str) -> None:
        """The first request stands."""
        temp = self._folder / f".emergency-{self._rank}"
        temp.write_text(json.dumps({"reason": reason, "words": words}), encoding="utf-8")
        try:
            os.link(temp, self._folder / REQUEST)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links: the last request stands, which is as good
            temp.replace(self._folder / REQUEST)
        temp.unlink(missing_ok=True)

    def _has_request(self) -> bool:
        return REQUEST in os.listdir(self._folder)

    def _request(self) -> dict[str, str] | None:
        if not self._has_request():
            return None
        found: dict[str, str] = json.loads((self._folder / REQUEST).read_text(encoding="utf-8"))
        return found

    def _answer(self, request: dict[str, str]) -> None:
        leaves = request["reason"] in ("stop", "deadline")
        self._is_leaving = leaves
        mine = self._freeze(lambda: True)
        self._say(mine)
        words = self._gather()
        target = max((w.step for w in words.values() if w.trains), default=self._start_step)
        # a step needs all ranks: where one still loads, none was taken
        has_trained = all(w.armed for w in words.values()) and target > self._start_step
        members: frozenset[int] = frozenset()
        if has_trained:
            if not mine.torn and mine.step < target:  # it had the others' gradients, and only has to use them
                self._lock.release()
                mine = self._freeze(lambda: self._pulse.beat.step >= target)
                self._say(mine, "arrived")
            words = self._settled(words, target)
            members = frozenset(rank for rank, word in words.items() if word.trains and word.step == target)
            self._save(mine, target, members, least=min(word.step for word in words.values()))
        if leaves:
            if self._rank == min(members or words):
                self._conclude(request["words"], target, before_training=not has_trained)
            os._exit(0)
        self._done.set()
        if self._is_told_to_end and not self._has_failed:
            os._exit(128 + signal.SIGTERM)

    def _save(self, mine: _Word, target: int, members: frozenset[int], *, least: int) -> None:
        """
        Args:
            least: the step of the rank that is furthest behind.
        """
        assert self._holder is not None
        if least < (self._holder.begun or 0):  # a save under way that this rank never began
            self._holder.call_off(_GATHER_S)
        # a save under way needs all ranks, too: where one is missing, it may have done its part before
        are_all = len(members) == self._world_size
        if self._holder.saved_step(wait_s=_GATHER_S if are_all else 4 * _GATHER_S) == target:
            self.saved = target
            return
        if mine.torn or mine.step != target:
            words = "rank %d: in the middle of a step, or a step behind the others: its state cannot be saved"
            logger.error(words, self._rank)
            return
        began, leader = time.perf_counter(), min(members)
        if are_all:
            self._holder.call_off(_GATHER_S)
        try:
            path = self._holder.write(Patience(timeout_s=_WRITE_S, only=members), TAG, leader)
        except RunFailed as error:
            logger.error("emergency save: %s", error)
            return
        self.saved = target
        if self._rank == leader:
            self._run.append_event(
                "save", incarnation=self._incarnation, step=target, reason="emergency", stall_s=0.0,
                path=str(path.relative_to(self._run.path)), save_s=time.perf_counter() - began,
            )  # fmt: skip

    def _freeze(self, until: Callable[[], bool]) -> _Word:
        """Hold the rank between two steps, from now on."""
        end = time.monotonic() + _CATCH_UP_S
        while time.monotonic() < end:
            if self._has_failed and not until():  # its loop is over: it never comes to that
                break
            if until() and self._lock.acquire(timeout=_GATHER_S / 2):
                if until() and not self._is_changing:
                    return self._word(torn=False)
                self._lock.release()
                if self._is_changing:  # nobody holds the lock: an exception came out of an update
                    break
            time.sleep(0.02)
        return self._word(torn=self._holder is not None)

    def _word(self, *, torn: bool) -> _Word:
        return _Word(step=self._pulse.beat.step, armed=self._holder is not None, torn=torn)

    def _say(self, word: _Word, when: str = "frozen") -> None:
        write_atomic(self._folder / f"{when}-{self._rank}.json", json.dumps(vars(word)))

    def _gather(self) -> dict[int, _Word]:
        found: dict[int, _Word] = {}
        end = time.monotonic() + _GATHER_S + 2 * self._poll_s
        while len(found) < self._world_size and time.monotonic() < end:
            for path in self._folder.glob("frozen-*.json"):
                rank = int(path.stem.removeprefix("frozen-"))
                if rank not in found:
                    found[rank] = _Word(**json.loads(path.read_bytes()))
            time.sleep(0.02)
        return found

    def _settled(self, words: dict[int, _Word], target: int) -> dict[int, _Word]:
        """The last words, once the ranks that are behind have caught up, or said that they cannot."""
        found, end = dict(words), time.monotonic() + _CATCH_UP_S + _GATHER_S
        behind = {rank for rank, word in words.items() if word.trains and word.step < target}
        while behind and time.monotonic() < end:
            there = set(os.listdir(self._folder))
            for rank in [rank for rank in behind if f"arrived-{rank}.json" in there]:
                found[rank] = _Word(**json.loads((self._folder / f"arrived-{rank}.json").read_bytes()))
                behind.remove(rank)
            time.sleep(0.02)
        # silent ones died meanwhile
        return {rank: replace(word, torn=True) if rank in behind else word for rank, word in found.items()}

    def _conclude(self, why: str, target: int, *, before_training: bool) -> None:
        """The outcome of a stop in order; all ranks leave with 0, so that torchrun sees no failure."""
        kept = f"goes on from {self._resumed_from}" if self._resumed_from else "starts from the beginning"
        result: Literal["checkpointed", "failed"] = "checkpointed"
        if before_training:
            message = f"stopped before the first step of this start; nothing to save, a resume {kept}"
        elif self.saved is not None:
            message = f"stopped at step {self.saved}, cut short: {why}"
        else:
            result, message = "failed", f"stopped at step {target}, which could not be saved: {why}"
        step = self._start_step if before_training else target
        write_outcome(self._folder, Outcome(result=result, step=step, message=message))
