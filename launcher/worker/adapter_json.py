"""adapter.json as it is read: every key that something here needs, checked once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from decompft.launcher.errors import AdapterError
from decompft.launcher.recipe import AdapterSection, ModelSection, QuantizationSection
from decompft.launcher.worker.tokens import TrainedToken


class Formula(BaseModel):
    """Of a method; see `AdapterSpec`."""

    title: str
    source: str
    is_reading: bool


class Base(BaseModel):
    """The model it was trained over; a folder, a name, or a config that random weights are drawn for."""

    sha256: str
    id: str | None = None
    source: str | None = None
    config: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """In words."""
        return self.id or self.source or f"a {(self.config or {}).get('model_type', 'model')} from config"


class AdapterJson(BaseModel):
    """What `decompft.launcher.worker.description` writes, without what is for people alone."""

    model_config = ConfigDict(frozen=True)

    adapter: AdapterSection
    formulas: dict[str, Formula]
    model: ModelSection
    quantization: QuantizationSection
    seed: int
    base: Base
    data_formats: list[str]
    tokens: list[TrainedToken] = []
    step: int | None = None  # optimizer steps; an adapter that was not trained here has none


def read_adapter_json(folder: Path, description: dict[str, Any]) -> AdapterJson:
    """
    Args:
        folder: for errors.
        description: of `load_adapter`.

    Raises:
        AdapterError: a key is missing, or names what this version does not know.
    """
    try:
        return AdapterJson.model_validate_json(json.dumps(description))
    except ValidationError as error:
        found = error.errors()[0]
        where, what = ".".join(map(str, found["loc"])), found["msg"].removeprefix("Value error, ")
        raise AdapterError(
            f"{folder}/adapter.json: {where}: {'is missing' if found['type'] == 'missing' else what}",
            "update decompft, if a newer one wrote it; else take the file from the run again",
        ) from error
