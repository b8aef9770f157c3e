"""A sbatch on PATH that accepts what it is given and counts, and a squeue and a scancel beside it."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

_PROGRAM = """#!{python} -IS
import json, os, sys
folder, (program, *argv) = {folder!r}, (os.path.basename(sys.argv[0]), *sys.argv[1:])
if program == "squeue":
    sys.exit(print(open(folder + "/squeue").read() if os.path.exists(folder + "/squeue") else ""))
if program == "sbatch" and "--test-only" in argv:
    sys.stdin.read()
    sys.exit(print("sbatch: Job 7 to start at noon", file=sys.stderr))
text = open(argv[-1]).read() if program == "sbatch" else ""
kind = os.path.basename(argv[-1]).partition(".")[0]
if os.path.exists(folder + "/refuse") and kind == open(folder + "/refuse").read():
    sys.exit("sbatch: error: no " + kind + " today")
with open(folder + "/calls", "a+") as file:
    print(json.dumps([program, argv, text]), file=file)
    file.seek(0)
    print(sum(json.loads(line)[0] == "sbatch" for line in file))
"""


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """One call of sbatch."""

    argv: list[str]
    text: str  # of the script

    @property
    def kind(self) -> str:
        return Path(self.argv[-1]).stem

    @property
    def dependency(self) -> str:
        return next((w.partition("=")[2] for w in self.argv if w.startswith("--dependency=")), "")

    @property
    def kills_on_invalid(self) -> bool:
        return "--kill-on-invalid-dep=yes" in self.argv


class FakeSbatch:
    """The programs' folder, and what they were asked.

    The test works in `folder`, and plans for CPUs.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, bin_folder = folder / "sbatch", folder / "bin"
        self.folder.mkdir()
        bin_folder.mkdir()
        for name in ("sbatch", "squeue", "scancel"):
            path = bin_folder / name
            path.write_text(_PROGRAM.format(python=sys.executable, folder=str(self.folder)))
            path.chmod(0o755)
        patch.chdir(folder)
        patch.setenv("DECOMPFT_DEVICE", "cpu")
        patch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")

    def refuse(self, kind: str) -> None:
        """Have sbatch refuse the script of this step."""
        (self.folder / "refuse").write_text(kind)

    def live(self, *tasks: str) -> None:
        """Have squeue tell of these jobs: `27 N/A`, `27 0`."""
        rows = ("\x1f".join((*task.split(), "/elsewhere.sbatch")) for task in tasks)
        (self.folder / "squeue").write_text("\n".join(rows))

    @property
    def submitted(self) -> list[Submitted]:
        return [
            Submitted(argv=argv, text=text) for program, argv, text in self._calls() if program == "sbatch"
        ]

    @property
    def cancelled(self) -> list[str]:
        return [argv[-1] for program, argv, _ in self._calls() if program == "scancel"]

    def _calls(self) -> list[tuple[str, list[str], str]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
