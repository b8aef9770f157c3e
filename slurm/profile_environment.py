"""Where does the Python that runs on the nodes come from?"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from decompft.launcher.recipe_section import Section
from decompft.slurm.profile_values import Line, ModuleName, Mount, Option

_PYTHON = "the interpreter's name or path"


class NoEnvironment(Section):
    """What is on PATH when the job starts."""

    kind: Literal["none"] = Field("none", description="nothing is set up")
    python: Line = Field("python", description=_PYTHON)


class ModuleEnvironment(Section):
    """An interpreter that environment modules bring."""

    kind: Literal["module"] = Field(description="`module load` of each name, after the profile's `modules`")
    load: list[ModuleName] = Field(min_length=1, description="modules, in this order")
    python: Line = Field("python", description=_PYTHON)


class VenvEnvironment(Section):
    """A virtual environment on a file system that all nodes share."""

    kind: Literal["venv"] = Field(description="`PATH/bin/python` runs")
    path: Line = Field(description="the environment's folder")


class CondaEnvironment(Section):
    """A conda environment; exactly one of `name` and `prefix`."""

    kind: Literal["conda"] = Field(description="`conda activate`")
    name: Line | None = Field(None, description="the environment's name")
    prefix: Line | None = Field(None, description="the environment's folder")
    base: Line | None = Field(None, description="folder of the conda installation; default: `conda` of PATH")
    python: Line = Field("python", description=_PYTHON)

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.name is None) == (self.prefix is None):
            raise ValueError("kind conda needs exactly one of name and prefix")
        return self


class ApptainerEnvironment(Section):
    """An Apptainer (Singularity) image; the script itself stays outside."""

    kind: Literal["apptainer"] = Field(description="`apptainer exec IMAGE`, with --nv for GPUs")
    image: Line = Field(description="a .sif file on a shared file system, or docker://...")
    binds: list[Line] = Field(default=[], description="folders seen inside, SRC or SRC:DST[:OPTIONS] each")
    options: list[Option] = Field(
        default=[], description="further options of `apptainer exec`, --name=value, one an item"
    )
    python: Line = Field("python", description="the interpreter inside the image")


class PyxisEnvironment(Section):
    """An enroot container started by Slurm's plugin pyxis; the script itself stays outside."""

    kind: Literal["pyxis"] = Field(description="`srun --container-image=IMAGE`")
    image: Line = Field(description="a .sqsh file on a shared file system, or REGISTRY#IMAGE:TAG")
    mounts: list[Mount] = Field(default=[], description="folders seen inside, SRC:DST[:FLAGS] each")
    options: list[Option] = Field(
        default=[], description="further --container-name=value options of srun, one an item"
    )
    python: Line = Field("python", description="the interpreter inside the image")


Environment = Annotated[
    NoEnvironment
    | ModuleEnvironment
    | VenvEnvironment
    | CondaEnvironment
    | ApptainerEnvironment
    | PyxisEnvironment,
    Field(discriminator="kind"),
]
