"""The #SBATCH lines of a run's jobs: what the run needs, then what the site's profile asks."""

from __future__ import annotations

from decompft.launcher.errors import PlanError
from decompft.launcher.plan import Plan
from decompft.launcher.recipe import SlurmSection
from decompft.slurm.profile import PrepareSection, Profile
from decompft.slurm.profile_values import HEADER_TEXT
from decompft.slurm.site_options import site_options
from decompft.slurm.times import seconds

# Slurm looks every 30 s and may warn 60 s early; the rest is a long step and a save
WARNING_S = 180


def wanted(profile: Profile, slurm: SlurmSection) -> Profile:
    """The profile with what the recipe says in its place."""
    told = {
        "time": slurm.time, "partition": slurm.partition, "account": slurm.account, "mem": slurm.mem,
        "cpus_per_node": slurm.cpus_per_task,
    }  # fmt: skip
    return profile.model_copy(update={key: value for key, value in told.items() if value is not None})


def train_options(
    plan: Plan, profile: Profile, warning_s: int = WARNING_S, array: str | None = None
) -> list[str]:
    """What sbatch is told about the training job, one option an item.

    Args:
        profile: as `wanted` gives it.
        array: the tasks of a sweep, e.g. 0-7%2.

    Raises:
        PlanError: the time limit leaves no room for a save, or a value cannot stand in a header.
    """
    world, parallel, spares = plan.world, plan.recipe.parallel, plan.recipe.slurm.spares
    _check_time(profile.time, warning_s)
    tasks = 1 if profile.tasks == "node" else world.ranks_per_node
    fewest, most = parallel.fewest_nodes + spares, parallel.most_nodes + spares
    nodes, per_node = f"{fewest}", [f"--ntasks-per-node={tasks}"]
    if fewest < most:
        # where Slurm is told of tasks, it takes as many nodes as the fewest nodes' tasks need, and no more
        nodes, per_node = f"{fewest}-{most}", []
        profile = profile.model_copy(update={"cpus_per_node": profile.cpus_per_node or tasks})
        tasks = 1
    options = [
        f"--job-name={plan.name}",
        f"--nodes={nodes}",
        *per_node,
        *site_options(
            profile, gpus_per_node=world.ranks_per_node if world.device == "cuda" else 0, tasks_per_node=tasks
        ),
        f"--signal=B:{profile.signal}@{warning_s}",
        # also where a successor follows a stop: a node's death is Slurm's to answer
        "--no-requeue" if profile.requeue == "never" else "--requeue",
        # a node that dies takes only its ranks with it, where the others can go on
        *(["--no-kill"] if spares or most > fewest else []),
        *([f"--array={array}"] if array else []),
        # %x is the job's name; without append a restart would erase the first log
        f"--output=%x-{'%A-%a' if array else '%j'}.out",
        "--open-mode=append",
    ]
    return _checked(options, profile)


def step_options(plan: Plan, profile: Profile, kind: str) -> list[str]:
    """As `train_options`, of a job before or after the training: one task.

    Args:
        kind: prepare, which needs no GPU, merge or eval.
    """
    if kind == "prepare":
        asked = profile.prepare or PrepareSection()
        # what describes the nodes with the GPUs says nothing of these
        other: dict[str, object] = {"constraint": None, "reservation": None, "gres": [], "exclusive": False}
        told = {
            "partition": asked.partition, "mem": asked.mem, "time": asked.time, "cpus_per_node": asked.cpus,
            "qos": asked.qos, "directives": asked.directives,
        }  # fmt: skip
        profile = profile.model_copy(update=other | told)
    has_gpu = plan.world.device == "cuda" and kind != "prepare"
    options = [
        f"--job-name={plan.name}-{kind}",
        "--nodes=1",
        "--ntasks-per-node=1",
        *site_options(profile, gpus_per_node=1 if has_gpu else 0),
        "--requeue" if profile.requeue == "requeue" else "--no-requeue",
        "--output=%x-%j.out",
        "--open-mode=append",
    ]
    return _checked(options, profile)


def _checked(options: list[str], profile: Profile) -> list[str]:
    for option in options:
        key, _, value = option.removeprefix("--").partition("=")
        if value and option not in profile.directives and not HEADER_TEXT.fullmatch(value):
            raise PlanError(
                f"slurm.{key}: {value!r} cannot stand in a job script's header",
                "use letters, digits and . , : @ + / - _ only",
            )
    return options


def _check_time(limit: str | None, warning_s: int) -> None:
    if limit is None:
        return
    total_s = seconds(limit)
    assert total_s is not None, limit  # recipe and profile have checked it
    if total_s < 2 * warning_s:
        raise PlanError(
            f"slurm.time: {limit} is too short: the job is told to save {warning_s} s before its end",
            f"ask for at least {-(-2 * warning_s // 60)} minutes, e.g. 00:30:00",
        )
