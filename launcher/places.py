"""Where what can be made again is kept: converted models, tokenized data."""

from __future__ import annotations

from collections.abc import Mapping
from os import environ
from pathlib import Path


def cache_dir(env: Mapping[str, str] = environ) -> Path:
    """DECOMPFT_CACHE, else `decompft` in the user's cache folder."""
    if env.get("DECOMPFT_CACHE"):
        return Path(env["DECOMPFT_CACHE"]).expanduser()
    return Path(env.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "decompft"
