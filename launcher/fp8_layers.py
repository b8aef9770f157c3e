"""Which linear layers does `quantization.compute: fp8` leave in bfloat16, and where is it refused? Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from decompft.adapters.targets import TargetMismatch, select
from decompft.launcher.errors import AdapterError, PlanError
from decompft.launcher.machine import Machine
from decompft.launcher.models import ModelShape
from decompft.launcher.plan import World
from decompft.launcher.recipe import Recipe

# of tensor cores that take float8, as `torch._scaled_mm` asks for
MIN_CAPABILITY = (8, 9)
INSTEAD = "use quantization.compute: bfloat16; quantization.format is another matter and may stay"


def skipped(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The members of `names` that `fp8_skip` names.

    Raises:
        AdapterError: a pattern matches none.
    """
    try:
        return select(names, list(patterns), ())
    except TargetMismatch as error:
        there = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
        raise AdapterError(
            f"quantization.fp8_skip: {error}", f"the linear layers of this model are named: {there}"
        ) from error


def check_fp8(recipe: Recipe, shape: ModelShape) -> None:
    """Every pattern of `fp8_skip` names a layer.

    Raises:
        AdapterError: one does not.
    """
    skipped([name for part in shape.linears for name in shape.names(part)], recipe.quantization.fp8_skip)


def refuse_fp8(recipe: Recipe, machine: Machine, world: World) -> None:
    """fp8 products on GPUs that have none; of GPUs elsewhere nothing is known.

    Raises:
        PlanError: with the GPU's name.
    """
    found = machine.compute_capability
    if (
        recipe.quantization.compute != "fp8"
        or world.device == "cpu"
        or found is None
        or found >= MIN_CAPABILITY
    ):
        return
    needs = ".".join(map(str, MIN_CAPABILITY))
    raise PlanError(
        f"quantization.compute: fp8 needs a GPU of compute capability {needs} or higher, "
        f"{machine.gpu_name or 'this GPU'} has {found[0]}.{found[1]}",
        INSTEAD,
    )


def fp8_warnings(recipe: Recipe, world: World) -> list[str]:
    """What a plan has to say of fp8 products where they are slow."""
    if recipe.quantization.compute != "fp8" or world.device != "cpu":
        return []
    return ["quantization.compute: fp8 is emulated on a CPU: the numbers of a GPU, slower than bfloat16"]
