"""Which thing is looked at: `inspect WHAT ...`."""

from __future__ import annotations

import importlib
import sys

from decompft.launcher.worker.tools.main import run_tool

KINDS = ("data", "weights", "adapter")


def main(argv: list[str]) -> None:
    assert argv[0] in KINDS, "the command line knows what can be inspected"
    # each brings libraries of its own
    importlib.import_module(f"decompft.launcher.worker.tools.inspect_{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    run_tool(main, sys.argv[1:])
