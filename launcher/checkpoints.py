"""Which checkpoint of a run is the newest one that can be trusted."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from contextlib import suppress
from pathlib import Path

from decompft.launcher.manifest import find_oddity

FORMAT_VERSION = 2  # of a checkpoint's manifest and of adapter.json, the newest that is read
OLDEST_VERSION = 2  # of a manifest: format 1 cut tensors at rows, which ZeRO does not

NAME = re.compile(r"step-(\d{8,})")  # of a checkpoint's folder, its step
CUT_SHORT = (
    "it has no COMPLETE file: the save was cut short"  # the problem of a folder that never was a checkpoint
)
# the reason of a save whose parameters may be what made the loss non-finite; it is in the manifest
SUSPECT_REASON = "non-finite"


def newest_valid(checkpoints_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all there and unchanged; a suspect one only where no other is.

    Every file is hashed, so this costs one read of the newest checkpoint (more only when it is damaged or suspect).

    Returns:
        The folder, or None; and one line for each newer folder that was skipped, saying why.
    """
    skipped: list[str] = []
    suspect: tuple[Path, list[str]] | None = None  # the newest, and what is newer
    for folder in reversed(list_checkpoints(checkpoints_dir)):
        problem = find_problem(folder)
        if problem is None and is_suspect(folder):
            suspect = suspect or (folder, list(skipped))
            problem = "suspect: it was saved because the next loss was not finite"
        if problem is None:
            return folder, skipped
        skipped.append(f"{folder.name}: {problem}")
    return suspect or (None, skipped)


def is_suspect(checkpoint_dir: Path) -> bool:
    """Whether it was saved because the loss after it was not finite: its own parameters may have diverged."""
    try:
        written = json.loads((checkpoint_dir / "manifest.json").read_bytes())
        return bool(written["reason"] == SUSPECT_REASON)
    except (OSError, ValueError, KeyError, TypeError):
        return False  # damaged, which find_problem says, or from before reasons were written


def list_checkpoints(checkpoints_dir: Path) -> list[Path]:
    """Folders named like checkpoints, oldest first; temporary folders have other names."""
    if not checkpoints_dir.is_dir():
        return []
    found = [p for p in checkpoints_dir.iterdir() if NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def completed_at(checkpoints_dir: Path) -> dict[str, int | None]:
    """When each checkpoint was completed, by name (ns; None: not yet); other after any save, deletion or `put_back`."""
    found: dict[str, int | None] = {}
    for folder in list_checkpoints(checkpoints_dir):
        try:
            found[folder.name] = (folder / "COMPLETE").stat().st_mtime_ns
        except OSError:
            found[folder.name] = None
    return found


def put_back(checkpoints_dir: Path) -> None:
    """Undo a replacement of a checkpoint that was cut short between its two renames: the old one is the checkpoint."""
    for aside, original in half_replaced(checkpoints_dir):
        aside.rename(original)


def half_replaced(checkpoints_dir: Path) -> list[tuple[Path, Path]]:
    """What `put_back` would rename, from and to."""
    found = checkpoints_dir.glob(".old-step-*") if checkpoints_dir.is_dir() else ()
    pairs = [(aside, checkpoints_dir / aside.name.removeprefix(".old-")) for aside in found]
    return [(aside, original) for aside, original in pairs if not original.exists()]


def has_saved(checkpoints_dir: Path) -> bool:
    """Whether any save was ever completed there, damaged since or not."""
    folders = list_checkpoints(checkpoints_dir)
    return bool(half_replaced(checkpoints_dir)) or any((folder / "COMPLETE").exists() for folder in folders)


def fence(checkpoints_dir: Path) -> None:
    """Take away what older incarnations have begun to save, so that none of it is ever put into place.

    A rank that was frozen looks no second time whether it is still wanted. Renaming first leaves it no moment in which
    half of a folder could become a checkpoint.
    """
    for begun in checkpoints_dir.glob(".tmp-step-*") if checkpoints_dir.is_dir() else ():
        aside = begun.with_name(begun.name.replace(".tmp-", ".tmp-fenced-", 1))
        with suppress(OSError):  # it has just become one, or another start has been here
            begun.rename(aside)
            shutil.rmtree(aside)


def step_of(checkpoint_dir: Path) -> int:
    """The optimizer step in a checkpoint folder's name."""
    match = NAME.fullmatch(checkpoint_dir.name)
    if match is None:
        raise ValueError(f"{checkpoint_dir}: a checkpoint folder is named step-XXXXXXXX")
    return int(match[1])


def find_problem(checkpoint_dir: Path) -> str | None:
    """Why a checkpoint cannot be trusted, in words, or None if it can."""
    try:
        return _find_problem(checkpoint_dir)
    except OSError as error:  # a medium that fails is a reason to take the one before, too
        name = Path(error.filename).name if error.filename else "a file of it"
        return f"{name} cannot be read from the disk ({error.strerror or error})"


def _find_problem(checkpoint_dir: Path) -> str | None:
    if not (checkpoint_dir / "COMPLETE").is_file():
        return CUT_SHORT
    try:
        manifest = (checkpoint_dir / "manifest.json").read_bytes()
        sealed = (checkpoint_dir / "COMPLETE").read_text(encoding="ascii").strip()
        if sealed != hashlib.sha256(manifest).hexdigest():
            return "manifest.json is damaged: its sha256 is not the one in COMPLETE"
        written = json.loads(manifest)
        if written["version"] > FORMAT_VERSION:
            return f"it was written by a newer version of decompft (format {written['version']})"
        if written["version"] < OLDEST_VERSION:
            return f"it was written by an older version of decompft (format {written['version']})"
        if odd := find_oddity(written):
            return f"manifest.json is not as decompft writes it: {odd}"
        files = written["files"]
        entries = [(name, int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()]
    except FileNotFoundError:
        return "manifest.json is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read ({type(error).__name__}: {error})"
    for name, size, sha256 in entries:
        path = checkpoint_dir / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, the manifest says {size}"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                return f"{name} is damaged: its sha256 is not the manifest's"
    return None
