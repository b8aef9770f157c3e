"""Two checkpoints side by side: which tensors differ, by how much and where, and which keys of the state."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decompft.launcher.worker.tools.main import run_tool

if TYPE_CHECKING:
    from decompft.launcher.worker.inspecting.checkpoint_difference import KindDifference

_VALUE_WIDTH = 60  # of a printed value of the state; --json has all of it


def main(argv: list[str]) -> None:
    """Compare two checkpoints that were verified.

    Args:
        argv: FIRST SECOND [--json].
    """
    parser = argparse.ArgumentParser(prog="decompft inspect checkpoint")
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    # torch takes seconds to import: only after the arguments were read
    from decompft.launcher.worker.inspecting.checkpoint_difference import (
        compare,
        differing_state,
        open_verified,
    )
    from decompft.launcher.worker.inspecting.report import as_json
    from decompft.launcher.worker.tools.progress import Progress

    first, second = open_verified(args.first), open_verified(args.second)
    with Progress("comparing") as progress:
        kinds = compare(first, second, progress)
    state = differing_state(first, second)
    if args.json:
        report: dict[str, Any] = {
            "first": str(args.first),
            "second": str(args.second),
            "holds_the_same": all(kind.holds_the_same for kind in kinds),
            "kinds": [asdict(kind) | {"holds_the_same": kind.holds_the_same} for kind in kinds],
            "state": state,
        }
        print(as_json(report), end="")
        return
    for letter, each in (("A", first), ("B", second)):
        ranks = "1 rank" if each.world_size == 1 else f"{each.world_size} ranks"
        print(f"{letter}  {each.path}: step {each.step}, incarnation {each.incarnation} on {ranks}")
    print("both hold the same tensors" if all(k.holds_the_same for k in kinds) else "they hold other tensors")
    for kind in kinds:
        for line in _lines(kind):
            print(line)
    print(f"{len(state)} keys of the state differ" if state else "the state is the same")
    for key, (a, b) in state.items():
        print(f"  {key}: A {_shortened(a)}, B {_shortened(b)}")


def _lines(kind: KindDifference) -> list[str]:
    lines = [f"  {kind.kind}: {kind.num_bit_equal} of {kind.num_compared} bit-equal"]
    if kind.absolute is not None and kind.relative is not None:
        lines.append(f"    largest difference {kind.absolute.value:.3g} in {kind.absolute.tensor}")
        lines.append(
            f"    largest relative to the tensor's largest number {kind.relative.value:.3g} in {kind.relative.tensor}"
        )
    missing = (
        ("only in A", kind.only_first),
        ("only in B", kind.only_second),
        ("in another shape or dtype", kind.other_shape),
    )
    lines += [
        f"    {what}: {len(names)}, e.g. {names[0]}" if len(names) > 1 else f"    {what}: {names[0]}"
        for what, names in missing
        if names
    ]
    return lines


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _VALUE_WIDTH else f"{text[: _VALUE_WIDTH - 4]} ..."


if __name__ == "__main__":
    run_tool(main, sys.argv[1:])
