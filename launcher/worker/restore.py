"""How are checkpoints and adapters read back: verified first, then any rows on any world size?"""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from decompft.launcher.checkpoints import FORMAT_VERSION, find_problem
from decompft.launcher.errors import AdapterError, CheckpointError
from decompft.launcher.worker.tensorfile import DTYPES


def open_checkpoint(path: Path) -> Checkpoint:
    """Verifies every file of a checkpoint folder (size, sha256) and opens it for reading.

    Raises:
        CheckpointError: a file is missing, truncated or altered, or the format is newer.
    """
    return Checkpoint(path, verify(path))


class Checkpoint:
    """A verified checkpoint; any run of a tensor's numbers is read only from the files that hold it."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.step: int = manifest["step"]
        self.world_size: int = manifest["world_size"]  # of the run that wrote it
        self.incarnation: int = manifest["incarnation"]
        self.state: dict[str, Any] = manifest["state"]  # the caller's JSON, as given to save()
        self._tensors: dict[str, dict[str, Any]] = manifest["tensors"]
        self._files: dict[str, Any] = {}  # open safetensors files: their headers are parsed once

    def names(self, kind: str) -> tuple[str, ...]:
        """The tensors that have this kind of state, sorted."""
        return tuple(sorted(name for name, kinds in self._tensors.items() if kind in kinds))

    def kinds(self, name: str) -> tuple[str, ...]:
        """The kinds of state that tensor `name` has, sorted."""
        return tuple(sorted(self._tensors.get(name, {})))

    def shape(self, name: str, kind: str) -> tuple[int, ...]:
        """The full shape."""
        return tuple(self._entry(name, kind)["shape"])

    def dtype(self, name: str, kind: str) -> str:
        """The dtype, e.g. "float32"."""
        return str(self._entry(name, kind)["dtype"])

    def read(self, name: str, kind: str) -> Tensor:
        """The whole tensor, on the CPU."""
        shape = self.shape(name, kind)
        return self.read_span(name, kind, 0, math.prod(shape)).view(shape)

    def read_span(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Numbers [start, stop) of the flattened tensor, on the CPU, shape (stop - start,).

        Raises:
            CheckpointError: no such tensor, or it is smaller than asked for.
        """
        entry = self._entry(name, kind)
        numel = math.prod(entry["shape"])
        if not 0 <= start <= stop <= numel:
            raise CheckpointError(
                f"{self.path}: {kind} of {name} has shape {tuple(entry['shape'])}, not the numbers {start}..{stop}",
                "the checkpoint belongs to a run with another model, rank or target list",
            )
        values = torch.empty(stop - start, dtype=DTYPES[entry["dtype"]][0])
        for part in entry["parts"]:
            first, last = max(start, part["start"]), min(stop, part["start"] + part["numel"])
            if first < last:
                stored = self._file(part["file"]).get_slice(tensor_key(name, kind, part["start"]))
                values[first - start : last - start] = stored[first - part["start"] : last - part["start"]]
        return values

    def _entry(self, name: str, kind: str) -> dict[str, Any]:
        if kind not in self._tensors.get(name, {}):
            raise CheckpointError(
                f"{self.path}: holds no {kind} of {name}",
                "the checkpoint belongs to a run with another adapter, target list or optimizer",
            )
        return self._tensors[name][kind]

    def _file(self, name: str) -> Any:  # safetensors has no types
        if name not in self._files:
            self._files[name] = safe_open(self.path / name, framework="pt", device="cpu")
        return self._files[name]


def load_adapter(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and adapter.json of an adapter folder; a checkpoint folder is one, too.

    Raises:
        AdapterError: a file is missing, truncated or altered, or the format is newer.
    """
    try:
        description: dict[str, Any] = json.loads((folder / "adapter.json").read_bytes())
        content = (folder / "adapter.safetensors").read_bytes()
    except FileNotFoundError as error:
        raise AdapterError(
            f"{folder}: {Path(error.filename).name} is missing",
            "name a folder with adapter.json and adapter.safetensors: RUN/adapter or a checkpoint",
        ) from error
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise AdapterError(f"{folder}/adapter.json: not valid JSON: {error}") from error
    version = description.get("format_version") if isinstance(description, dict) else None
    if not isinstance(version, int):
        raise AdapterError(
            f"{folder}/adapter.json: has no format_version, so decompft did not write it",
            "name a folder that a run of decompft wrote: RUN/adapter or a checkpoint",
        )
    if version > FORMAT_VERSION:
        raise AdapterError(f"{folder}: {_newer(version)}", "update decompft")
    if hashlib.sha256(content).hexdigest() != description.get("sha256"):
        found, expected = len(content), description.get("size")
        what = "altered" if found == expected else f"damaged: {found} bytes instead of {expected}"
        raise AdapterError(
            f"{folder}/adapter.safetensors: {what} (its sha256 is not the one in adapter.json)",
            "copy it again, or take the adapter of a checkpoint of the run",
        )
    return parse_safetensors(content), description


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, once every file in it has been found as it was written.

    Raises:
        CheckpointError: see open_checkpoint.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder", "a run keeps them under RUN/checkpoints")
    manifest: dict[str, Any] = {}
    problem = None
    try:
        with suppress(FileNotFoundError, ValueError):  # find_problem says it in words
            manifest = json.loads((path / "manifest.json").read_bytes())
            if manifest["version"] > FORMAT_VERSION:
                raise CheckpointError(
                    f"{path}: {_newer(manifest['version'])}",
                    "update decompft, or resume with the version that the run's env.json names",
                )
        problem = find_problem(path)
    except OSError as error:
        problem = f"{Path(error.filename).name} cannot be read ({error.strerror})"
    except (KeyError, TypeError):
        problem = "manifest.json is damaged: it has no version"
    if problem is not None:
        raise CheckpointError(
            f"{path}: {problem}",
            "resume from another checkpoint of the run; --resume auto takes the newest valid one",
        )
    return manifest


def tensor_key(name: str, kind: str, start: int) -> str:
    """The key of a slice inside a state file."""
    return f"{name}|{kind}|{start}"


def _newer(version: int) -> str:
    return f"written by a newer decompft (format {version}, this one reads up to {FORMAT_VERSION})"
