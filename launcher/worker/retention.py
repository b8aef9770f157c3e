"""Which checkpoints stay when a new one is in place?"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decompft.launcher.checkpoints import FORMAT_VERSION, SUSPECT_REASON, list_checkpoints, step_of
from decompft.launcher.runs import RunDir

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Retention:
    """A checkpoint stays if any of the three wants it."""

    newest: int = 3  # so many, the new one included
    best: int = 0  # so many with the lowest evaluation loss
    every_hours: float | None = None  # one for each such span of time, for good


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What the choice is made of."""

    step: int
    time_s: float  # epoch seconds, when it was written
    eval_loss: float | None  # of this very step
    is_suspect: bool = False  # the loss after it was not finite


def choose(found: Sequence[Kept], rule: Retention) -> set[int]:
    """The steps that stay, of checkpoints oldest first; the last always does, suspect ones before it never."""
    keep = {k.step for k in found[-1:]}
    found = [k for k in found if not k.is_suspect]
    keep |= {k.step for k in found[-rule.newest :]}
    judged = sorted((k for k in found if k.eval_loss is not None), key=lambda k: (k.eval_loss, k.step))
    keep |= {k.step for k in judged[: rule.best]}
    if rule.every_hours is not None:
        last_s = float("-inf")
        for k in found:
            if k.time_s - last_s >= 3600 * rule.every_hours:
                keep.add(k.step)
                last_s = k.time_s
    return keep


def rotate(new: Path, rule: Retention, incarnation: int) -> None:
    """Delete what no longer stays; `new`, just verified, is the newest. Damaged ones count for nothing."""
    found: list[Kept] = []
    damaged: list[Path] = []
    folders = list_checkpoints(new.parent)
    # asked after the list was made, so that nothing of a newer incarnation's is in a list that is gone through
    if RunDir(new.parent.parent).newest_incarnation() > incarnation:
        return  # a rank that was frozen since its rename: the run goes on elsewhere, and what is here is its matter
    for folder in folders:
        if step_of(folder) > step_of(new):
            # The run was resumed from before it: it must not pass for the newest, but it is the user's.
            aside = folder.with_name(f"abandoned-{folder.name}-inc{incarnation}")
            with suppress(OSError):  # the new checkpoint is in place all the same
                folder.rename(aside)
                logger.warning("%s is later than this run's step; set aside as %s", folder.name, aside.name)
            continue
        try:
            kept = _read(folder)
        except OSError:  # a medium that fails for a moment is no reason to delete
            continue
        if kept is None:
            damaged.append(folder)
        elif kept.step >= 0:
            found.append(kept)
    stays = choose(found, rule)
    doomed = [new.with_name(f"step-{k.step:08d}") for k in found if k.step not in stays]
    for folder in (*damaged, *doomed):
        if folder == new:
            continue
        aside = folder.with_name(f".tmp-deleted-{folder.name}")  # never a half-deleted step-*
        with suppress(OSError):  # e.g. a reader on NFS; the new one is safe, the next save tries again
            folder.rename(aside)
            shutil.rmtree(aside)


def _read(folder: Path) -> Kept | None:
    """None unless every file is there in its full size: cheap enough for each save.

    Raises:
        OSError: it cannot be told now.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
        if manifest["version"] > FORMAT_VERSION:  # a newer decompft's, which only that may judge
            return Kept(step=-1, time_s=0.0, eval_loss=None)
        files = manifest["files"]
        if not files:
            return None
        whole = all((folder / name).stat().st_size == record["size"] for name, record in files.items())
        if not (whole and (folder / "COMPLETE").exists()):
            return None
        loss = manifest.get("eval_loss")
        return Kept(
            step=step_of(folder),
            time_s=float(manifest.get("time_s") or (folder / "COMPLETE").stat().st_mtime),
            eval_loss=None if loss is None else float(loss),
            is_suspect=manifest.get("reason") == SUSPECT_REASON,
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
