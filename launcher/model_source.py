"""Where a model's config is found: in the recipe, on this disk, or in the built-in table."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decompft.launcher.errors import ModelError
from decompft.launcher.packaged import is_packaged, packaged_file
from decompft.launcher.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundConfig:
    """A transformers config and where it was read."""

    config: dict[str, Any]
    source: str  # in words, for the plan
    model_dir: Path | None  # folder with the checkpoint, when this disk has it


def find_config(recipe: Recipe, environ: Mapping[str, str] = os.environ) -> FoundConfig:
    """Look in the recipe, a local folder, a GGUF file, the hub's cache on disk, the built-in table.

    Raises:
        ModelError: found nowhere (naming what was tried), or not readable.
    """
    model = recipe.model
    if model.config is not None:
        _refuse_misspelt(model.config)
        return FoundConfig(config=dict(model.config), source="model.config of the recipe", model_dir=None)
    assert model.id is not None  # the recipe has exactly one of id and config
    try:
        path = packaged_file(model.id) if is_packaged(model.id) else Path(model.id).expanduser()
    except ModelError:
        from decompft.launcher.known_models import known_config

        config = known_config(model.id)
        if config is None:
            raise
        return FoundConfig(config=config, source="built-in table of shapes", model_dir=None)
    if path.is_dir():
        return FoundConfig(
            config=_read(path / "config.json"), source=f"config.json in {path}", model_dir=path
        )
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if path.is_absolute() or model.id.startswith(("./", "../", "~")):
        raise ModelError(
            f"model.id: {model.id} does not exist",
            "name a folder with a config.json, a .gguf file, or a hub id",
        )
    return _from_hub_id(model.id, model.revision, environ)


def hub_cache(environ: Mapping[str, str]) -> Path:
    """The hub's cache folder, found as huggingface_hub finds it."""
    if environ.get("HF_HUB_CACHE"):
        return Path(environ["HF_HUB_CACHE"]).expanduser()
    if environ.get("HF_HOME"):
        return Path(environ["HF_HOME"]).expanduser() / "hub"
    cache = environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(cache) / "huggingface" / "hub"


def _from_gguf(path: Path) -> FoundConfig:
    from decompft.launcher.gguf_header import read_config

    if not path.is_file():
        raise ModelError(f"model.id: there is no file {path}", "check the path; it is relative to the recipe")
    return FoundConfig(config=read_config(path), source=f"metadata of {path}", model_dir=None)


def _from_hub_id(model_id: str, revision: str, environ: Mapping[str, str]) -> FoundConfig:
    from decompft.launcher.known_models import known_config, known_ids

    cached = hub_cache(environ) / ("models--" + model_id.replace("/", "--"))
    snapshot = _snapshot(cached, revision)
    if snapshot is not None:
        has_weights = any(snapshot.glob("*.safetensors")) or any(snapshot.glob("*.bin"))
        return FoundConfig(
            config=_read(snapshot / "config.json"),
            source=f"hub cache, {snapshot}",
            model_dir=snapshot if has_weights else None,
        )
    config = known_config(model_id)
    if config is not None:
        return FoundConfig(config=config, source="built-in table of shapes", model_dir=None)
    near = difflib.get_close_matches(model_id, known_ids(), n=1, cutoff=0.8)
    raise ModelError(
        f"model.id: the config of {model_id} (revision {revision}) is nowhere on this machine; tried the "
        f"folder {model_id}, the hub cache {cached}, and the built-in table of {len(known_ids())} models",
        (f"did you mean {near[0]}? " if near else "")
        + "`decompft fetch RECIPE` fetches it where there is a network, or name a local folder with a config.json",
    )


def _snapshot(cached: Path, revision: str) -> Path | None:
    """The snapshot folder of a revision (branch, tag or commit) that has a config.json."""
    ref = cached / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    snapshot = cached / "snapshots" / commit
    return snapshot if (snapshot / "config.json").is_file() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"model.id: {path.parent} has no config.json",
            "name the folder that holds config.json and the weights",
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.id: cannot read {path}: {error}", "the file may be damaged; fetch it again"
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"model.id: {path} is not a JSON object", "the file may be damaged; fetch it again")
    return config


def _refuse_misspelt(config: dict[str, Any]) -> None:
    """transformers takes any key silently, and a misspelt size would leave the default, a 7B's, in force."""
    from decompft.launcher.families import shape_keys

    known = shape_keys()
    for key in config:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        if key not in known and near:
            raise ModelError(f"model.config.{key}: unknown key", f"did you mean {near[0]}?")
