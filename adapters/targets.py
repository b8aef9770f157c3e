"""Which linear layers an adapter sits on: names and patterns against module names, torch-free.

The planner asks with the names of the model's shape, `inject.py` with those of the real modules,
so that what was forecast is what is trained.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from fnmatch import translate

ALL_LINEAR = "all-linear"


class TargetMismatch(ValueError):
    """A target that selects nothing.

    Attributes:
        target: the name or pattern as written.
        near_misses: names that it may have meant, nearest first.
    """

    def __init__(self, target: str, near_misses: Sequence[str]) -> None:
        self.target = target
        self.near_misses = tuple(near_misses)
        near = f"; near misses: {', '.join(near_misses)}" if near_misses else ""
        super().__init__(f"{target!r} matches no layer{near}")


def select(names: Sequence[str], targets: str | Sequence[str], head_names: Sequence[str]) -> list[str]:
    """The members of `names` that `targets` selects, in the order of `names`.

    `all-linear` selects every name that is not in `head_names`. A plain name (`q_proj`) is compared
    with the last component of each name. A target with a dot or a wildcard is an fnmatch pattern
    over the whole name, tried as it is and after a leading `*.`; `*` also crosses dots.

    Args:
        names: full module names, e.g. `model.layers.0.self_attn.q_proj`.
        targets: one target or several; a name that several select is listed once.
        head_names: full names of the output head.

    Raises:
        TargetMismatch: a target selects nothing; the first such one.
    """
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        hits = _hits(names, target, head_names)
        if not hits:
            raise TargetMismatch(target, near_misses(names, target))
        chosen.update(hits)
    return [name for name in names if name in chosen]


def near_misses(names: Sequence[str], target: str) -> list[str]:
    """Up to three last components, else whole names, that resemble `target`."""
    last = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    wanted = target.rpartition(".")[2].strip("*?")
    # ...and those that hold the target as a piece, "proj" for q_proj, which no edit distance finds
    pieces = [name for name in last if wanted and wanted.lower() in name.lower()]
    close = difflib.get_close_matches(wanted, last, n=3, cutoff=0.5)
    found = list(dict.fromkeys([*close, *pieces]))
    return (found or difflib.get_close_matches(target, list(names), n=3, cutoff=0.5) or last)[:3]


def _hits(names: Sequence[str], target: str, head_names: Sequence[str]) -> list[str]:
    if target == ALL_LINEAR:
        return [name for name in names if name not in head_names]
    if not any(mark in target for mark in "*?[."):
        return [name for name in names if name.rpartition(".")[2] == target]
    pattern = re.compile(f"{translate(target)}|{translate('*.' + target)}")
    return [name for name in names if pattern.match(name)]
