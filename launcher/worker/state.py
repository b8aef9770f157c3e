"""What of a running job is in a checkpoint, cut into the rows that each rank holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from decompft.launcher.errors import CheckpointError
from decompft.launcher.worker.build import Built
from decompft.launcher.worker.checkpoint import Checkpoint, Slice
from decompft.launcher.worker.engines.base import MOMENTS, Engine, full_shape
from decompft.launcher.worker.optimizer import read_moments, read_raw, write_moments, write_raw

Averages = Mapping[str, Mapping[str, Tensor]]  # kind -> trained tensor -> this rank's piece, flat


def slices(
    built: Built,
    optimizer: torch.optim.Optimizer,
    engine: Engine,
    averages: Averages,
    *,
    stands_in: bool = False,
) -> Iterator[Slice]:
    """This rank's spans of every trained tensor, its moments, and what its adapter averages.

    Args:
        stands_in: for rank 0, which is gone: what each rank holds whole is this one's to give.
    """
    gives = engine.rank == 0 or stands_in
    for name, parameter in built.trained.items():
        shape = full_shape(parameter)
        everything = (0, math.prod(shape))
        owned = engine.owned(parameter)
        if stands_in and engine.span(parameter) == everything:
            owned = everything
        if owned is not None:
            local = engine.local(parameter).detach().reshape(-1)
            yield Slice(name=name, kind="param", full_shape=shape, start=owned[0], tensor=local)
        piece = engine.owned_piece(parameter)
        if stands_in and engine.piece(parameter) == everything:
            piece = everything
        if piece is None:
            continue
        for kind, tensors in averages.items():
            if name in tensors:
                yield Slice(name=name, kind=kind, full_shape=shape, start=piece[0], tensor=tensors[name])
        moments = read_moments(optimizer, parameter, engine)
        for kind in MOMENTS if moments else ():
            values = moments[kind].reshape(-1)
            yield Slice(name=name, kind=kind, full_shape=shape, start=piece[0], tensor=values)
        for kind, values in read_raw(optimizer, parameter).items():
            kind = f"{_raw(engine.piece(parameter))}{kind}"
            yield Slice(name=name, kind=kind, full_shape=tuple(values.shape), start=0, tensor=values)
        if moments and gives:
            yield Slice(name=name, kind="step", full_shape=(1,), start=0, tensor=moments["step"])
    if gives:
        for name, buffer in built.buffers.items():
            shape = tuple(buffer.shape)
            yield Slice(name=name, kind="param", full_shape=shape, start=0, tensor=buffer.reshape(-1))


def restore(
    checkpoint: Checkpoint,
    built: Built,
    optimizer: torch.optim.Optimizer,
    engine: Engine,
    averages: Averages,
) -> int:
    """Load this rank's rows, whatever the world size that wrote them.

    Returns:
        How many tensors' 8-bit moments were quantized again here, as their rows were cut otherwise.

    Raises:
        CheckpointError: the checkpoint trains other tensors.
    """
    found, expected = set(checkpoint.names("param")), {*built.trained, *built.buffers}
    if found != expected:
        odd = sorted(found ^ expected)[0]
        raise CheckpointError(
            f"{checkpoint.path}: trains other tensors than this run, e.g. {odd}",
            "resume with the recipe that wrote it, or start a new run with --run-dir DIR",
        )
    num_requantized = 0
    with torch.no_grad():
        for name, buffer in built.buffers.items():
            buffer.copy_(checkpoint.read(name, "param"))
        for name, parameter in built.trained.items():
            local = engine.local(parameter).detach()
            local.view(-1).copy_(checkpoint.read_span(name, "param", *engine.span(parameter)))
            if "step" in checkpoint.kinds(name):
                piece = engine.piece(parameter)
                moments = {kind: checkpoint.read_span(name, kind, *piece) for kind in MOMENTS}
                moments["step"] = checkpoint.read(name, "step")
                write_moments(optimizer, parameter, moments, engine)
                known = {
                    k: k.removeprefix(_raw(piece))
                    for k in checkpoint.kinds(name)
                    if k.startswith(_raw(piece))
                }
                if known:
                    raw = {kind: checkpoint.read(name, stored) for stored, kind in known.items()}
                    write_raw(optimizer, parameter, raw)
                elif read_raw(optimizer, parameter):
                    num_requantized += 1
            for kind, tensors in averages.items():
                if name in tensors and kind in checkpoint.kinds(name):
                    tensors[name].copy_(checkpoint.read_span(name, kind, *engine.piece(parameter)))
    engine.after_restore()
    return num_requantized


def _raw(piece: tuple[int, int]) -> str:
    """Before the kinds of 8-bit moments as they are: their blocks are those of this span of numbers alone."""
    return f"raw{piece[0]}-{piece[1]}."


def whole_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The adapter of a checkpoint, tensor by tensor, on the CPU."""
    return {n: checkpoint.read(n, "param") for n in checkpoint.names("param")}


def place_adapter(targets: dict[str, Tensor], tensors: dict[str, Tensor], engine: Engine) -> None:
    """Put a finished adapter's tensors into a model's trained parameters and buffers, by name.

    Raises:
        CheckpointError: names or shapes differ.
    """
    if set(tensors) != set(targets):
        odd = sorted(set(tensors) ^ set(targets))[0]
        raise CheckpointError(
            f"the adapter does not fit this model, e.g. {odd}", "name its own base with --base"
        )
    with torch.no_grad():
        for name, target in targets.items():
            if full_shape(target) != tuple(tensors[name].shape):
                raise CheckpointError(
                    f"{name}: the adapter has shape {list(tensors[name].shape)}, the model {list(full_shape(target))}",
                    "name the model that the adapter was trained on with --base",
                )
            engine.place(target, tensors[name])
