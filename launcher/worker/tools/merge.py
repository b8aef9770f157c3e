"""Write the base with the adapter folded in, as a plain model that transformers loads, and compare the two."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decompft.launcher.errors import UserError
from decompft.launcher.outcome import write_atomic
from decompft.launcher.quantized_checkpoint import is_quantized
from decompft.launcher.worker.adapter_folder import adapter_folder
from decompft.launcher.worker.tools.main import run_tool

if TYPE_CHECKING:
    from decompft.launcher.worker.held_out import HeldOut
    from decompft.launcher.worker.inference import Adapter

CHECK_TOKENS = 4096
RECORD = "merge.json"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="decompft merge")
    parser.add_argument("adapter")
    parser.add_argument("--into", choices=("dense", "dequantized", "requantized"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base")
    parser.add_argument("--check-data", type=Path)
    parser.add_argument("--check-tokens", type=int)
    parser.add_argument("--no-check", action="store_true")
    args = parser.parse_args(argv)
    _check_flags(args)
    folder = adapter_folder(args.adapter)
    # transformers takes seconds to import: only after the arguments were read
    from decompft.launcher.worker.inference import open_adapter
    from decompft.launcher.worker.merging import check_mergeable, merge
    from decompft.launcher.worker.tools.progress import Progress, say

    adapter = open_adapter(folder, base=args.base, say=say)
    check_mergeable(adapter, args.into, args.out)
    if args.into == "requantized" and adapter.model_dir is not None and is_quantized(adapter.model_dir):
        say("the base is quantized already: most of what was learned may be rounded away (docs/merge.md)")
    held_out = (
        None if args.no_check else _held_out(adapter, args.check_data, args.check_tokens or CHECK_TOKENS)
    )
    with Progress("merging") as progress:
        unmerged = merge(adapter, args.into, args.out, progress=progress)
    size = sum(path.stat().st_size for path in args.out.glob("*.safetensors"))
    print(f"{args.out}: {size / 2**20:,.1f} MiB of weights; transformers loads it, and model.id takes it")
    record = _identity(folder, args.into)
    if unmerged.layer:
        is_possible = math.isfinite(unmerged.error)
        record["unmerge"] = {"layer": unmerged.layer, "error": unmerged.error if is_possible else None}
        how_well = f"to {unmerged.error:.1e} of its norm at worst" if is_possible else "nowhere: a scale is 0"
        print(f"taking the change off again gives the base's weight back {how_well} ({unmerged.layer})")
    _write(args.out, record)
    if held_out is not None:
        _write(args.out, record | {"check": _check(adapter, args.out, held_out, args.base)})


def _check_flags(args: argparse.Namespace) -> None:
    for name in ("check_data", "check_tokens"):
        if args.no_check and getattr(args, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} has no effect with --no-check", "leave one of them out"
            )
    if args.check_tokens is not None and args.check_tokens < 1:
        raise UserError(
            f"--check-tokens {args.check_tokens}: must be at least 1", "--no-check compares nothing"
        )


def _held_out(adapter: Adapter, data: Path | None, max_tokens: int) -> HeldOut | None:
    """What to compare on, found before the merge, which takes longer."""
    from decompft.launcher.worker.held_out import rows_of_file, rows_of_run
    from decompft.launcher.worker.tools.progress import say

    if data is not None:
        return rows_of_file(data, adapter, max_tokens)
    found = rows_of_run(adapter, max_tokens)
    if isinstance(found, str):
        say(f"not compared with the unmerged model: {found}; give held-out records with --check-data FILE")
        return None
    return found


def _check(adapter: Adapter, out: Path, held_out: HeldOut, base: str | None) -> dict[str, Any]:
    from decompft.launcher.worker.divergence import measure
    from decompft.launcher.worker.tools.progress import Progress

    with Progress("comparing with the unmerged model") as progress:
        found = measure(adapter, out, held_out.rows, base=base, progress=progress)
    what = "records" if adapter.model.task == "sequence-classification" else "tokens"
    print(
        f"KL(unmerged || merged) {found.kl_nats:.3g} nats a {what[:-1]}, top-1 agreement "
        f"{found.top1_agreement:.2%}, over {found.num_tokens:,} {what} of {held_out.source}"
    )
    return {**asdict(found), "data": held_out.source}


def _identity(folder: Path, into: str) -> dict[str, Any]:
    """Which adapter over which base this is."""
    description = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
    return {
        "into": into,
        "adapter": {
            "folder": str(folder.resolve()),
            "sha256": description["sha256"],
            "method": description["adapter"]["method"],
        },
        "base": description["base"],
    }


def _write(out: Path, record: dict[str, Any]) -> None:
    write_atomic(out / RECORD, json.dumps(record, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    run_tool(main, sys.argv[1:])
