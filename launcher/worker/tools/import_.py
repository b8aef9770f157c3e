"""Read an adapter of another library into our format. The name has an underscore because `import` is Python's."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from decompft.launcher.worker.tools.main import run_tool


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="decompft import")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base")
    args = parser.parse_args(argv)
    # transformers takes seconds to import: only after the arguments were read
    from decompft.launcher.worker.peft_import import import_peft
    from decompft.launcher.worker.tools.progress import say

    found = import_peft(args.folder, args.out, base=args.base, say=say)
    whole = f", and {', '.join(found.train_modules)} whole" if found.train_modules else ""
    print(
        f"{args.out}: {', '.join(found.methods)} on {found.num_layers} layers{whole}; "
        "eval, generate, merge and combine load it"
    )


if __name__ == "__main__":
    run_tool(main, sys.argv[1:])
