"""What does the controller say of its partitions and nodes? Reads scontrol's one-line records, never JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from decompft.launcher.errors import SlurmError
from decompft.slurm.commands import call
from decompft.slurm.times import seconds

_UNITS_MIB = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A queue and its limits; a limit that is None does not exist."""

    name: str
    state: str  # UP, DOWN, DRAIN, INACTIVE
    is_default: bool
    max_time_s: int | None
    default_time: str  # as Slurm writes it
    max_cpus: int | None  # of a node
    max_mem_mib: int | None  # of a node
    grace_s: int
    preempt_mode: str  # OFF, REQUEUE, CANCEL, SUSPEND, GANG,SUSPEND
    nodes: str  # names with brackets, "" for none
    allowed: dict[str, tuple[str, ...] | None]  # groups, accounts, qos; None: everybody
    denied: dict[str, tuple[str, ...]]  # accounts, qos


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node's hardware, as its administrator wrote it down."""

    name: str
    state: str  # IDLE, MIXED+DRAIN, DOWN*, ...
    cpus: int
    mem_mib: int
    features: frozenset[str]
    gres: tuple[tuple[str, str, int], ...]  # name, type or "", how many

    @property
    def is_up(self) -> bool:
        return not re.search(r"DOWN|DRAIN|FAIL|\*|NOT_RESPONDING|UNKNOWN|FUTURE", self.state)

    def gpus(self, kind: str | None) -> int:
        """GPUs of a type, or of any."""
        return sum(n for name, of, n in self.gres if name == "gpu" and kind in (None, of))


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster at one moment."""

    version: str
    config: dict[str, str]  # `scontrol show config`
    partitions: tuple[Partition, ...]

    def partition(self, name: str | None) -> Partition | None:
        """By its name; without one, the site's default."""
        wanted = (p for p in self.partitions if (p.is_default if name is None else p.name == name))
        return next(wanted, None)

    def number(self, key: str, default: int) -> int:
        """A setting such as `30 sec` or `1`."""
        found = re.match(r"\d+", self.config.get(key, ""))
        return int(found[0]) if found else default


def read_cluster() -> Cluster:
    """Ask the controller.

    Raises:
        SlurmError: there is no Slurm here, or its controller does not answer.
    """
    version = _answer(["sbatch", "--version"])
    pairs = (line.partition("=") for line in _answer(["scontrol", "show", "config"]).splitlines())
    config = {key.strip(): value.strip() for key, equals, value in pairs if equals}
    records = _answer(["scontrol", "--all", "--oneliner", "show", "partition"]).splitlines()
    partitions = tuple(_partition(_fields(line)) for line in records if line.startswith("PartitionName="))
    return Cluster(version=version.strip(), config=config, partitions=partitions)


def read_nodes(partition: Partition) -> tuple[Node, ...]:
    """The nodes of a partition; raises as `read_cluster`."""
    if not partition.nodes:
        return ()
    records = _answer(["scontrol", "--all", "--oneliner", "show", "node", partition.nodes]).splitlines()
    return tuple(_node(_fields(line)) for line in records if line.startswith("NodeName="))


def mebibytes(text: str) -> float:
    """Memory as sbatch reads it: a number is in MiB, K, M, G and T are units."""
    return float(text.rstrip("KMGT")) * _UNITS_MIB[text[-1] if text[-1] in _UNITS_MIB else "M"]


def _answer(argv: Sequence[str]) -> str:
    answer = call(argv)
    if answer.code != 0:
        raise SlurmError(
            f"{' '.join(argv)}: {answer.words}", "`scontrol ping` says whether the controller is up"
        )
    return answer.stdout


def _fields(line: str) -> dict[str, str]:
    # a value may hold blanks (OS=Linux 6.1 ..., Reason=...); the ones that are read here do not
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def _partition(fields: dict[str, str]) -> Partition:
    allowed = {"groups": "AllowGroups", "accounts": "AllowAccounts", "qos": "AllowQos"}
    nodes = fields.get("Nodes", "")
    return Partition(
        name=fields["PartitionName"],
        state=fields.get("State", "UP"),
        is_default=fields.get("Default") == "YES",
        max_time_s=seconds(fields.get("MaxTime", "")),
        default_time=fields.get("DefaultTime", "NONE"),
        max_cpus=_limit(fields.get("MaxCPUsPerNode")),
        max_mem_mib=_limit(fields.get("MaxMemPerNode")),
        grace_s=_limit(fields.get("GraceTime")) or 0,
        preempt_mode=fields.get("PreemptMode", "OFF"),
        nodes="" if nodes == "(null)" else nodes,
        allowed={who: _names(fields.get(key, "ALL")) for who, key in allowed.items()},
        denied={
            who: _names(fields.get(key, "")) or ()
            for who, key in (("accounts", "DenyAccounts"), ("qos", "DenyQos"))
        },
    )


def _node(fields: dict[str, str]) -> Node:
    words = f"{fields.get('AvailableFeatures', '')},{fields.get('ActiveFeatures', '')}"
    return Node(
        name=fields["NodeName"],
        state=fields.get("State", ""),
        cpus=int(fields.get("CPUTot", 0)),
        mem_mib=int(fields.get("RealMemory", 0)),
        features=frozenset(re.split("[,&]", words)) - {"", "(null)"},
        gres=tuple(_gres(fields.get("Gres", ""))),
    )


def _gres(text: str) -> list[tuple[str, str, int]]:
    """`gpu:a100:4(S:0-1),lscratch:200G` and the like."""
    found = []
    for entry in re.sub(r"\([^)]*\)", "", text).split(","):
        parts = entry.split(":")
        count = re.fullmatch(r"(\d+)([KMGT]?)", parts[-1])
        if parts[0] and count:
            unit = 1024 ** " KMGT".index(count[2] or " ")
            found.append((parts[0], parts[1] if len(parts) == 3 else "", int(count[1]) * unit))
    return found


def _limit(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _names(text: str) -> tuple[str, ...] | None:
    return None if text == "ALL" else tuple(name for name in text.split(",") if name and name != "(null)")
