"""What works on this machine, check by check with its fix; exit code 3 if something needed fails."""

from __future__ import annotations

import argparse
import sys
import warnings

from decompft.launcher.errors import RunFailed
from decompft.launcher.worker.tools.main import run_tool

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def main(argv: list[str]) -> None:
    argparse.ArgumentParser(prog="decompft doctor").parse_args(argv)
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from decompft.launcher.worker.checkup import run_checks

    warnings.simplefilter("ignore")  # the table says what matters
    table = Table()
    table.add_column("check", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("what was found, and the fix", overflow="fold")
    console, failed = Console(), []
    with console.status("looking") as status:
        for finding in run_checks():
            status.update(f"looking: {finding.name} is {finding.state}")
            text = f"{finding.text}\n  fix: {finding.fix}" if finding.fix else finding.text
            state = Text(finding.state, style=_COLOURS[finding.state])
            table.add_row(finding.name, state, Text(text))  # as it is: [gpu] is no markup
            if finding.state == "fail":
                failed.append(finding.name)
    console.print(table)
    if failed:
        raise RunFailed(f"doctor: {', '.join(failed)}: needed, and not working", "the table says what to do")


if __name__ == "__main__":
    run_tool(main, sys.argv[1:])
