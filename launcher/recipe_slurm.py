"""The recipe's section on Slurm, and how its times and sizes are written, here and in a site's profile."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from decompft.launcher.recipe_section import Section

Time = Annotated[str, Field(pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")]
Memory = Annotated[str, Field(pattern=r"^\d+[KMGT]?$")]


class SlurmSection(Section):
    """What is asked of Slurm; what stands here wins over the site's profile."""

    profile: str | None = Field(
        None,
        description="the site's description: a name, or a path that ends in .yaml (docs/slurm-profiles.md)",
    )
    time: Time | None = Field(None, description="wall time, HH:MM:SS or D-HH:MM:SS")
    partition: str | None = Field(None, description="partition, as sbatch --partition")
    account: str | None = Field(None, description="account, as sbatch --account")
    cpus_per_task: int | None = Field(None, ge=1, description="cores a node's task gets")
    mem: Memory | None = Field(None, description="memory a node, e.g. 64G")
    spares: int = Field(
        0, ge=0, description="nodes asked for besides, one of which takes the place of a node that dies"
    )
    max_failures: int = Field(
        3, ge=1, description="failures in a row without a step of progress after which a job gives up"
    )
