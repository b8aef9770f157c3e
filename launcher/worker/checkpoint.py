"""How is training state written so that no crash, full disk or stale job can spoil a checkpoint?

Every rank writes the rows it holds into a temp folder; rank 0 proves that the rows of all ranks cover
every tensor exactly once, reads all files back, and only then renames the folder into place.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from decompft.launcher.checkpoints import FORMAT_VERSION, list_checkpoints, step_of
from decompft.launcher.errors import AdapterError, CheckpointError, RunFailed
from decompft.launcher.worker.restore import (
    Checkpoint,
    load_adapter,
    open_checkpoint,
    tensor_key,
    verify,
)
from decompft.launcher.worker.tensorfile import (
    DTYPE_NAMES,
    DTYPES,
    Entry,
    fsync_folder,
    write_bytes,
    write_json,
    write_tensors,
)

__all__ = ["Checkpoint", "Slice", "load_adapter", "open_checkpoint", "save", "save_adapter"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """The part of one tensor that this rank is responsible for: a run of its numbers, flattened.

    Over all ranks the slices of a (name, kind) must cover the numbers exactly once: a replicated tensor
    (ddp) is given by one rank, or split. Flat, because ZeRO cuts inside rows. Scalars have shape (1,).
    """

    name: str  # of the trained parameter
    kind: str  # "param", "exp_avg", "exp_avg_sq", "step", ...
    full_shape: tuple[int, ...]
    start: int  # of the flattened tensor
    tensor: Tensor  # (numbers,), any device; may be empty; a view, copied only while written


def save(
    run_dir: Path,
    step: int,
    slices: Iterable[Slice],
    state: Mapping[str, Any],
    *,
    rank: int,
    world_size: int,
    barrier: Callable[[], None],
    all_ok: Callable[[bool], bool],
    incarnation: int,
    keep: int,
    adapter_json: Mapping[str, Any],
) -> Path:
    """Writes checkpoints/step-N; every rank calls it, and all return, or all raise.

    Args:
        state: JSON that does not depend on the mesh (schedule, data cursor, seeds); rank 0's is written.
        all_ok: all-reduce MIN over the ranks: True when every rank said True.
        keep: newest checkpoints that stay, this one included.

    Raises:
        RunFailed: some rank could not write (full disk, ...), the slices have gaps, or a newer incarnation
            of the run has started. Older checkpoints are untouched.
    """
    root = run_dir / "checkpoints"
    final = root / f"step-{step:08d}"
    temp = root / f".tmp-{final.name}-inc{incarnation}"
    head = {"version": FORMAT_VERSION, "step": step, "world_size": world_size, "incarnation": incarnation}

    def phase(work: Callable[[], None] | None) -> None:
        failure: RunFailed | None = None
        try:
            if work is not None:
                work()
        except (OSError, CheckpointError, RunFailed) as error:
            failure = _in_words(final, error)
        if not all_ok(failure is None):
            if rank == 0:
                shutil.rmtree(temp, ignore_errors=True)
            barrier()  # a rank that exits now would have rank 0 killed half-way through the removal
            raise failure or RunFailed(f"{final}: not saved, because another rank could not write its part")

    def commit() -> None:
        _write_manifest(temp, {**head, "state": dict(state)}, adapter_json)
        verify(temp)
        _refuse_stale(run_dir, incarnation)
        _move_into_place(temp, final)
        _rotate(final, keep, incarnation)

    phase(partial(_prepare, run_dir, temp, incarnation) if rank == 0 else None)
    phase(lambda: _write_slices(temp / "state", rank, list(slices)))
    phase(commit if rank == 0 else None)
    return final


def save_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    adapter_json: Mapping[str, Any],
    *,
    tokenizer: Path | None = None,
) -> None:
    """Writes adapter.safetensors and adapter.json as a new folder, replacing an old one; one rank calls it.

    Args:
        tokenizer: folder of the tokenizer that it was trained with; copied to folder/tokenizer.

    Raises:
        RunFailed: the disk is full or refuses; an old folder is untouched.
    """
    temp = folder.parent / f".tmp-{folder.name}"
    try:
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
        _write_adapter(temp, [_entry(name, tensor) for name, tensor in tensors.items()], adapter_json)
        if tokenizer is not None:
            shutil.copytree(tokenizer, temp / "tokenizer")
        fsync_folder(temp)
        load_adapter(temp)
        _move_into_place(temp, folder)
    except (OSError, AdapterError) as error:
        shutil.rmtree(temp, ignore_errors=True)
        raise _in_words(folder, error) from error


def _prepare(run_dir: Path, temp: Path, incarnation: int) -> None:
    """Clears what interrupted saves left, and makes the temp folder."""
    _refuse_stale(run_dir, incarnation)
    temp.parent.mkdir(parents=True, exist_ok=True)
    for aside in temp.parent.glob(".old-*"):
        original = temp.parent / aside.name.removeprefix(".old-")
        if original.exists():
            shutil.rmtree(aside)
        else:  # cut short between the two renames of a replacement: the old one is still the checkpoint
            aside.rename(original)
    for leftover in temp.parent.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    (temp / "state").mkdir(parents=True)


def _refuse_stale(run_dir: Path, incarnation: int) -> None:
    numbers = [int(p.name) for p in (run_dir / "incarnations").glob("*") if p.name.isdecimal()]
    newest = max(numbers, default=incarnation)
    if newest > incarnation:
        raise RunFailed(
            f"{run_dir}: this is incarnation {incarnation}, but incarnation {newest} of the run has started; "
            "nothing was saved",
            "only the newest incarnation may write; end this job, the newer one goes on",
        )


def _write_slices(folder: Path, rank: int, slices: list[Slice]) -> None:
    """This rank's state file and, beside it, the index that rank 0 reads."""
    stem = f"rank-{rank:05d}"
    index = []
    for s in slices:
        assert s.full_shape and s.tensor.dim() == 1, (s.name, s.kind, s.full_shape)
        whole = {"shape": list(s.full_shape), "dtype": DTYPE_NAMES[s.tensor.dtype]}
        span = {"start": s.start, "numel": s.tensor.numel()}
        index.append({"name": s.name, "kind": s.kind, "whole": whole, **span})
    entries = [_entry(tensor_key(s.name, s.kind, s.start), s.tensor) for s in slices if s.tensor.numel()]
    record = write_tensors(folder / f"{stem}.safetensors", entries)
    write_json(folder / f"{stem}.json", {"file": record, "slices": index})
    fsync_folder(folder)


def _write_manifest(temp: Path, head: dict[str, Any], adapter_json: Mapping[str, Any]) -> None:
    """Rank 0's part: checks that no row is missing, then writes the adapter, the manifest and COMPLETE."""
    tensors: dict[str, dict[str, Any]] = {}
    files: dict[str, Any] = {}
    for rank in range(head["world_size"]):
        file, sidecar = f"state/rank-{rank:05d}.safetensors", temp / f"state/rank-{rank:05d}.json"
        index = json.loads(sidecar.read_bytes())
        sidecar.unlink()  # the manifest will say it all
        files[file] = index["file"]
        for s in index["slices"]:
            entry = tensors.setdefault(s["name"], {}).setdefault(s["kind"], {**s["whole"], "parts": []})
            if {key: entry[key] for key in s["whole"]} != s["whole"]:
                raise RunFailed(f"{s['kind']} of {s['name']}: the ranks disagree about its shape or dtype")
            if s["numel"]:
                entry["parts"].append({"file": file, "start": s["start"], "numel": s["numel"]})
    for name, kinds in tensors.items():
        for kind, entry in kinds.items():
            _check_cover(name, kind, entry)
    manifest = {**head, "tensors": tensors, "files": files}
    files.update(
        _write_adapter(temp, _params(Checkpoint(temp, manifest)), {**adapter_json, "step": head["step"]})
    )
    record = write_json(temp / "manifest.json", manifest)
    fsync_folder(temp / "state")
    write_bytes(temp / "COMPLETE", record["sha256"].encode() + b"\n")
    fsync_folder(temp)


def _check_cover(name: str, kind: str, entry: dict[str, Any]) -> None:
    entry["parts"].sort(key=lambda part: part["start"])
    at, numel = 0, math.prod(entry["shape"])
    for part in (*entry["parts"], {"start": numel, "numel": 0}):
        if part["start"] != at:
            what = "missing" if part["start"] > at else "given twice"
            first, stop = sorted((at, part["start"]))
            raise RunFailed(
                f"{kind} of {name}: numbers {first} to {stop - 1} of {numel} are {what}; nothing was saved",
                "a defect of the engine, not of the recipe: please report it; older checkpoints stay",
            )
        at += part["numel"]


def _params(checkpoint: Checkpoint) -> list[Entry]:
    """The whole parameters, each put together from the ranks' files when its turn comes."""
    entries = []
    for name in checkpoint.names("param"):
        shape = checkpoint.shape(name, "param")
        read = partial(checkpoint.read, name, "param")
        dtype = DTYPES[checkpoint.dtype(name, "param")][0]
        entries.append(Entry(key=name, shape=shape, dtype=dtype, read=read))
    return entries


def _move_into_place(temp: Path, final: Path) -> None:
    aside = final.with_name(f".old-{final.name}")
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    try:
        temp.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    fsync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _rotate(new: Path, keep: int, incarnation: int) -> None:
    """Deletes all but the newest `keep` whole checkpoints; `new`, just verified, is the first of them."""
    kept = 1
    for folder in reversed(list_checkpoints(new.parent)):
        if step_of(folder) > step_of(new):
            # The run was resumed from before it: it must not pass for the newest, but it is the user's.
            aside = folder.with_name(f"abandoned-{folder.name}-inc{incarnation}")
            logger.warning("%s is later than this run's step; set aside as %s", folder.name, aside.name)
            folder.rename(aside)
        elif folder != new and kept < keep and _looks_whole(folder):
            kept += 1
        elif folder != new:
            doomed = folder.with_name(f".tmp-deleted-{folder.name}")  # never a half-deleted step-*
            with suppress(OSError):  # e.g. a reader on NFS; the new one is safe, the next save tries again
                folder.rename(doomed)
                shutil.rmtree(doomed)


def _looks_whole(folder: Path) -> bool:
    """Whether every file is there in its full size: cheap enough for each save."""
    try:
        files = json.loads((folder / "manifest.json").read_bytes())["files"]
        whole = all((folder / name).stat().st_size == record["size"] for name, record in files.items())
        return whole and (folder / "COMPLETE").exists()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_adapter(folder: Path, entries: list[Entry], adapter_json: Mapping[str, Any]) -> dict[str, Any]:
    record = write_tensors(folder / "adapter.safetensors", entries)
    description = {**adapter_json, "format_version": FORMAT_VERSION, **record}
    return {"adapter.safetensors": record, "adapter.json": write_json(folder / "adapter.json", description)}


def _entry(key: str, tensor: Tensor) -> Entry:
    return Entry(key=key, shape=tuple(tensor.shape), dtype=tensor.dtype, read=lambda: tensor)


def _in_words(target: Path, error: Exception) -> RunFailed:
    if isinstance(error, RunFailed):
        return error
    if isinstance(error, OSError):
        return RunFailed(
            f"{target}: not saved: {error.strerror or error}",
            "what was saved before is untouched; free some space or keep fewer (checkpoint.keep), then: "
            "decompft launch RECIPE --resume auto",
        )
    return RunFailed(f"{target}: not saved, what was written does not read back: {error}", "check the disk")
