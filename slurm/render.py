"""The job script for a plan: a pure function, same input, same bytes.

A first version, for the plain case. No test runs it on a Slurm; by hand it ran on two virtual nodes of
Slurm 22.05 (finished, and stopped by USR1 and continued), never with GPUs or on a real cluster. It does not
requeue itself: exit 75 means that the state is saved and the same script continues it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from decompft.launcher.errors import PlanError
from decompft.launcher.job import WORKER, base_env
from decompft.launcher.plan import Plan

# Slurm looks every 30 s and may warn 60 s early; the rest is a long step and a save
WARNING_S = 180


def script(plan: Plan, *, recipe_path: str, run_dir: str, overrides: Sequence[str] = ()) -> str:
    """The text to give to sbatch.

    Args:
        recipe_path: as the user typed it; looked up again on the cluster, from the folder of submission.
        run_dir: on a file system that all nodes share; relative to the folder of submission.
        overrides: KEY=VALUE as the user typed them.

    Raises:
        PlanError: the time limit leaves no room for a save, or a value cannot stand in the script's header.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("decompft.slurm", "templates"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        # every value is quoted, wherever it stands; the template itself has no say in it
        finalize=_quote,
    )
    _check_time(plan.recipe.slurm.time)
    world = plan.world
    pinned = [f"parallel.nodes={world.nodes}", f"parallel.gpus_per_node={world.ranks_per_node}"]
    return environment.get_template("train.sbatch.j2").render(
        directives=_directives(plan),
        device=world.device,
        env={k: v for k, v in sorted(base_env(plan, {}).items()) if k != "OMP_NUM_THREADS"},
        cpus_per_task=plan.recipe.slurm.cpus_per_task,
        ranks_per_node=world.ranks_per_node,
        run_dir=run_dir,
        # last, so that the node plans for what the header asks for
        recipe=[recipe_path, *overrides, *pinned],
        worker=WORKER,
    )


def _directives(plan: Plan) -> list[str]:
    """The #SBATCH lines; sbatch expands nothing in them and splits at spaces."""
    slurm, world = plan.recipe.slurm, plan.world
    values: list[tuple[str, object]] = [
        ("job-name", plan.name),
        ("nodes", world.nodes),
        ("ntasks-per-node", 1),
        ("cpus-per-task", slurm.cpus_per_task),
        ("gpus-per-node", world.ranks_per_node if world.device == "cuda" else None),
        ("mem", slurm.mem),
        ("time", slurm.time),
        ("partition", slurm.partition),
        ("account", slurm.account),
        ("signal", f"B:USR1@{WARNING_S}"),
        # %x is the job's name; without append a restart would erase the first log
        ("output", "%x-%j.out"),
        ("open-mode", "append"),
    ]
    lines: list[str] = []
    for key, value in values:
        if value is None:
            continue
        if not re.fullmatch(r"[\w.,:@%+/-]+", str(value), re.ASCII):
            raise PlanError(
                f"slurm.{key}: {value!r} cannot stand in a job script's header",
                "use letters, digits and . , : @ + / - _ only",
            )
        lines.append(_Verbatim(f"#SBATCH --{key}={value}"))
    return lines


def _check_time(limit: str | None) -> None:
    if limit is None:
        return
    days, _, clock = limit.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    total_s = int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds
    if total_s < 2 * WARNING_S:
        raise PlanError(
            f"slurm.time: {limit} is too short: the job is told to save {WARNING_S} s before its end",
            f"ask for at least {2 * WARNING_S // 60} minutes, e.g. 00:30:00",
        )


class _Verbatim(str):
    """Text that was checked to be safe where it stands."""


def _quote(value: object) -> str:
    return value if isinstance(value, _Verbatim) else shlex.quote(str(value))
