"""Is what a checkpoint's manifest says of the kind that its readers rely on?

The seal proves that nothing has changed since it was written, not that decompft wrote it.
"""

from __future__ import annotations

from typing import Any

_WHOLE = ("step", "world_size", "incarnation")
_OBJECTS = ("state", "tensors", "files")


def find_oddity(manifest: dict[str, Any]) -> str | None:
    """The first value of a wrong type, in words; None if there is none."""
    for key in _WHOLE:
        if not _is_whole(manifest.get(key)):
            return f"{key} is no whole number"
    for key in _OBJECTS:
        if not isinstance(manifest.get(key), dict):
            return f"{key} is no object"
    if not manifest["files"]:
        return "it names no files"
    for key in ("eval_loss", "time_s"):
        if not isinstance(manifest.get(key), float | int | None):
            return f"{key} is no number"
    if not isinstance(manifest["state"].get("base", {}), dict):
        return "state.base is no object"
    return _odd_tensor(manifest["tensors"], manifest["files"])


def _odd_tensor(tensors: dict[str, Any], files: dict[str, Any]) -> str | None:
    for name, kinds in tensors.items():
        for kind, entry in kinds.items() if isinstance(kinds, dict) else [("tensors", None)]:
            if not (
                isinstance(entry, dict)
                and isinstance(entry.get("dtype"), str)
                and isinstance(entry.get("shape"), list)
                and all(map(_is_whole, entry["shape"]))
                and isinstance(entry.get("parts"), list)
                and all(_is_part(part, files) for part in entry["parts"])
            ):
                return f"{kind} of {name} is not described as a tensor is"
    return None


def _is_part(part: Any, files: dict[str, Any]) -> bool:
    is_known = isinstance(part, dict) and isinstance(part.get("file"), str) and part["file"] in files
    return is_known and _is_whole(part.get("start")) and _is_whole(part.get("numel"))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
