"""How large are the layers of an adapter's base, where it lies here? Asked only for what its file does not tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from decompft.adapters.inject import adapters
from decompft.launcher.errors import DecompftError
from decompft.launcher.packaged import is_packaged
from decompft.launcher.recipe import AdapterSection, ModelSection, QuantizationSection
from decompft.launcher.worker.build import outline_of
from decompft.launcher.worker.modelfiles import identity, resolve_model

Sizes = dict[str, tuple[int, int]]  # module -> (out, in)


def sizes_of_base(description: dict[str, Any]) -> Sizes:
    """Of the adapted layers of the base that an adapter.json names; nothing is downloaded, no weight is read.

    Returns:
        Nothing where the base is not here, or is not the one that was trained on.
    """
    try:
        model = ModelSection.model_validate_json(json.dumps(description["model"]))
        quantization = QuantizationSection.model_validate_json(json.dumps(description["quantization"]))
        adapter = AdapterSection.model_validate_json(json.dumps(description["adapter"]))
        folder = _folder(model)
        if folder is None and model.config is None:
            return {}
        if folder is not None and identity(folder)["sha256"] != description["base"]["sha256"]:
            return {}
        outline = outline_of(model, quantization, adapter, folder)
    except (DecompftError, KeyError, ValueError, OSError):
        return {}  # the statistics of the file itself need none of it
    return {name: (layer.base.out_features, layer.base.in_features) for name, layer in adapters(outline.hf)}


def _folder(model: ModelSection) -> Path | None:
    """Where the model lies here; None for one that is on the hub alone, or is made from a config."""
    if model.id is None:
        return None
    if is_packaged(model.id) or Path(model.id).expanduser().exists():
        return resolve_model(model, say=lambda line: None)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model.id, revision=model.revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None
