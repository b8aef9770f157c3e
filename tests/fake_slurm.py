"""Slurm's programs as a test wants them: on PATH, answering what a real Slurm 22.05 was heard to answer.

tests/golden/slurm_22.05/ holds the recorded lines, by the job's name; `|` stands for the separator that is asked for.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

RECORDED = Path(__file__).parent / "golden" / "slurm_22.05"

_PROGRAM = """#!{python} -IS
import os, re, sys
folder, (program, *argv) = {folder!r}, (os.path.basename(sys.argv[0]), *sys.argv[1:])
with open(folder + "/calls", "a") as file:
    print(program, *argv, file=file)

def lines(name):
    try:
        return open(folder + "/" + name).read().splitlines()
    except FileNotFoundError:
        return None

def rows(name):
    ids = argv[argv.index("-j") + 1].split(",")
    return [r for r in lines(name) or []
            if any(i in r.split("|")[:2] or r.startswith(i + "_") for i in ids)], ids

if program == "squeue" and "--me" in argv:
    print(*(r.replace("|", "\\x1f") for r in lines("mine") or []), sep="\\n")
elif program == "squeue":
    found, ids = rows("squeue")
    if lines("down") is not None:
        sys.exit("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    if not found and len(ids) == 1:
        sys.exit("slurm_load_jobs error: Invalid job id specified")
    print(*(r.replace("|", "\\x1f") for r in found), sep="\\n")
elif program == "scontrol":
    found = [r for r in lines("scontrol") or [] if r.startswith("JobId=" + argv[-1] + " ")]
    if not found:
        sys.exit("slurm_load_jobs error: Invalid job id specified")
    print(*found, sep="\\n")
elif program == "sacct":
    if lines("sacct") is None:
        sys.exit("Slurm accounting storage is disabled")
    print(*(r.replace("|", "\\x1f") for r in rows("sacct")[0]), sep="\\n")
elif program == "scancel":
    does = lines("scancel-does")
    if does:
        exec("\\n".join(does))
"""


class FakeSlurm:
    """The programs' folder, and what they answer."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, bin_folder = folder / "slurm", folder / "bin"
        self.folder.mkdir()
        bin_folder.mkdir()
        for name in ("squeue", "scontrol", "sacct", "scancel"):
            path = bin_folder / name
            path.write_text(_PROGRAM.format(python=sys.executable, folder=str(self.folder)))
            path.chmod(0o755)
        patch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")

    def answer(self, *names: str, sacct: tuple[str, ...] | None = None, job_id: str | None = None) -> None:
        """Know the recorded jobs of these names.

        Args:
            sacct: those that accounting knows; None is a site without accounting.
            job_id: the number that the (only) job shall have here.
        """
        for program, chosen in (("squeue", names), ("scontrol", names), ("sacct", sacct)):
            if chosen is not None:
                text = "\n".join(line for name in chosen for line in recorded(program, name, job_id))
                (self.folder / program).write_text(text)

    def say(self, program: str, *lines: str) -> None:
        """Let a program know these lines, and no others."""
        (self.folder / program).write_text("\n".join(lines))

    def scancel_does(self, code: str) -> None:
        """Python that a fake scancel runs; `argv` is what it was called with."""
        (self.folder / "scancel-does").write_text(code)

    def calls(self, program: str) -> list[list[str]]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split()[1:] for line in lines if line.split()[0] == program]


def recorded(program: str, name: str, job_id: str | None = None) -> list[str]:
    """The lines that a program printed of the job of this name; as another job's if a number is given."""
    found = []
    for line in (RECORDED / f"{program}.txt").read_text().splitlines():
        if program == "scontrol":
            first, rest = line.split(" ", 1)
            if f"JobName={name} " in line:
                found.append(line if job_id is None else f"JobId={job_id} {rest}")
            continue
        fields = line.split("|")
        if name == fields[-3 if program == "squeue" else -1]:
            found.append("|".join(fields if job_id is None else [job_id, job_id, *fields[2:]]))
    assert found or program != "squeue", f"nothing was recorded of {name}"
    return found
