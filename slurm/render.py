"""The job scripts of a run: pure functions, same input, same bytes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from decompft.launcher.job import PREPARE, WORKER, base_env
from decompft.launcher.plan import Plan
from decompft.slurm.header import WARNING_S, step_options, train_options, wanted
from decompft.slurm.profile import Profile
from decompft.slurm.profile_environment import (
    ApptainerEnvironment,
    CondaEnvironment,
    ModuleEnvironment,
    PyxisEnvironment,
    VenvEnvironment,
)
from decompft.slurm.shell_words import expanding

NODE_CHECK = "decompft.launcher.worker.tools.node_check"
BATCH = "decompft.slurm.batch"
FREE_PORT = "decompft.slurm.free_port"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a profile's environment comes to be; every item is ready for the shell."""

    python: str
    lines: tuple[str, ...] = ()  # run once by the script, before anything else
    inside: tuple[str, ...] = ()  # words before a command that run it in a container
    srun: tuple[str, ...] = ()  # options of srun that do


def train_script(
    plan: Plan,
    profile: Profile,
    *,
    run_dir: str,
    recipe: Sequence[str] = (),
    warning_s: int = WARNING_S,
    array: str | None = None,
) -> str:
    """The text to give to sbatch.

    Args:
        run_dir: on a file system that all nodes share; relative to the folder of submission.
        recipe: the recipe's path and KEY=VALUE words as the user typed them, looked up again on the cluster from
            the folder of submission; empty: what is frozen in the run directory.
        warning_s: how long before the time limit the job is told to save.
        array: the tasks of a sweep, e.g. 0-7%2; `run_dir` is then the sweep's, and each task's run is below it.

    Raises:
        PlanError: the time limit leaves no room for a save, or a value cannot stand in the script's header.
    """
    world, site = plan.world, wanted(profile, plan.recipe.slurm)
    # a rank that does not come to the end of a step saves by then
    warning_s = max(warning_s, round(plan.recipe.checkpoint.grace_s) + 60)
    words = list(recipe)
    if words:  # last, so that the node plans for what the header asks for
        words += [
            f"parallel.nodes={plan.recipe.parallel.nodes}", f"parallel.gpus_per_node={world.ranks_per_node}"
        ]  # fmt: skip
    return render(
        "train.sbatch.j2",
        directives=[Verbatim(f"#SBATCH {line}") for line in train_options(plan, site, warning_s, array)],
        array=array is not None,
        device=world.device,
        env=_env(plan),
        cpus_per_task=_cores(site, world.ranks_per_node),
        profile=site,
        setup=setup(site, world.device),
        ranks_per_node=world.ranks_per_node,
        run_dir=run_dir,
        recipe=words,
        batch=BATCH,
        # of a preemption, where the site has told us; a stop before the time limit leaves much more
        grace_s=profile.grace_s,
        node_check=NODE_CHECK,
        free_port=FREE_PORT,
        prepare=PREPARE,
        worker=WORKER,
    )


def step_script(
    plan: Plan, profile: Profile, *, kind: str, commands: Sequence[tuple[str, Sequence[str]]]
) -> str:
    """The text of a job before or after the training.

    Args:
        kind: prepare, merge or eval.
        commands: a run directory and words behind `python -m` each, run one after the other until one fails.

    Raises:
        PlanError: a value cannot stand in the script's header.
    """
    site = wanted(profile, plan.recipe.slurm)
    device = "cpu" if kind == "prepare" else plan.world.device
    return render(
        "step.sbatch.j2",
        directives=[Verbatim(f"#SBATCH {line}") for line in step_options(plan, site, kind)],
        kind=kind,
        device=device,
        env=_env(plan),
        profile=site,
        setup=setup(site, device),
        ranks_per_node=1,
        commands=commands,
    )


def setup(profile: Profile, device: str) -> Setup:
    """What a profile's `environment` means to the shell; its paths are expanded on the node."""
    environment = profile.environment
    names = list(profile.modules)
    if isinstance(environment, ModuleEnvironment):
        names += environment.load
    # a script's shell has the command only where it was exported to it
    lines = ["# shellcheck disable=SC1091", "type module >/dev/null 2>&1 || . /etc/profile"] if names else []
    lines += [f"module load {shlex.quote(name)} || exit 2" for name in names]
    if isinstance(environment, VenvEnvironment):
        return Setup(lines=tuple(lines), python=expanding(f"{environment.path}/bin/python"))
    if isinstance(environment, CondaEnvironment):
        conda = expanding(f"{environment.base}/bin/conda") if environment.base else "conda"
        which = expanding(environment.name or environment.prefix or "")
        lines += [f'eval "$({conda} shell.bash hook)"', f"conda activate {which} || exit 2"]
    if isinstance(environment, ApptainerEnvironment):
        binds = [word for bind in environment.binds for word in ("--bind", expanding(bind))]
        gpus = ["--nv"] if device == "cuda" else []
        options = [shlex.quote(option) for option in environment.options]
        inside = (
            "apptainer",
            "exec",
            "--pwd",
            '"$PWD"',
            *gpus,
            *binds,
            *options,
            expanding(environment.image),
        )
        return Setup(lines=tuple(lines), inside=inside, python=expanding(environment.python))
    if isinstance(environment, PyxisEnvironment):
        mounts = '"' + ",".join(expanding(mount)[1:-1] for mount in environment.mounts) + '"'  # one word
        # else a command starts in the image's own folder
        srun = [f"--container-image={expanding(environment.image)}", '--container-workdir="$PWD"']
        srun += [f"--container-mounts={mounts}"] if environment.mounts else []
        srun += [shlex.quote(option) for option in environment.options]
        return Setup(lines=tuple(lines), srun=tuple(srun), python=expanding(environment.python))
    return Setup(lines=tuple(lines), python=expanding(environment.python))


def render(template: str, **values: object) -> str:
    """A template of slurm/templates; a variable that is not given is an error, and every value is quoted."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("decompft.slurm", "templates"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        # every value is quoted, wherever it stands; the template itself has no say in it
        finalize=quote,
    )
    environment.filters["expanding"] = lambda text: Verbatim(expanding(text))
    environment.filters["verbatim"] = Verbatim
    return environment.get_template(template).render(values)


class Verbatim(str):
    """Text that was checked to be safe where it stands."""


def quote(value: object) -> str:
    return value if isinstance(value, Verbatim) else shlex.quote(str(value))


def _env(plan: Plan) -> dict[str, str]:
    """Without the number of threads, which the node knows."""
    return {key: value for key, value in sorted(base_env(plan, {}).items()) if key != "OMP_NUM_THREADS"}


def _cores(profile: Profile, ranks_per_node: int) -> int | None:
    """Of one task: srun does not take over what sbatch was told."""
    if profile.cpus_per_node is None or profile.tasks == "node":
        return profile.cpus_per_node
    return max(1, profile.cpus_per_node // ranks_per_node)
