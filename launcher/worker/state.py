"""What of a running job is in a checkpoint, cut into the rows that each rank holds."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from decompft.launcher.errors import CheckpointError
from decompft.launcher.worker.build import Built
from decompft.launcher.worker.checkpoint import Checkpoint, Slice
from decompft.launcher.worker.engines.base import Engine
from decompft.launcher.worker.load import place_whole
from decompft.launcher.worker.optimizer import MOMENTS, read_moments, write_moments


def slices(built: Built, optimizer: torch.optim.Optimizer, engine: Engine) -> Iterator[Slice]:
    """This rank's rows of every trained tensor and its moments."""
    for name, parameter in built.trained.items():
        owned = engine.owned_rows(parameter)
        if owned is None:
            continue
        shape = tuple(parameter.shape)
        local = engine.local(parameter.detach())
        yield Slice(name=name, kind="param", full_shape=shape, start_row=owned[0], tensor=local)
        moments = read_moments(optimizer, parameter, engine)
        for kind in MOMENTS if moments else ():
            yield Slice(name=name, kind=kind, full_shape=shape, start_row=owned[0], tensor=moments[kind])
        if moments and engine.rank == 0:
            yield Slice(name=name, kind="step", full_shape=(1,), start_row=0, tensor=moments["step"])
    if engine.rank == 0:
        for name, buffer in built.buffers.items():
            yield Slice(name=name, kind="param", full_shape=tuple(buffer.shape), start_row=0, tensor=buffer)


def restore(checkpoint: Checkpoint, built: Built, optimizer: torch.optim.Optimizer, engine: Engine) -> None:
    """Load this rank's rows, whatever the world size that wrote them.

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
    with torch.no_grad():
        for name, buffer in built.buffers.items():
            buffer.copy_(checkpoint.read_rows(name, "param", 0, buffer.shape[0]))
        for name, parameter in built.trained.items():
            start, stop = engine.rows(parameter)
            engine.local(parameter.detach()).copy_(checkpoint.read_rows(name, "param", start, stop))
            if "step" in checkpoint.kinds(name):
                moments = {kind: checkpoint.read_rows(name, kind, start, stop) for kind in MOMENTS}
                moments["step"] = checkpoint.read_rows(name, "step", 0, 1)
                write_moments(optimizer, parameter, moments, engine)


def whole_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The adapter of a checkpoint, tensor by tensor, on the CPU."""
    return {
        n: checkpoint.read_rows(n, "param", 0, checkpoint.shape(n, "param")[0])
        for n in checkpoint.names("param")
    }


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
            if tuple(target.shape) != tuple(tensors[name].shape):
                raise CheckpointError(
                    f"{name}: the adapter has shape {list(tensors[name].shape)}, the model {list(target.shape)}",
                    "name the model that the adapter was trained on with --base",
                )
            place_whole(target, tensors[name], engine)
