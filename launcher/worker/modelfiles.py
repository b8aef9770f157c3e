"""Where the model's files lie: one local folder with config.json, safetensors and the tokenizer.

Runs before any process group exists, on one process of a node; the ranks only read the folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from decompft.launcher.checking import check_weights
from decompft.launcher.errors import ModelError
from decompft.launcher.packaged import is_packaged, packaged_file
from decompft.launcher.plan import Plan
from decompft.launcher.recipe import ModelSection
from decompft.launcher.worker.gguf_convert import RECORD, converted

_INDEX = "model.safetensors.index.json"
_EDGE_BYTES = 1 << 20
_REMOTE_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")  # never a pickle
_REMOTE_EXTRAS = ("*/*", "consolidated*")  # subfolders hold other formats; consolidated: the weights again


def resolve(plan: Plan) -> Path | None:
    """The folder of the plan's model, as `resolve_model`."""
    return resolve_model(plan.recipe.model, known=None if plan.model_dir is None else Path(plan.model_dir))


def resolve_model(
    model: ModelSection,
    *,
    known: Path | None = None,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> Path | None:
    """The folder of a model, after converting or downloading what has to be.

    A local folder is returned as it is, a GGUF file is converted once and cached, a hub id is downloaded
    into the hub's own cache.

    Args:
        known: a folder with the config of a hub id, used when its weights are not needed.
        say: takes a line for the user before work that lasts.

    Returns:
        None for a model that is built from `model.config`, and for one of `weights: random` that no
        place here knows.

    Raises:
        ModelError: not found, not reachable, incomplete, or only there as pickles.
    """
    if model.id is None:
        return None
    needs_weights = model.weights == "checkpoint"
    path = packaged_file(model.id) if is_packaged(model.id) else Path(model.id).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return converted(path, say)
    if path.is_dir():
        return _checked(path, needs_weights)
    if path.suffix == ".gguf" or path.is_absolute() or model.id.startswith(("./", "../", "~")):
        raise ModelError(f"model.id: {model.id} does not exist", "name a folder, a .gguf file, or a hub id")
    if not needs_weights:  # the shape is in the plan's source of shapes; nothing is worth a download
        return known
    return _checked(_downloaded(model.id, model.revision, model.trust_remote_code, say), needs_weights)


def identity(model_dir: Path) -> dict[str, str]:
    """What a checkpoint notes of its frozen base, so that a resume on another one is refused.

    `sha256` alone decides; `source` and `revision` are for people. A converted GGUF file is its own
    hash. For others it covers config.json, the safetensors index, and of each safetensors file its
    name, size, header, and first and last MiB of data: 140 GB are not read, and a changed middle with
    both ends, all shapes and the size equal is not a thing that training or conversion produces.
    """
    record = model_dir / RECORD
    if record.is_file():
        made = json.loads(record.read_text(encoding="utf-8"))
        text = f"gguf {made['converter']} {made['sha256']}"
        return {"source": made["source"], "revision": "", "sha256": hashlib.sha256(text.encode()).hexdigest()}
    digest = hashlib.sha256()
    for name in ("config.json", _INDEX):
        if (model_dir / name).is_file():
            digest.update(name.encode() + b"\0" + _canonical_json(model_dir / name) + b"\0")
    for path in sorted(model_dir.glob("*.safetensors")):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + _fingerprint(path))
    source, revision = _hub_place(model_dir)
    return {"source": source, "revision": revision, "sha256": digest.hexdigest()}


def _checked(folder: Path, needs_weights: bool) -> Path:
    """The folder, if everything that will be read is there."""
    if not (folder / "config.json").is_file():
        hint = "name the folder that holds config.json and the weights"
        if (folder / "adapter.json").is_file() or (folder / "adapter_config.json").is_file():
            hint = "this is an adapter's folder; model.id names the base model"
        raise ModelError(f"model.id: {folder} has no config.json", hint)
    if needs_weights:
        check_weights(folder)
    return folder


def _downloaded(repo: str, revision: str, with_code: bool, say: Callable[[str], None]) -> Path:
    """The hub's snapshot folder, complete; its progress bars are the hub library's own."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    patterns = [*_REMOTE_FILES, "*.py"] if with_code else list(_REMOTE_FILES)
    say(f"{repo}: looking for revision {revision} in the hub's cache and on the hub")
    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=list(_REMOTE_EXTRAS)
        )
    except HFValidationError as error:
        raise ModelError(
            f"model.id: there is no file or folder {repo}, and it is no hub id either",
            "a hub id looks like meta-llama/Llama-2-7b-hf; paths in a recipe are relative to its folder",
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"model.id: there is no folder {repo}, the hub's cache lacks it, and the hub cannot be reached",
            "run `decompft fetch RECIPE` where there is a network (a login node) with HF_HOME on a shared "
            "disk, or name a local folder",
        ) from error
    except Exception as error:  # HTTP, authentication, gating, disk: the library's first line says which
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
        raise ModelError(
            f"model.id: the hub did not give {repo} (revision {revision}): {lines[0]}",
            "check the id and the revision; a gated model needs its licence accepted and HF_TOKEN set",
        ) from error
    return Path(folder)


def _hub_place(folder: Path) -> tuple[str, str]:
    """(repository, commit) of a folder in the hub's cache, else (its path, "")."""
    found = re.search(r"models--([^/]+)/snapshots/([^/]+)$", folder.as_posix())
    return (found[1].replace("--", "/"), found[2]) if found else (str(folder.resolve()), "")


def _canonical_json(path: Path) -> bytes:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"model.id: cannot read {path}: {error}", "fetch the model again") from error
    return json.dumps(content, sort_keys=True).encode()


def _fingerprint(path: Path) -> bytes:
    """Hash of a safetensors file's header and of the first and last MiB behind it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if not 2 <= header_bytes <= size - 8:
            raise ModelError(f"model.id: {path} is cut short, or not safetensors", "fetch the model again")
        digest.update(file.read(header_bytes))
        digest.update(file.read(_EDGE_BYTES))
        file.seek(max(file.tell(), size - _EDGE_BYTES))
        digest.update(file.read())
    return digest.digest()
