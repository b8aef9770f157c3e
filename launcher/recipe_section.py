"""What every section of a recipe is."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

KEY = re.compile(r"[^.\[\]]+(\.[^.\[\]]+|\[\d+\])*")  # of a value: adapter.rank, data.train[0].path
Names = Annotated[list[str], Field(min_length=1)]


class Section(BaseModel):
    """A strict, frozen part of a recipe: unknown keys and other types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
