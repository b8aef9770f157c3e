"""Which rank does a run wait for, by the pulses that its ranks leave in the incarnation's folder?

`pulse-K.json` is written by rank K's watchdog (launcher/worker/watchdog.py), `stack-K.txt` by the interpreter when
not even the watchdog gets to run, `hang.json` by the rank that found the culprit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from decompft.launcher.causes import HANG
from decompft.launcher.outcome import Outcome

# in the order in which a rank comes to them without an optimizer step between
PHASES = (
    "starting", "loading", "logging", "evaluating", "saving", "data", "forward", "backward", "reducing", "optimizer",
    "ending",
)  # fmt: skip
ENDED = "ended"  # its watchdog was stopped: it waits for nobody

# a collective, or a wait for what was given to the GPU, which may be one
_WAITS_IN = re.compile(r"torch/distributed/|/deepspeed/|torch/autograd/graph\.py|launcher/worker/meeting\.py")
_WAITS_FOR_DEVICE = re.compile(r"\.(item|tolist|cpu|synchronize)\(")
_NEVER = -1
_SILENT_S = 60.0  # several times what a watchdog waits between two writings


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a rank was last known to do."""

    rank: int
    node: str = ""
    pid: int = 0
    what: str = "starting"
    step: int = 0  # optimizer steps done
    still_s: float = 0.0  # since its main thread came to `what`
    stack: tuple[str, ...] = ()  # "file:line in function: code", innermost last; () unless it stands still
    count: int = 0  # grows with every writing, so that another node's clock does not matter
    is_stale: bool = False  # the file does not change any more, or was never there

    @property
    def waits(self) -> bool:
        """Whether it stands in a collective or waits for its device, as ranks do for one that is behind."""
        inner = self.stack[-1] if self.stack else ""
        return any(_WAITS_IN.search(line) for line in self.stack[-3:]) or bool(
            _WAITS_FOR_DEVICE.search(inner)
        )

    @property
    def line(self) -> str:
        """Where it stands."""
        return self.stack[-1] if self.stack else ""


@dataclass(frozen=True, kw_only=True)
class Hang:
    """A run that stands still, and the rank it waits for."""

    rank: int
    node: str
    what: str
    step: int
    still_s: float
    stack: tuple[str, ...]
    words: str

    def outcome(self) -> Outcome:
        """The last word of the incarnation."""
        return Outcome(
            result="failed", step=self.step, message=self.words, rank=self.rank, node=self.node,
            cause=HANG.kind, meaning=HANG.words, hint=HANG.hint,
            evidence=self.stack[-1] if self.stack else f"no sign of rank {self.rank} for {self.still_s:.0f} s",
        )  # fmt: skip


def slowest(readings: Sequence[Reading]) -> Reading:
    """The rank that is furthest behind: by step, then the one that is gone, that waits for nobody, by phase."""
    return min(
        readings,
        key=lambda r: (r.what == ENDED, r.step, not r.is_stale, r.waits, _place(r.what), -r.still_s, r.rank),
    )


def find_hang(readings: Sequence[Reading], limit_s: float) -> Hang | None:
    """The hang, or None while the slowest rank is at work.

    Args:
        readings: of every rank.
        limit_s: seconds without a sign of progress that are too many.
    """
    culprit = slowest(readings)
    if culprit.what == ENDED or (culprit.still_s < limit_s and not culprit.is_stale):
        return None
    return describe(culprit, readings)


def describe(culprit: Reading, readings: Sequence[Reading]) -> Hang:
    """The hang in words."""
    who = f"rank {culprit.rank}" + (f" on {culprit.node}" if culprit.node else "")
    others = len(readings) - 1
    wait = {0: "", 1: "; 1 other rank waits for it"}.get(others, f"; {others} other ranks wait for it")
    still = f"for {culprit.still_s:.0f} s in {culprit.what} after step {culprit.step}"
    if culprit.step == _NEVER:
        words = f"{who} never came up{wait}"
    elif culprit.is_stale:
        words = (
            f"{who} has given no sign of life {still}: its process was stopped or is gone, "
            f"or compiled code holds its interpreter{wait}"
        )
    elif others and culprit.waits:
        words = f"every rank waits, {who} {still}: a collective or a GPU does not finish"
    else:
        words = f"{who} has stood still {still}{wait}"
    if culprit.line:
        words += f"; it stands at {culprit.line}"
    return Hang(
        rank=culprit.rank, node=culprit.node, what=culprit.what, step=max(culprit.step, 0),
        still_s=round(culprit.still_s, 1), stack=culprit.stack, words=words,
    )  # fmt: skip


def post_mortem(folder: Path, world_size: int) -> Hang | None:
    """The hang that a run died of, when its ranks only said that they had waited for too long."""
    ages = {r: path.stat().st_mtime for r in range(world_size) if (path := pulse_path(folder, r)).is_file()}
    if not ages:
        return None
    newest = max(ages.values())
    readings = []
    for reading in read_all(folder, world_size):
        silent_s = newest - ages.get(reading.rank, newest)
        is_stale = reading.is_stale or silent_s > _SILENT_S
        readings.append(replace(reading, still_s=reading.still_s + silent_s, is_stale=is_stale))
    return describe(slowest(readings), readings)


def read_all(folder: Path, world_size: int) -> list[Reading]:
    """A reading of every rank; one without a file is stale and before the first step."""
    return [
        _read(folder, rank) or Reading(rank=rank, step=_NEVER, is_stale=True) for rank in range(world_size)
    ]


def read_written(folder: Path) -> list[Reading]:
    """A reading of every rank that has left one, for who does not know how many there are."""
    numbers = (path.stem.removeprefix("pulse-") for path in folder.glob("pulse-*.json"))
    ranks = sorted(int(number) for number in numbers if number.isdecimal())
    return [reading for rank in ranks if (reading := _read(folder, rank)) is not None]


def pulse_path(folder: Path, rank: int) -> Path:
    return folder / f"pulse-{rank}.json"


def stack_path(folder: Path, rank: int) -> Path:
    return folder / f"stack-{rank}.txt"


def hang_path(folder: Path) -> Path:
    return folder / "hang.json"


def read_stack(folder: Path, rank: int) -> tuple[str, ...]:
    """The main thread's stack out of the interpreter's own writing, innermost last; () if there is none.

    It writes the threads one by one, the main thread last, and each from the innermost frame.
    """
    try:
        text = stack_path(folder, rank).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    rows = re.findall(r'^  File "(.+)", line (\d+) in (.+)$', text.rpartition("\nThread ")[2], re.MULTILINE)
    return tuple(f"{file}:{line} in {function}" for file, line, function in reversed(rows))


def read_hang(folder: Path) -> Hang | None:
    """What a watchdog found and wrote to `hang.json`, if it did."""
    row = _load(hang_path(folder))
    return None if row is None else Hang(**row)


def to_json(record: Hang | Reading, **more: str) -> str:
    """A record as its file holds it, with `more` for people to read."""
    return json.dumps(asdict(record) | more, indent=1, sort_keys=True) + "\n"


def _read(folder: Path, rank: int) -> Reading | None:
    row = _load(pulse_path(folder, rank))
    if row is None:
        return None
    known = {f.name for f in fields(Reading)}
    return Reading(**{key: value for key, value in row.items() if key in known})


def _load(path: Path) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return row | {"stack": tuple(row["stack"])}


def _place(what: str) -> int:
    return PHASES.index(what) if what in PHASES else 0
