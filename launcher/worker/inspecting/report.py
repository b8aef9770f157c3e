"""What is written of an inspection for other programs: one JSON document, and a folder of files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from decompft.launcher.errors import UserError


def as_json(value: Any) -> str:
    """Sorted and indented; what is no number in JSON (NaN, infinity) becomes null."""
    return json.dumps(_plain(value), indent=1, sort_keys=True) + "\n"


def check_out(out: Path) -> None:
    """Make the folder before the work begins.

    Raises:
        UserError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}", "name a folder that can be written") from error


def write(out: Path, name: str, value: Mapping[str, Any], plot: Callable[[Path], None]) -> list[Path]:
    """Write NAME.json, NAME.png and NAME.svg into the folder; files of that name are replaced."""
    (out / f"{name}.json").write_text(as_json(value), encoding="utf-8")
    plot(out / name)
    return [out / f"{name}.{ending}" for ending in ("json", "png", "svg")]


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
