"""What is a site like? A profile describes it once: partition, GPUs, network, environment, preemption.

A default stands here and nowhere else. The recipe's `slurm` section says what one run wants and wins over this.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from decompft.launcher.errors import ProfileError, RecipeError
from decompft.launcher.recipe_section import Section
from decompft.launcher.recipe_slurm import Memory, Time
from decompft.slurm.profile_environment import Environment, NoEnvironment
from decompft.slurm.profile_values import (
    Directive,
    EnvName,
    HeaderText,
    Interface,
    Line,
    LogFolder,
    ModuleName,
)

MailEvent = Literal[
    "BEGIN", "END", "FAIL", "REQUEUE", "TIME_LIMIT", "TIME_LIMIT_50", "TIME_LIMIT_80", "TIME_LIMIT_90", "ALL"
]


class NetworkSection(Section):
    """How the nodes talk to each other."""

    interface: Interface | None = Field(
        None, description="interfaces for NCCL's and gloo's sockets; default: they look for themselves"
    )
    env: dict[EnvName, Line] = Field(
        default={}, description="further settings of the network's libraries, e.g. NCCL_IB_HCA, FI_PROVIDER"
    )


class MailSection(Section):
    """Mail that Slurm sends."""

    user: HeaderText = Field(description="address or user name")
    events: list[MailEvent] = Field(
        default=["END", "FAIL"], min_length=1, description="what is told, in sbatch's words"
    )


class PrepareSection(Section):
    """A CPU job that tokenizes and quantizes before the GPUs are asked for."""

    partition: HeaderText | None = Field(
        None, description="a partition of CPU nodes; default: the site's default"
    )
    cpus: int = Field(4, ge=1, description="cores")
    mem: Memory | None = Field(None, description="memory, e.g. 64G; default: the partition's")
    time: Time = Field("2:00:00", description="wall time, HH:MM:SS or D-HH:MM:SS")
    qos: HeaderText | None = Field(None, description="quality of service; default: the site's default")
    directives: list[Directive] = Field(default=[], description="further options of sbatch, whole")


class Profile(Section):
    """A site, checked."""

    description: str = Field("", description="a line about the site, for people")
    partition: HeaderText | None = Field(None, description="default: the site's default partition")
    account: HeaderText | None = Field(None, description="who pays, as sbatch --account")
    qos: HeaderText | None = Field(None, description="quality of service, as sbatch --qos")
    constraint: HeaderText | None = Field(None, description="features of the nodes, e.g. a100&ib")
    reservation: HeaderText | None = Field(None, description="a reservation's name")
    gpu_request: Literal["gpus-per-node", "gres"] = Field(
        "gpus-per-node", description="how GPUs are asked for: --gpus-per-node=N, or --gres=gpu:N"
    )
    gpu_type: HeaderText | None = Field(None, description="the type in that request, e.g. a100; default: any")
    gres: list[HeaderText] = Field(
        default=[], description="other generic resources of each node, NAME[:TYPE]:COUNT, e.g. lscratch:200"
    )
    cpus_per_node: int | None = Field(None, ge=1, description="cores of a node; default: the site's")
    mem: Memory | None = Field(
        None, description="memory of a node, e.g. 400G; 0: all of it; default: the partition's"
    )
    exclusive: bool = Field(False, description="no other job on the nodes (GPUs are asked for all the same)")
    time: Time | None = Field(None, description="wall time, HH:MM:SS or D-HH:MM:SS; default: the partition's")
    network: NetworkSection = NetworkSection()
    env: dict[EnvName, Line] = Field(
        default={}, description="environment variables of the job; a secret is inherited, never written here"
    )
    modules: list[ModuleName] = Field(default=[], description="modules to load, whatever the environment is")
    environment: Environment = Field(
        default=NoEnvironment(), description="where the Python on the nodes comes from"
    )
    scratch: Line | None = Field(
        None,
        description="a folder of each node for temporary files, e.g. /local/$SLURM_JOB_ID; the job sees it as "
        "DECOMPFT_SCRATCH",
    )
    logs: LogFolder | None = Field(
        None,
        description="a shared folder for the batch script's own log; default: logs/ of the run directory",
    )
    mail: MailSection | None = Field(None, description="default: no mail")
    directives: list[Directive] = Field(
        default=[], description="further options of sbatch, whole, e.g. --switches=1@00:10:00"
    )
    signal: Literal["USR1", "USR2", "TERM"] = Field(
        "USR1", description="what Slurm sends to the batch script before the time limit"
    )
    grace_s: int | None = Field(
        None,
        ge=1,
        description="seconds from a preemption's notice to the kill: GraceTime plus KillWait; default: nothing is "
        "preempted, and a run has its checkpoint.grace_s",
    )
    requeue: Literal["requeue", "successor", "never"] = Field(
        "requeue",
        description="how a run goes on: the same job again, a new job that waits for it, or by hand",
    )
    tasks: Literal["node", "gpu"] = Field(
        "node", description="one task a node that runs torchrun, or one task a GPU"
    )
    rendezvous: Literal["static", "c10d"] = Field(
        "static", description="how torchrun's agents find each other"
    )
    node_check: bool = Field(
        True, description="look at GPUs, disk, clock and links of each node before training"
    )
    node_check_s: int = Field(
        60, ge=20, description="seconds that this may take on a node, the loading of torch among them"
    )
    prepare: PrepareSection | None = Field(
        None, description="default: the training job prepares its data itself"
    )

    @model_validator(mode="after")
    def _one_way_to_meet(self) -> Self:
        if self.tasks == "gpu" and self.rendezvous == "c10d":
            raise ValueError(
                "rendezvous: c10d is torchrun's, and tasks: gpu runs none; leave rendezvous out, or set tasks: node"
            )
        return self


def default() -> Profile:
    """What holds where no profile is named."""
    return Profile()


def find(name_or_path: str, *, cwd: Path) -> Path:
    """The file that a PROFILE argument means.

    Args:
        name_or_path: a path that ends in .yaml, or a name. A name is looked up in `slurm/` and `.decompft/slurm/`
            of the current folder and of those above it as far as its repository reaches, then in the user's
            configuration, then among the examples that ship.
        cwd: the current folder.

    Raises:
        ProfileError: there is none.
    """
    if name_or_path.endswith(".yaml"):
        path = cwd / Path(name_or_path).expanduser()
        if not path.is_file():
            near = _nearest(Path(name_or_path).stem, cwd)
            raise ProfileError(f"{name_or_path}: no such file", near or _known(cwd))
        return path
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name_or_path, re.ASCII):
        raise ProfileError(
            f"{name_or_path}: neither the name of a profile nor a path that ends in .yaml",
            "a name has letters, digits and . _ - only",
        )
    for folder in folders(cwd):
        path = folder / f"{name_or_path}.yaml"
        if path.is_file():
            return path
    raise ProfileError(
        f"{name_or_path}: no profile of that name", f"{_nearest(name_or_path, cwd)} {_known(cwd)}".strip()
    )


def load(path: Path) -> Profile:
    """Read a profile.

    Raises:
        ProfileError: with the place of each thing that is wrong.
    """
    # here: a script without a profile does not pay for YAML
    from decompft.launcher.source import read_section, read_text

    try:
        return read_section(
            Profile, read_text(path, hint="`decompft doctor --slurm` lists profiles"), str(path)
        )
    except RecipeError as error:
        raise ProfileError(error.message, error.hint) from None


def schema_json() -> str:
    """The JSON Schema of a profile, for editors."""
    import json

    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Profile.model_json_schema()}
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


def folders(cwd: Path) -> tuple[Path, ...]:
    """Where a profile's name is looked up, in this order."""
    above = [cwd, *cwd.parents]
    top = next((i for i, folder in enumerate(above) if (folder / ".git").exists()), 0)
    own = [
        place for folder in above[: top + 1] for place in (folder / "slurm", folder / ".decompft" / "slurm")
    ]
    home = os.environ.get("XDG_CONFIG_HOME", "")
    config = Path(home) if os.path.isabs(home) else Path("~/.config").expanduser()
    return (*own, config / "decompft" / "slurm", _shipped())


def names(cwd: Path) -> dict[str, Path]:
    """Every profile that a name can mean here."""
    found: dict[str, Path] = {}
    for folder in folders(cwd):
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def _shipped() -> Path:
    return Path(__file__).parent / "profiles"


def _nearest(name: str, cwd: Path) -> str:
    import difflib

    near = difflib.get_close_matches(name, names(cwd), n=1)
    return f"did you mean {near[0]}?" if near else ""


def _known(cwd: Path) -> str:
    return f"known here: {', '.join(sorted(names(cwd)))}"
