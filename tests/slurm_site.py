"""Stand-ins for Slurm's programs: a site of two GPU nodes and a CPU node, as scontrol and sacctmgr would tell of it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from decompft.slurm.check_limits import Finding
from decompft.slurm.check_profile import check_profile
from decompft.slurm.profile import Profile

CONFIG = """\
Configuration data as of 2026-11-22T15:00:00
AccountingStorageEnforce = associations,limits,qos
AuthInfo                = (null)
ClusterName             = mill
JobRequeue              = 1
KillWait                = 30 sec
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
SelectType              = select/cons_tres
SlurmctldParameters     = (null)
"""
PARTITION = (
    "PartitionName={name} AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=NO DefaultTime=NONE GraceTime=0 "
    "MaxTime=1-00:00:00 MaxCPUsPerNode=UNLIMITED Nodes={nodes} PreemptMode=OFF State=UP MaxMemPerNode=UNLIMITED"
)
NODE = (
    "NodeName={name} Arch=x86_64 CPUTot=64 AvailableFeatures=ib,a100 ActiveFeatures=ib,a100 Gres={gres} "
    "OS=Linux 6.1 #1 SMP RealMemory=512000 State=IDLE Partitions=gpu Reason=none at all [root@x]"
)


class Site:
    """Programs that answer as a cluster would; PATH holds nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        gpu = PARTITION.format(name="gpu", nodes="g[1-2]")
        self.partitions = {
            "gpu": gpu,
            "cpu": PARTITION.format(name="cpu", nodes="c1").replace("Default=NO", "Default=YES"),
            "spare": gpu.replace("=gpu", "=spare").replace("PreemptMode=OFF", "PreemptMode=REQUEUE")
            .replace("GraceTime=0", "GraceTime=120"),
        }  # fmt: skip
        gres = "gpu:a100:4(S:0-1),lscratch:900"
        self.nodes = {
            "g[1-2]": [NODE.format(name="g1", gres=gres), NODE.format(name="g2", gres=gres)],
            "c1": [NODE.format(name="c1", gres="(null)").replace("ib,a100", "(null)")],
        }
        self.config = CONFIG
        self.program("sbatch", '[ "$1" = --version ] && echo slurm 24.05.1 && exit\nread -d "" -r all; echo '
                     '"$all" >"$0.stdin"; echo "sbatch: Job 7 to start at noon" >&2')  # fmt: skip
        self.program("sacctmgr", 'echo "nlp|normal,low|"; echo "vision|normal|"')
        self.program("srun", "echo usage")

    def program(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def write(self) -> None:
        """The controller, with what the fields hold now."""
        cases = [f"'show config') {self._print(self.config)}"]
        cases.append(f"'--all --oneliner show partition') {self._print(*self.partitions.values())}")
        for names, lines in self.nodes.items():
            cases.append(f"'--all --oneliner show node {names}') {self._print(*lines)}")
        cases.append(
            "'--oneliner show reservation') echo 'ReservationName=course StartTime=noon State=ACTIVE'"
        )
        cases.append(
            "'--oneliner show reservation course') echo 'ReservationName=course StartTime=noon EndTime=six'"
        )
        cases.append('*) echo "$* not found" >&2; exit 1')
        self.program("scontrol", 'case "$*" in\n' + "\n".join(f"{case} ;;" for case in cases) + "\nesac")

    def _print(self, *lines: str) -> str:
        return "printf '%s\\n' " + " ".join(f"'{line}'" for line in lines)

    def check(self, **fields: object) -> dict[str, Finding]:
        if not (self.folder / "bin/scontrol").exists():
            self.write()
        return {finding.name: finding for finding in check_profile(Profile(**fields))}  # type: ignore[arg-type]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return Site(tmp_path)
