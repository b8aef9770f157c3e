"""What does a run folder say? Read without trust: the run may be alive, cut short or damaged."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decompft.launcher.checkpoints import step_of
from decompft.launcher.errors import UserError
from decompft.launcher.json_lines import read_lines
from decompft.launcher.lock_holders import lock_holders
from decompft.launcher.outcome import Outcome, read_outcome, read_ranks
from decompft.launcher.plan import Plan
from decompft.launcher.report_scale import gaps
from decompft.launcher.runs import RunDir, read_plan
from decompft.launcher.say import to_stderr

COLUMNS = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "peak_mem_bytes", "step_s", "epoch")
_LARGEST_STEP = 2**53
_LARGEST, _SMALLEST = 1e30, 1e-30  # beyond them differences and ratios overflow
_LAST_INCARNATION = 10**9
_LAST_TIME_S = 1e11  # epoch seconds: the year 5138


@dataclass(frozen=True, kw_only=True)
class Rows:
    """metrics.jsonl: each step once, as it was trained last."""

    steps: list[int]  # ascending
    columns: dict[str, list[float]]  # of COLUMNS; nan where a row has no number
    holes: list[tuple[int, int]]  # neighbouring steps between which rows are missing
    num_unreadable: int  # lines that are no row, but for one that is being written


@dataclass(frozen=True, kw_only=True)
class Event:
    """A line of events.jsonl."""

    name: str
    time_s: float
    step: int | None
    incarnation: int
    details: dict[str, Any]  # the rest of the line

    def number(self, key: str) -> float | None:
        """A detail, if it is a time or a size: a finite number, not below zero."""
        value = _float(self.details.get(key))
        return value if value >= 0 else None


@dataclass(kw_only=True)
class Incarnation:
    """One start of the run."""

    number: int
    began_s: float | None = None
    last_s: float | None = None  # of its last event
    world_size: int | None = None
    checkpoint: str = ""  # that it began from
    from_step: int = 0
    last_step: int | None = None  # the highest that an event names
    ended: bool = False  # by an `end` event
    outcome: Outcome | None = None
    ranks: dict[int, Outcome] = field(default_factory=dict)  # what failed ranks left


@dataclass(frozen=True, kw_only=True)
class Seen:
    """All that a report is made from."""

    run: RunDir
    plan: Plan
    rows: Rows
    events: list[Event]
    evals: list[tuple[int, float]]  # (step, finite loss) of the steps that the run kept
    incarnations: list[Incarnation]  # by number
    packages: dict[str, str]
    written_s: float | None  # when a rank last left any sign of life
    is_held: bool  # a living process of this machine holds the run's lock
    now_s: float

    @property
    def step(self) -> int:
        """Optimizer steps done, as far as the run has told."""
        newest = self.incarnations[-1] if self.incarnations else None
        told = [self.rows.steps[-1] if self.rows.steps else 0]
        if newest is not None:
            told += [newest.from_step, newest.last_step or 0, newest.outcome.step if newest.outcome else 0]
        return max(told)

    def events_of(self, name: str) -> list[Event]:
        return [event for event in self.events if event.name == name]


def read_run(path: Path, now_s: float) -> Seen:
    """Read a run folder; the run may be writing to it.

    Args:
        now_s: epoch seconds.

    Raises:
        UserError: it is not a run folder, or its plan is not one that this version reads.
    """
    run = RunDir(path)
    plan = _read_plan(run)
    events = read_events(run.events_path)
    return Seen(
        run=run,
        plan=plan,
        rows=_read_rows(run.metrics_path),
        events=events,
        evals=_kept_evals(events),
        incarnations=find_incarnations(run, events),
        packages=_packages(run.path / "env.json"),
        written_s=last_written(run),
        is_held=is_held(run.path / "lock"),
        now_s=now_s,
    )


def resumed_step(checkpoint: object) -> int:
    """The step in a checkpoint's path as a `start` event names it; 0 for none."""
    if not isinstance(checkpoint, str) or not checkpoint:
        return 0
    try:
        return min(step_of(Path(checkpoint)), _LARGEST_STEP)
    except ValueError:
        return 0


def _read_plan(run: RunDir) -> Plan:
    """plan.json, or where that is gone or unreadable the copy of the newest incarnation that has one."""
    try:
        plan = RunDir.open(run.path).read_plan()
    except UserError as error:
        copies = run.kept_plans()
        if not copies:
            raise
        to_stderr(f"{error.message}; its copy is used: {copies[0]}")
        plan = read_plan(copies[0])
    forecast = plan.forecast
    sizes = [*(term.num_bytes for term in forecast.terms), forecast.capacity_bytes or 0, plan.num_base_params]
    if not all(0 <= size < _LARGEST for size in sizes):
        raise UserError(f"{run.plan_path}: sizes that no run can have", "name a folder that launch made")
    return plan


def _read_rows(path: Path) -> Rows:
    steps: list[int] = []
    table: list[tuple[float, ...]] = []
    num_unreadable = 0
    for row in read_lines(path):
        step = None if row is None else _whole(row.get("step"))
        if row is None or step is None:
            num_unreadable += 1
            continue
        # a resumed run trains the steps after its checkpoint again: what it writes now is what counts
        while steps and steps[-1] >= step:
            steps.pop()
            table.pop()
        steps.append(step)
        table.append(tuple(_float(row.get(name)) for name in COLUMNS))
    columns = {name: [values[i] for values in table] for i, name in enumerate(COLUMNS)}
    return Rows(steps=steps, columns=columns, holes=gaps(steps), num_unreadable=num_unreadable)


def read_events(path: Path) -> list[Event]:
    """The lines of events.jsonl that are events; each belongs to an incarnation, told or not."""
    events: list[Event] = []
    current = 1
    for row in read_lines(path):
        if row is None:
            continue
        name, time_s = row.pop("event", None), _float(row.pop("time_s", None))
        if not isinstance(name, str) or not 0 <= time_s < _LAST_TIME_S:
            continue
        told = _whole(row.pop("incarnation", None))
        if name == "start" and told is not None:
            current = told
        step = _whole(row.pop("step", None))
        incarnation = current if told is None else told
        events.append(Event(name=name, time_s=time_s, step=step, incarnation=incarnation, details=row))
    return events


def _kept_evals(events: list[Event]) -> list[tuple[int, float]]:
    kept: list[tuple[int, float]] = []
    for event in events:
        if event.name == "start":
            begin = resumed_step(event.details.get("checkpoint"))
            kept = [(step, loss) for step, loss in kept if step <= begin]
        elif event.name == "eval" and event.step is not None:
            while kept and kept[-1][0] >= event.step:
                kept.pop()
            kept.append((event.step, _float(event.details.get("loss"))))
    return [(step, loss) for step, loss in kept if math.isfinite(loss)]


def find_incarnations(run: RunDir, events: list[Event]) -> list[Incarnation]:
    """By number, from the events and the folders that are there."""
    found: dict[int, Incarnation] = {}
    for event in events:
        if event.name in ("submit", "requeue"):
            continue  # of a job in the queue, between two starts
        this = found.setdefault(event.incarnation, Incarnation(number=event.incarnation))
        this.last_s = event.time_s if this.last_s is None else max(this.last_s, event.time_s)
        if event.name == "start":
            this.began_s = event.time_s
            this.world_size = _whole(event.details.get("world_size"))
            told = event.details.get("checkpoint")
            this.checkpoint = told if isinstance(told, str) else ""
            this.from_step = resumed_step(told)
        if event.step is not None:
            this.last_step = max(event.step, this.last_step or 0)
        this.ended = this.ended or event.name == "end"
    for number in run.incarnations():
        if number < _LAST_INCARNATION:
            found.setdefault(number, Incarnation(number=number))
    for number, this in found.items():
        this.outcome = checked_outcome(run.incarnation_dir(number))
        this.ranks = _ranks(run.incarnation_dir(number))
    return [found[number] for number in sorted(found)]


def checked_outcome(folder: Path) -> Outcome | None:
    """The outcome in an incarnation's folder; None without one, or when it is damaged."""
    try:
        return _checked(read_outcome(folder))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None  # damaged: the run has said nothing that can be used


def _ranks(folder: Path) -> dict[int, Outcome]:
    try:
        read = read_ranks(folder)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
    checked = {rank: _checked(told) for rank, told in read.items()}
    return {rank: told for rank, told in checked.items() if told is not None}


def _checked(told: Outcome | None) -> Outcome | None:
    """None for an outcome whose numbers are no numbers; its texts are escaped where they are shown."""
    if told is None or _whole(told.step) is None or (told.rank is not None and _whole(told.rank) is None):
        return None
    return told


def _packages(path: Path) -> dict[str, str]:
    try:
        packages = json.loads(path.read_text(encoding="utf-8"))["packages"]
        return {str(name): str(version) for name, version in packages.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _float(value: object) -> float:
    """nan for what is no number, or none that a plot can be made of."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST < value < _LARGEST:
        return math.nan
    return float(value) if abs(value) > _SMALLEST or value == 0 else 0.0


def _whole(value: object) -> int | None:
    is_step = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_STEP
    return value if is_step else None  # type: ignore[return-value]  # is_step has narrowed it


def last_written(run: RunDir) -> float | None:
    """When a rank of the run last wrote a row, an event, a log line or a sign of life."""
    newest = run.newest_incarnation()
    signs = [run.metrics_path, run.events_path]
    signs += [*run.incarnation_dir(newest).glob("*"), *run.log_dir(newest).glob("*")]
    times = [path.stat().st_mtime for path in signs if path.is_file()]
    return max(times, default=None)


def is_held(lock: Path) -> bool:
    """Whether a living process of this machine holds the lock."""
    return bool(lock_holders(lock))
