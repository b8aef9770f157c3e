"""Write the base with the adapter folded in, as a plain model that transformers loads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from decompft.launcher.worker.adapter_folder import adapter_folder
from decompft.launcher.worker.tools.main import run_tool


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="decompft merge")
    parser.add_argument("adapter")
    parser.add_argument("--into", choices=("dense", "dequantized"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base")
    args = parser.parse_args(argv)
    folder = adapter_folder(args.adapter)
    # transformers takes seconds to import: only after the arguments were read
    from decompft.launcher.worker.inference import open_adapter
    from decompft.launcher.worker.merging import merge
    from decompft.launcher.worker.tools.progress import Progress, say

    adapter = open_adapter(folder, base=args.base, say=say)
    with Progress("merging") as progress:
        merge(adapter, args.into, args.out, progress=progress)
    size = sum(path.stat().st_size for path in args.out.glob("*.safetensors"))
    print(f"{args.out}: {size / 2**20:,.1f} MiB of weights; transformers loads it, and model.id takes it")


if __name__ == "__main__":
    run_tool(main, sys.argv[1:])
