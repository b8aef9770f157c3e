"""Which thing is looked at: `inspect WHAT ...`."""

from __future__ import annotations

import sys

from decompft.launcher.worker.tools.main import run_tool


def main(argv: list[str]) -> None:
    assert argv[0] == "data", "the command line knows what can be inspected"
    from decompft.launcher.worker.tools import inspect_data

    inspect_data.main(argv[1:])


if __name__ == "__main__":
    run_tool(main, sys.argv[1:])
