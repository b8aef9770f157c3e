"""`decompft report`: which runs, which page, which file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from decompft.launcher import report_compare, report_page
from decompft.launcher.errors import UserError
from decompft.launcher.outcome import write_atomic
from decompft.launcher.report_data import read_run
from decompft.launcher.runs import find_run

FILE = "report.html"


def write_report(names: Sequence[str], out: Path | None = None) -> Path:
    """Write one self-contained HTML page about a run, or about several side by side.

    Args:
        names: run folders, or names under ./runs.
        out: default report.html in the run's folder; of several runs, in the current folder.

    Raises:
        UserError: a name is no run, or the page cannot be written there.
    """
    paths = [_find(name) for name in names]
    now_s = time.time()
    several = [read_run(path, now_s) for path in dict.fromkeys(paths)]
    html = report_page.render(several[0]) if len(several) == 1 else report_compare.render(several)
    target = out or (several[0].run.path / FILE if len(several) == 1 else Path(FILE))
    try:
        write_atomic(target, html)
    except OSError as error:
        raise UserError(
            f"{target}: the report cannot be written ({error.strerror or error})",
            "choose another place with --out FILE",
        ) from error
    return target


def _find(name: str) -> Path:
    path = find_run(name)
    if not path.exists():
        raise UserError(f"{name}: no such run", "give a run's folder, or its name under ./runs")
    return path
