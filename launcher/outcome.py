"""How an incarnation of a run ended, in a small file that survives torchrun and srun.

torchrun turns every rank's exit code into 1 and srun masks codes, so ranks write what they have
to say and the launcher reads it: `outcome.json` once per incarnation, `rank-K.json` from a rank
that failed.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from decompft.launcher.errors import EXIT_AGAIN, EXIT_DONE, EXIT_FAILED, EXIT_USER

Result = Literal["finished", "checkpointed", "failed", "user_error"]

EXIT_CODES: dict[Result, int] = {
    "finished": EXIT_DONE,
    "checkpointed": EXIT_AGAIN,
    "failed": EXIT_FAILED,
    "user_error": EXIT_USER,
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The last word of a rank or of a whole incarnation."""

    result: Result
    step: int = 0  # optimizer steps done when it ended
    message: str = ""
    hint: str = ""
    rank: int | None = None  # the rank at fault, if one is
    node: str = ""  # its host name
    cause: str = ""  # a kind of launcher/causes.py; "" unless it failed, or while nobody has looked
    meaning: str = ""  # of that cause, in words
    evidence: str = ""  # the line or the exit code that decided about the cause
    time_s: float | None = None  # epoch seconds; rank-K.json only
    traceback: str = ""  # rank-K.json only

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.result]


def write_outcome(incarnation_dir: Path, outcome: Outcome) -> None:
    """Write `outcome.json`: rank 0 when the run ends in order, else the launcher."""
    _write(incarnation_dir / "outcome.json", outcome)


def write_rank(incarnation_dir: Path, rank: int, outcome: Outcome) -> None:
    """Write `rank-K.json`: what rank K knows of its own failure."""
    _write(incarnation_dir / f"rank-{rank}.json", outcome)


def read_outcome(incarnation_dir: Path) -> Outcome | None:
    """The incarnation's outcome, or None while it has none."""
    path = incarnation_dir / "outcome.json"
    return _read(path) if path.is_file() else None


def read_ranks(incarnation_dir: Path) -> dict[int, Outcome]:
    """The outcomes that failed ranks left, by rank."""
    found = {}
    for path in incarnation_dir.glob("rank-*.json"):
        number = path.stem.removeprefix("rank-")
        if number.isdigit():
            found[int(number)] = _read(path)
    return dict(sorted(found.items()))


def write_atomic(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a crash, sees the old text or the new one, never half."""
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temp.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
    except OSError:
        temp.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


def _write(path: Path, outcome: Outcome) -> None:
    rows = {key: value for key, value in asdict(outcome).items() if key not in _IF_KNOWN or value}
    write_atomic(path, json.dumps(rows, indent=2, sort_keys=True) + "\n")


def _read(path: Path) -> Outcome:
    row = json.loads(path.read_text(encoding="utf-8"))
    known = {f.name for f in fields(Outcome)}
    outcome = Outcome(**{key: value for key, value in row.items() if key in known})
    if outcome.result not in get_args(Result):
        raise ValueError(f"{path}: unknown result {outcome.result!r}")
    return outcome


_IF_KNOWN = ("node", "cause", "meaning", "evidence", "time_s", "traceback")
