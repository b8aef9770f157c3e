"""What lies in a checkpoint folder, or in a folder of them: whole or damaged, whose, and what was left over."""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decompft.launcher.checkpoints import (
    FORMAT_VERSION,
    NAME,
    OLDEST_VERSION,
    SUSPECT_REASON,
    find_problem,
    list_checkpoints,
)
from decompft.launcher.manifest import find_oddity
from decompft.launcher.runs import RunDir
from decompft.launcher.say import Say

_LARGE_BYTES = 256 * 2**20  # hashing more takes long enough to wonder
_INCARNATION = re.compile(r"-inc(\d+)")
_OF_ANY_FORMAT = ("version", "step", "world_size", "incarnation")
_LEFTOVER = re.compile(r"(\.tmp-|\.old-|abandoned-).+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """One checkpoint folder; what an unsealed manifest would have told is None or empty."""

    path: Path
    problem: str | None  # why it cannot be trusted, in words
    version: int | None  # of the manifest's format
    step: int | None
    reason: str  # of the save; "" where it is not known
    world_size: int | None  # of the run that wrote it
    incarnation: int | None
    num_bytes: int
    num_files: int
    saved_at: float  # epoch seconds
    eval_loss: float | None  # if this very step was evaluated
    adapter: dict[str, Any]  # its adapter.json
    state: dict[str, Any]
    tensors: dict[str, Any]  # trained tensor -> kind -> {dtype, shape, parts}

    @property
    def verdict(self) -> str:
        """A word or two: whole, suspect, damaged, or of a format that this version does not read."""
        if self.problem is None:
            return "suspect" if self.reason == SUSPECT_REASON else "whole"
        is_other = self.version is not None and not OLDEST_VERSION <= self.version <= FORMAT_VERSION
        return f"format {self.version}" if is_other else "damaged"


@dataclass(frozen=True, kw_only=True, slots=True)
class Leftover:
    """What a save that was cut short, a rotation or a resume left beside the checkpoints."""

    path: Path
    num_bytes: int
    may_delete: bool
    why: str


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is, or was to become, one checkpoint; it may have been renamed."""
    is_leftover = _LEFTOVER.fullmatch(path.name) and NAME.search(path.name)
    is_named = NAME.fullmatch(path.name) or is_leftover
    return path.is_dir() and (bool(is_named) or (path / "manifest.json").exists())


def holds_checkpoints(path: Path) -> bool:
    """Whether a folder is one that checkpoints are kept in."""
    return bool(list_checkpoints(path) or _leftover_paths(path))


def survey(checkpoints_dir: Path, say: Say) -> list[Found]:
    """Every checkpoint of a folder, verified, oldest first.

    Args:
        say: takes a line before a wait.
    """
    folders = list_checkpoints(checkpoints_dir)
    found = []
    for number, folder in enumerate(folders, start=1):
        with suppress(FileNotFoundError):
            found.append(examine(folder, say, which=f" ({number} of {len(folders)})"))
    # a run that goes on may have deleted one while it was read
    return [each for each in found if each.path.is_dir()]


def examine(folder: Path, say: Say, *, which: str = "") -> Found:
    """One checkpoint; every file is hashed.

    Args:
        which: of how many, for the line that is said.
    """
    num_bytes, num_files = size_of(folder)
    marker = folder / "COMPLETE"
    marker_time = (marker if marker.exists() else folder).stat().st_mtime
    if num_bytes >= _LARGE_BYTES:
        say(f"verifying {folder.name}{which}: {size_text(num_bytes)}")
    problem = find_problem(folder)
    manifest = _sealed_manifest(folder)
    in_name = NAME.search(folder.name)
    return Found(
        path=folder,
        problem=problem,
        version=_number(manifest, "version"),
        step=_number(manifest, "step") if manifest else int(in_name[1]) if in_name else None,
        reason=str(manifest.get("reason", "")),
        world_size=_number(manifest, "world_size"),
        incarnation=_number(manifest, "incarnation"),
        num_bytes=num_bytes,
        num_files=num_files,
        saved_at=float(manifest.get("time_s") or marker_time),
        eval_loss=manifest.get("eval_loss"),
        adapter=_object(folder / "adapter.json"),
        state=manifest.get("state", {}),
        tensors=manifest.get("tensors", {}),
    )


def leftovers(checkpoints_dir: Path) -> list[Leftover]:
    """What lies beside the checkpoints, by name."""
    return [_leftover(path) for path in _leftover_paths(checkpoints_dir)]


def size_of(path: Path) -> tuple[int, int]:
    """Bytes and files under a folder, or of a file; what vanishes meanwhile does not count."""
    inside = (os.path.join(root, name) for root, _, names in os.walk(path) for name in names)
    sizes = []
    for each in inside if path.is_dir() else (path,):
        with suppress(FileNotFoundError):
            sizes.append(os.lstat(each).st_size)
    return sum(sizes), len(sizes)


def size_text(num_bytes: int) -> str:
    """In the unit that fits."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} B"


def _leftover_paths(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _LEFTOVER.fullmatch(path.name))


def _leftover(path: Path) -> Leftover:
    number = _INCARNATION.search(path.name)
    incarnation = int(number[1]) if number else None
    may_delete = True
    if path.name.startswith("abandoned-"):
        why = f"incarnation {incarnation} went on from an earlier step; nothing reads it, nothing deletes it"
    elif path.name.startswith(".tmp-deleted-"):
        why = "an older checkpoint whose deletion was cut short; the next save deletes it"
    elif path.name.startswith(".old-"):
        original = path.with_name(path.name.removeprefix(".old-"))
        may_delete = original.is_dir()
        why = (
            f"{original.name} has taken its place; the next save deletes it"
            if may_delete
            else f"it is {original.name}: replacing it was cut short; the next save puts it back"
        )
    elif incarnation is not None and not _has_ended(RunDir(path.parent.parent), incarnation):
        may_delete = False
        why = f"incarnation {incarnation} left no outcome: it may be running, and saving now"
    else:
        why = "a save that was cut short; the next save deletes it"
    return Leftover(path=path, num_bytes=size_of(path)[0], may_delete=may_delete, why=why)


def _has_ended(run: RunDir, incarnation: int) -> bool:
    """Ended itself, or a newer one has started, which may write alone."""
    has_newer = run.newest_incarnation() > incarnation
    return has_newer or (run.incarnation_dir(incarnation) / "outcome.json").exists()


def _sealed_manifest(folder: Path) -> dict[str, Any]:
    """The manifest if it is as it was written, else {}: what it says could not be relied on.

    Of another format only the version: what else it says may be said otherwise there.
    """
    try:
        content = (folder / "manifest.json").read_bytes()
        sealed = (folder / "COMPLETE").read_text(encoding="ascii").strip()
        written = json.loads(content) if sealed == hashlib.sha256(content).hexdigest() else {}
    except (OSError, ValueError):
        return {}
    if not isinstance(written, dict):
        return {}
    if written.get("version") not in range(OLDEST_VERSION, FORMAT_VERSION + 1):
        return {key: written[key] for key in _OF_ANY_FORMAT if isinstance(written.get(key), int)}
    return {} if find_oddity(written) else written


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _number(manifest: dict[str, Any], key: str) -> int | None:
    """A newer format may have moved it."""
    value = manifest.get(key)
    return value if isinstance(value, int) else None
