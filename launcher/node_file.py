"""What does a node say of itself before training? incarnations/N/nodes/NODE.json.

The check on the node writes it (worker/tools/node_check.py), the control plane reads it (node_report.py). A file holds
what the node can know alone; what only a comparison of nodes shows is node_compare.py's.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from decompft.launcher.outcome import write_atomic

Severity = Literal["bad", "user", "warn"]  # leave this node out; the input is wrong; worth a line
FOLDER = "nodes"  # of an incarnation
PHASE_DONE = "done"
PHASE_TORCH = "loading torch"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that is wrong on a node."""

    kind: str  # what it is about: gpu, gpu count, memory, run folder, scratch, disk, head, link, ...
    severity: Severity
    text: str
    hint: str = ""


@dataclass(frozen=True, kw_only=True)
class Link:
    """A timed all-reduce with one other node."""

    peer: str
    mb_per_s: float  # 10**6 bytes of the buffer a second; 0.0 when it failed
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class NodeFile:
    """One node's facts and problems."""

    node: str  # Slurm's name for it
    node_id: int
    phase: str  # PHASE_DONE, or what it was doing when it wrote this
    took_s: float
    device: str  # cuda or cpu
    gpus: tuple[str, ...] = ()  # names of the visible ones
    memory_free_bytes: int | None = None
    file_system: str = ""  # of the run folder: type and source
    run_dir_free_bytes: int | None = None
    versions: dict[str, str]  # python, torch, transformers, code
    reached_head: bool | None = None  # None: there was no need, or no time, to try
    sees_head: bool | None = None  # the head's token in the run folder
    clock_ahead_s: float | None = None  # of this node's clock over the head's
    clock_error_s: float = 0.0  # how far that may be off
    links: tuple[Link, ...] = ()
    problems: tuple[Problem, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    def write(self, folder: Path) -> None:
        """Write NODE.json into `folder`."""
        write_atomic(folder / file_name(self.node), self.to_json())

    @classmethod
    def from_json(cls, text: str | bytes) -> NodeFile:
        """Raises ValueError, KeyError or TypeError for anything that is not such a file."""
        row: dict[str, Any] = json.loads(text)
        known = {field.name for field in fields(cls)}
        row = {key: value for key, value in row.items() if key in known}
        row["links"] = tuple(Link(**link) for link in row["links"])
        row["problems"] = tuple(Problem(**problem) for problem in row["problems"])
        row["gpus"] = tuple(row["gpus"])
        return cls(**row)


def nodes_dir(incarnation_dir: Path) -> Path:
    """Where the nodes of an incarnation leave their files."""
    return incarnation_dir / FOLDER


def file_name(node: str) -> str:
    """A node's file; a name from the environment may hold anything."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", node).lstrip(".") + ".json"
