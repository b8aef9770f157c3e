"""What did the ranks of a run write, and which of them failed first?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from decompft.launcher.ending import words
from decompft.launcher.errors import UserError
from decompft.launcher.failure import find_failure, log_tail, tail
from decompft.launcher.outcome import Outcome
from decompft.launcher.report_data import Incarnation, checked_outcome, find_incarnations, read_events
from decompft.launcher.runs import RunDir
from decompft.launcher.say import Say
from decompft.slurm.glance import glance
from decompft.slurm.run_files import read_start
from decompft.slurm.watch import Status, script_log, status_of

EVERY, LAUNCHER = "all", "launcher"  # what --rank takes beside a number

_POLL_S = 0.3
_ASK_S = 10.0  # between two questions to Slurm; its administrators ask for few
_AROUND = 10  # lines shown before and after the one that says what went wrong
_CHUNK = 1 << 20


def show(path: Path, *, incarnation: int | None, rank: str, say: Say) -> None:
    """Print logs as they are now.

    Args:
        incarnation: default the newest.
        rank: a number, `all` (each line with its rank before it) or `launcher` (srun, torchrun and their complaints).

    Raises:
        UserError: there is no such incarnation, or none of its logs.
    """
    run = RunDir.open(path)
    number = run.newest_incarnation() if incarnation is None else incarnation
    files = _files(run, number, rank)
    if not files and rank == "0":
        files = _before_ranks(run, number, incarnation)
    if not run.incarnation_dir(number).is_dir() and not files:
        raise UserError(
            f"{run.path}: no incarnation {incarnation}"
            if incarnation
            else f"{run.path}: no rank was started yet",
            f"there are 1 to {run.newest_incarnation()}"
            if incarnation
            else f"`decompft status {path}` says why",
        )
    if not files:
        raise UserError(
            f"{run.log_dir(number)}: no log of rank {rank}"
            if rank != EVERY
            else f"{run.log_dir(number)}: no logs",
            f"`decompft status {path}` says how far it came",
        )
    for prefix, file in files.items():
        reader = _Reader(file, prefix)
        reader.pour(say)
        reader.finish(say)


def follow(path: Path, *, rank: str, say: Say, tell: Say) -> Status:
    """Print logs as they grow, over all incarnations that come, until the run ends.

    Args:
        tell: for what is not in a log: a new incarnation, what the job waits for, the end.
    """
    run = RunDir.open(path)
    number, readers = run.newest_incarnation(), dict[Path, _Reader]()
    asked_s, told = float("-inf"), ""
    if number:
        tell(_announce(run, number))
    while True:
        for prefix, file in _files(run, number, rank).items():
            readers.setdefault(file, _Reader(file, prefix)).pour(say)
        newest = run.newest_incarnation()
        if newest > number:
            _finish(readers, say)
            number = newest
            tell(_announce(run, number))
            continue
        has_outcome = number > 0 and checked_outcome(run.incarnation_dir(number)) is not None
        if time.monotonic() - asked_s > (_ASK_S / 5 if has_outcome else _ASK_S):
            status = status_of(path)
            asked_s = time.monotonic()
            if not status.is_live and run.newest_incarnation() == number:
                _finish(readers, say)
                return status
            waits = status.job.reason if status.job is not None and status.state == "queued" else ""
            if waits and waits != told and status.job is not None:
                tell(f"job {status.job.job_id}: {status.words}")
            told = waits
        time.sleep(_POLL_S)


def first_error(path: Path, *, incarnation: int | None, say: Say) -> Outcome | None:
    """Print who failed first, why, and the lines that say so; None when no incarnation has failed.

    Args:
        incarnation: default the newest that failed.
    """
    run = RunDir.open(path)
    found = _failed(run, incarnation)
    if found is None:
        which = f"incarnation {incarnation}" if incarnation else "no incarnation"
        say(f"{path}: {which} has {'not ' if incarnation else ''}failed")
        return None
    this, outcome = found
    start = read_start(run.incarnation_dir(this.number))
    of_job = f" (job {start.job_id} on {', '.join(start.nodes)})" if start else ""
    say(f"incarnation {this.number}{of_job}")
    for line in words(outcome):
        say(line)
    said = this.ranks.get(outcome.rank) if outcome.rank is not None else None
    if said is not None and said.traceback:
        say(f"traceback of rank {outcome.rank}:")
        for line in said.traceback.rstrip().splitlines():
            say(f"    | {line}")
    log, lines = log_tail(run, this.number, outcome.rank, 2 * _AROUND)
    if outcome.evidence:
        lines = _around(log, outcome.evidence) or lines
    if lines:
        say(f"from {log}:")
        for line in lines:
            say(f"    | {line}")
    return outcome


@dataclass
class _Reader:
    """A growing file, given out line by line."""

    path: Path
    prefix: str
    offset: int = 0
    rest: bytes = field(default=b"")  # a line that is not whole yet

    def pour(self, say: Say) -> None:
        """Say what has come since the last time."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                while chunk := file.read(_CHUNK):
                    self.offset += len(chunk)
                    *whole, self.rest = (self.rest + chunk).split(b"\n")
                    for line in whole:
                        self._say(line, say)
        except OSError:
            return  # not there yet

    def finish(self, say: Say) -> None:
        """Say what never became a whole line."""
        if self.rest:
            self._say(self.rest, say)
        self.rest = b""

    def _say(self, line: bytes, say: Say) -> None:
        say(self.prefix + line.decode("utf-8", errors="replace"))


def _finish(readers: dict[Path, _Reader], say: Say) -> None:
    for reader in readers.values():
        reader.pour(say)
        reader.finish(say)
    readers.clear()


def _files(run: RunDir, number: int, rank: str) -> dict[str, Path]:
    """The log files that are there, by the prefix of their lines."""
    if rank == LAUNCHER:
        chosen = {"": run.launcher_log(number)}
    elif rank == EVERY:
        chosen = dict(_every(run, number))
    else:
        chosen = {"": run.rank_log(number, int(rank))}
    return {prefix: path for prefix, path in chosen.items() if path.is_file()}


def _every(run: RunDir, number: int) -> Iterator[tuple[str, Path]]:
    yield "launcher: ", run.launcher_log(number)
    names = [path.stem.removeprefix("rank-") for path in run.log_dir(number).glob("rank-*.log")]
    ranks = sorted(int(name) for name in names if name.isdecimal())
    width = len(str(max(ranks, default=0)))
    for rank in ranks:
        yield f"rank {rank:>{width}}: ", run.rank_log(number, rank)


def _before_ranks(run: RunDir, number: int, asked: int | None) -> dict[str, Path]:
    """Where the reason stands when no rank came up: the launcher's log, else the job script's own."""
    if run.launcher_log(number).is_file():
        return {"": run.launcher_log(number)}
    log = script_log(glance(run.path), None) if asked is None else None
    return {} if log is None else {"": log}


def _announce(run: RunDir, number: int) -> str:
    start = read_start(run.incarnation_dir(number))
    where = f", job {start.job_id} on {', '.join(start.nodes)}" if start else ""
    events = read_events(run.events_path)
    began = [i.from_step for i in find_incarnations(run, events) if i.number == number]
    return f"--- incarnation {number}{where}, from step {began[0] if began else 0:,} ---"


def _failed(run: RunDir, number: int | None) -> tuple[Incarnation, Outcome] | None:
    """The newest incarnation that failed, or the one asked for if it did."""
    events = read_events(run.events_path)
    for this in reversed(find_incarnations(run, events)):
        if number not in (None, this.number):
            continue
        if this.outcome is not None and this.outcome.result in ("failed", "user_error"):
            return this, this.outcome
        if this.outcome is None and this.ranks:
            # its launcher is gone without a word, or still waits for the others
            return this, find_failure(run, this.number, 1)
    return None


def _around(log: Path, evidence: str) -> list[str]:
    """The lines about the one that decided about the cause."""
    lines = [line for line in tail(log).splitlines() if line.strip()]
    needle = evidence.split(" ...")[0][:80]
    places = [i for i, line in enumerate(lines) if needle in line]
    if not places:
        return []
    return lines[max(0, places[-1] - _AROUND) : places[-1] + _AROUND + 1]
