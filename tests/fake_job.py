"""A job script's surroundings: a fake srun, Slurm and Python on PATH that record what they are asked."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path
from textwrap import dedent

# a Python that records what it was asked and answers as the real modules would
PYTHON = """
    #!/bin/bash
    if [[ $2 == *free_port ]]; then echo 4242; exit; fi
    printf '%s\\0' "$@" >> calls; printf '\\n' >> calls
    case "$2 $3" in
    *batch\\ begin) number=$(ls "$4/incarnations" 2>/dev/null | wc -l); number=$((number + 7))
        [ "${BEGIN_CODE:-0}" != 0 ] || mkdir -p "$4/incarnations/$number" "$4/logs/incarnation-$number"
        echo "${BEGUN:-start $number 10.0.0.1 2 vn-1,vn-2 300 $CHECKPOINT}"; exit "${BEGIN_CODE:-0}" ;;
    *node_check*) exit 0 ;;
    *batch\\ checked) echo "$CHECKED" ;;
    *batch\\ succeed) echo $WAITING ;;
    *prepare*) eval "$PREPARE_DOES"; exit "${PREPARE_CODE:-0}" ;;
    *batch\\ end) if [ -e "$4/incarnations/7/stop" ]; then echo "$STOPPED"; exit 0; fi
        if [ "$5" = 7 ]; then echo "$ENDED"; else echo 'exit 0'; fi ;;
    esac
"""
# runs the command of the step as node 1, after what the test wants of it
SRUN = """
    #!/bin/bash
    [[ $* == *node_check* ]] || eval "$SRUN_DOES"
    while [[ $1 == --* ]]; do shift; done
    SLURM_NODEID=1 exec "$@"
"""
SCONTROL = """
    #!/bin/bash
    if [ "$2" = hostnames ]; then printf 'vn-1\\nvn-2\\n'; exit; fi
    echo "scontrol $*" >> slurm; [[ $1 != requeue* ]] || exit "${REQUEUE_CODE:-0}"
"""
SBATCH = """
    #!/bin/bash
    echo "sbatch ${*%%--wrap*}" >> slurm; echo 99
"""
SQUEUE = """
    #!/bin/bash
    case $* in *%T*) echo "${STATE:-RUNNING} ${EXCLUDED:-(null)}" ;; esac
"""
PROGRAMS = {
    "python": PYTHON, "srun": SRUN, "scontrol": SCONTROL, "sbatch": SBATCH, "squeue": SQUEUE,
    "sinfo": "#!/bin/bash\n", "sleep": "#!/bin/bash\n",
}  # fmt: skip
KNOWN = {
    "SLURM_JOB_NODELIST": "vn-[1-2]",
    "SLURMD_NODENAME": "vn-1",
    "SLURM_JOB_ID": "5", "SLURM_JOB_PARTITION": "gpu", "SRUN_DOES": "", "CHECKPOINT": "-", "CHECKED": "fit -",
    "ENDED": "exit 0", "STOPPED": "exit 75", "PREPARE_DOES": "", "WAITING": "",
}  # fmt: skip


class Cluster:
    """A folder of submission with fake commands on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder / "submit", folder / "bin"
        self.folder.mkdir()
        self.bin.mkdir()
        for name, text in PROGRAMS.items():
            path = self.bin / name
            path.write_text(dedent(text).lstrip())
            path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def run(self, text: str, **env: str) -> int:
        path = f"{self.bin}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash"], input=text, text=True, cwd=self.folder, env=os.environ | KNOWN | {"PATH": path} | env,
            timeout=60, capture_output=True,
        )  # fmt: skip
        assert "unbound variable" not in done.stderr and "syntax error" not in done.stderr, done.stderr
        return done.returncode

    @property
    def calls(self) -> list[list[str]]:
        lines = (self.folder / "calls").read_bytes().decode().split("\0\n")
        return [line.split("\0") for line in lines if line]

    @property
    def asked(self) -> list[str]:
        """What Slurm was told to do."""
        path = self.folder / "slurm"
        return path.read_text().splitlines() if path.exists() else []

    def starts(self) -> int:
        return sum("torch.distributed.run" in call for call in self.calls)
