"""How is training state written so that no crash, full disk or stale job can spoil a checkpoint?

Every rank writes the rows it holds into a temp folder; rank 0 proves that the rows of all ranks cover
every tensor exactly once, reads all files back, and only then renames the folder into place. No collective: see
meeting.py.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from decompft.launcher.checkpoints import FORMAT_VERSION, SUSPECT_REASON, put_back
from decompft.launcher.errors import AdapterError, CheckpointError, RunFailed
from decompft.launcher.runs import RunDir
from decompft.launcher.worker.meeting import (
    ANOTHER,
    PATIENT,
    AnotherRankFailed,
    Patience,
    has_failed,
    leave,
    stem,
    wait_for_parts,
    wait_for_verdict,
    write_verdict,
)
from decompft.launcher.worker.restore import (
    Checkpoint,
    load_adapter,
    open_checkpoint,
    tensor_key,
    verify,
)
from decompft.launcher.worker.retention import Retention, rotate
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
    incarnation: int,
    retention: Retention,
    adapter_json: Mapping[str, Any],
    reason: str,
    eval_loss: float | None = None,
    patience: Patience = PATIENT,
    tag: str = "",
    leader: int = 0,
) -> Path:
    """Writes checkpoints/step-N; every rank calls it, from any thread, and all return, or all raise.

    Args:
        state: JSON that does not depend on the mesh (schedule, data cursor, seeds); rank 0's is written.
        reason: why it is saved, for the manifest; after SUSPECT_REASON no other checkpoint is deleted.
        eval_loss: of this very step, if it was evaluated.
        tag: tells two saves of one step apart; the same on every rank.
        leader: the rank that commits; 0 unless it is gone.

    Raises:
        RunFailed: some rank could not write (full disk, ...), the slices have gaps, or a newer incarnation
            of the run has started. Older checkpoints are untouched.
    """
    root = run_dir / "checkpoints"
    final = root / f"step-{step:08d}"
    temp = root / f".tmp-{final.name}-inc{incarnation}{tag}"
    verdict = RunDir(run_dir).incarnation_dir(incarnation) / f"save{tag}.json"
    head = {
        "version": FORMAT_VERSION, "step": step, "world_size": world_size, "incarnation": incarnation,
        "time_s": time.time(), "eval_loss": eval_loss, "reason": reason,
    }  # fmt: skip

    def commit(there: Sequence[int]) -> None:
        _write_manifest(temp, {**head, "state": dict(state)}, adapter_json, there)
        verify(temp)
        _refuse_stale(run_dir, incarnation)
        _move_into_place(temp, final)
        if reason != SUSPECT_REASON:  # the one before may be the last that is any good
            rotate(final, retention, incarnation)

    try:
        _prepare(run_dir, temp, incarnation, cleans=rank == leader)
        _write_slices(temp / "state", rank, slices)
        if rank == leader:
            commit(wait_for_parts(temp / "state", world_size, patience))
        else:
            wait_for_verdict(verdict, step, patience)
    except (OSError, CheckpointError, RunFailed) as error:
        failure = _in_words(final, error)
        if rank == leader:
            shutil.rmtree(temp, ignore_errors=True)
            if world_size > 1:
                write_verdict(verdict, step, failure)
        else:
            # the leader clears the folder before it says so: on a full disk that makes the room for its word
            is_elsewhere = isinstance(error, FileNotFoundError) or has_failed(verdict, step)
            if is_elsewhere and not isinstance(failure, AnotherRankFailed):
                failure = _in_words(final, AnotherRankFailed(ANOTHER))
            leave(temp, rank, failure)
        if failure is error:
            raise
        raise failure from error
    if rank == leader and world_size > 1:
        write_verdict(verdict, step, None)
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


def _prepare(run_dir: Path, temp: Path, incarnation: int, *, cleans: bool) -> None:
    """Makes the temp folder, whoever comes first; rank 0 clears what interrupted saves left."""
    _refuse_stale(run_dir, incarnation)
    if cleans and temp.parent.is_dir():
        put_back(temp.parent)
        for aside in temp.parent.glob(".old-*"):
            shutil.rmtree(aside)
        for leftover in temp.parent.glob(".tmp-*"):
            if leftover != temp:
                shutil.rmtree(leftover, ignore_errors=True)
    (temp / "state").mkdir(parents=True, exist_ok=True)


def _refuse_stale(run_dir: Path, incarnation: int) -> None:
    newest = RunDir(run_dir).newest_incarnation()
    if newest > incarnation:
        raise RunFailed(
            f"{run_dir}: this is incarnation {incarnation}, but incarnation {newest} of the run has started; "
            "nothing was saved",
            "only the newest incarnation may write; end this job, the newer one goes on",
        )


def _write_slices(folder: Path, rank: int, given: Iterable[Slice]) -> None:
    """This rank's state file and, whole or not at all, the index that rank 0 waits for."""
    index, slices = [], list(given)
    for s in slices:
        assert s.full_shape and s.tensor.dim() == 1, (s.name, s.kind, s.full_shape)
        whole = {"shape": list(s.full_shape), "dtype": DTYPE_NAMES[s.tensor.dtype]}
        span = {"start": s.start, "numel": s.tensor.numel()}
        index.append({"name": s.name, "kind": s.kind, "whole": whole, **span})
    entries = [_entry(tensor_key(s.name, s.kind, s.start), s.tensor) for s in slices if s.tensor.numel()]
    record = write_tensors(folder / f"{stem(rank)}.safetensors", entries)
    temp = folder / f".{stem(rank)}.json"
    write_json(temp, {"file": record, "slices": index})
    temp.rename(folder / f"{stem(rank)}.json")
    fsync_folder(folder)


def _write_manifest(
    temp: Path, head: dict[str, Any], adapter_json: Mapping[str, Any], ranks: Sequence[int]
) -> None:
    """Rank 0's part: checks that no row is missing, then writes the adapter, the manifest and COMPLETE."""
    tensors: dict[str, dict[str, Any]] = {}
    files: dict[str, Any] = {}
    for rank in ranks:
        file, sidecar = f"state/{stem(rank)}.safetensors", temp / f"state/{stem(rank)}.json"
        index = json.loads(sidecar.read_bytes())
        sidecar.unlink()  # the manifest will say it all
        files[file] = index["file"]
        for s in index["slices"]:
            entry = tensors.setdefault(s["name"], {}).setdefault(s["kind"], {**s["whole"], "parts": []})
            if {key: entry[key] for key in s["whole"]} != s["whole"]:
                raise RunFailed(f"{s['kind']} of {s['name']}: the ranks disagree about its shape or dtype")
            if s["numel"]:
                entry["parts"].append({"file": file, "start": s["start"], "numel": s["numel"]})
    absent = sorted(set(range(head["world_size"])) - set(ranks))
    for name, kinds in tensors.items():
        for kind, entry in kinds.items():
            _check_cover(name, kind, entry, absent)
    manifest = {**head, "tensors": tensors, "files": files}
    files.update(
        _write_adapter(temp, _params(Checkpoint(temp, manifest)), {**adapter_json, "step": head["step"]})
    )
    record = write_json(temp / "manifest.json", manifest)
    fsync_folder(temp / "state")
    write_bytes(temp / "COMPLETE", record["sha256"].encode() + b"\n")
    fsync_folder(temp)


def _check_cover(name: str, kind: str, entry: dict[str, Any], absent: Sequence[int]) -> None:
    entry["parts"].sort(key=lambda part: part["start"])
    at, numel = 0, math.prod(entry["shape"])
    for part in (*entry["parts"], {"start": numel, "numel": 0}):
        if part["start"] != at:
            what = "missing" if part["start"] > at else "given twice"
            first, stop = sorted((at, part["start"]))
            if absent and part["start"] > at:
                raise RunFailed(
                    f"{kind} of {name}: numbers {first} to {stop - 1} of {numel} were held by rank "
                    f"{', '.join(map(str, absent))} alone, which cannot give them any more; nothing was saved",
                    "older checkpoints stay",
                )
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


def _write_adapter(folder: Path, entries: list[Entry], adapter_json: Mapping[str, Any]) -> dict[str, Any]:
    record = write_tensors(folder / "adapter.safetensors", entries)
    description = {**adapter_json, "format_version": FORMAT_VERSION, **record}
    return {"adapter.safetensors": record, "adapter.json": write_json(folder / "adapter.json", description)}


def _entry(key: str, tensor: Tensor) -> Entry:
    return Entry(key=key, shape=tuple(tensor.shape), dtype=tensor.dtype, read=lambda: tensor)


def _in_words(target: Path, error: Exception) -> RunFailed:
    if isinstance(error, AnotherRankFailed):
        return AnotherRankFailed(f"{target}: not saved, because {error.message}", error.hint)
    if isinstance(error, RunFailed):
        return error
    if isinstance(error, OSError):
        # shutil gathers one complaint a file: (from, to, what)
        words = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror or error
        return RunFailed(
            f"{target}: not saved: {words}",
            "what was saved before is untouched; free some space or keep fewer (checkpoint.keep), then: "
            "decompft launch RECIPE --resume auto",
        )
    return RunFailed(f"{target}: not saved, what was written does not read back: {error}", "check the disk")
