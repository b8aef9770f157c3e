"""What of a run can be seen from outside at one moment: rows, events, checkpoints, half-written saves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decompft.launcher.checkpoints import list_checkpoints, step_of
from decompft.launcher.json_lines import read_lines
from decompft.launcher.runs import RunDir

HALF_WRITTEN = ".tmp-step-*"  # what a save is called before it is renamed into place
Row = dict[str, Any]  # a line of metrics.jsonl or events.jsonl; its keys are in docs/runs.md


@dataclass(frozen=True, kw_only=True)
class Look:
    """One moment of a run directory."""

    has_plan: bool  # plan.json is written: the launch prepares, or has done so
    incarnation: int  # the newest; 0 before the first
    step: int  # of the last row of metrics.jsonl; 0 without one
    events: tuple[Row, ...]  # of the newest incarnation
    saved: tuple[int, ...]  # steps of whole checkpoints, oldest first
    saving: tuple[Path, ...]  # saves that are not renamed yet

    def has_event(self, name: str, step: int | None = None) -> bool:
        """Whether the newest incarnation has said so, at this step if one is given."""
        return any(e["event"] == name and step in (None, e.get("step")) for e in self.events)


def look(run: RunDir) -> Look:
    """Look now; files may be in the middle of being written."""
    incarnation = run.newest_incarnation()
    events = [e for e in _rows(run.events_path) if e.get("incarnation") == incarnation]
    whole = [folder for folder in list_checkpoints(run.checkpoints_dir) if (folder / "COMPLETE").is_file()]
    return Look(
        has_plan=run.plan_path.is_file(),
        incarnation=incarnation,
        step=max(steps(run), default=0),
        events=tuple(e for e in events if "event" in e),
        saved=tuple(step_of(folder) for folder in whole),
        saving=tuple(run.checkpoints_dir.glob(HALF_WRITTEN)),
    )


def steps(run: RunDir) -> dict[int, Row]:
    """The rows of metrics.jsonl by their step."""
    return {int(row["step"]): row for row in _rows(run.metrics_path) if "step" in row}


def began_at(run: RunDir, incarnation: int) -> int:
    """The step that an incarnation went on from, as its start says; 0 from the beginning."""
    for event in _rows(run.events_path):
        if event.get("event") == "start" and event.get("incarnation") == incarnation:
            checkpoint = event.get("checkpoint")
            return step_of(Path(checkpoint)) if checkpoint else 0
    return 0


def _rows(path: Path) -> list[Row]:
    """Without a line that is cut off: it is being written, or its writer was killed."""
    return [row for row in read_lines(path) if row is not None]
