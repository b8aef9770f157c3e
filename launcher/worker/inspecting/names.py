"""Which kind of layer is a module, and how deep does it lie?"""

from __future__ import annotations

import re

_NUMBER = re.compile(r"\d+")


def kind_and_depth(name: str) -> tuple[str, int | None]:
    """Split a module's name at its first number: ("self_attn.q_proj", 3) of model.layers.3.self_attn.q_proj.

    Later numbers (experts) become `*`. A name without a number is its own kind, at no depth.
    """
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if _NUMBER.fullmatch(part)), None)
    if at is None:
        return name, None
    return ".".join("*" if _NUMBER.fullmatch(p) else p for p in parts[at + 1 :]), int(parts[at])


def natural_order(name: str) -> tuple[tuple[int, str], ...]:
    """A sort key by which layer 2 comes before layer 10."""
    return tuple((int(p), "") if _NUMBER.fullmatch(p) else (-1, p) for p in name.split("."))
