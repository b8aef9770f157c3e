"""What is executed for a plan: argv and environment as data, nothing started.

argv is a tuple, never a shell string. Secrets are inherited from the environment and never written
down: `env` holds only what is added to it.
"""

from __future__ import annotations

import math
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from decompft.launcher import fetched
from decompft.launcher.plan import Plan

WORKER = "decompft.launcher.worker.main"
PREPARE = "decompft.launcher.worker.tools.prepare"
# carried by every process of a job, so that what outlives its parent can be found
MARK = "DECOMPFT_JOB"
# seconds from torchrun's SIGTERM to the survivors of a dead rank, who save, to its SIGKILL; its own default
SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
_SHUTDOWN_S = 30


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One incarnation's processes."""

    argv: tuple[str, ...]
    env: dict[str, str]  # additions to the inherited environment
    run_dir: Path
    nodes: int
    ranks_per_node: int


def make_job(
    plan: Plan,
    run_dir: Path,
    *,
    incarnation: int,
    resume: Path | None,
    port: int,
    environ: Mapping[str, str] = os.environ,
) -> JobSpec:
    """The ranks of a plan on this machine: torchrun, or the worker itself when there is one rank."""
    worker = (WORKER, *worker_args(run_dir.absolute(), incarnation=incarnation, resume=resume))
    env = base_env(plan, environ) | {MARK: job_mark(run_dir, incarnation)}
    if (run_dir / fetched.FILE).exists():
        env |= fetched.OFFLINE
    if plan.world.size == 1:
        # without torchrun: seconds of start-up saved; its variables by hand
        argv = (sys.executable, "-m", *worker)
        env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    else:
        if SHUTDOWN not in environ:
            grace_s = math.ceil(plan.recipe.checkpoint.grace_s)
            env |= {SHUTDOWN: str(max(_SHUTDOWN_S, grace_s))}
        argv = (
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", "1", "--nproc-per-node", str(plan.world.ranks_per_node)),
            *("--master-addr", "127.0.0.1", "--master-port", str(port)),
            # restarts belong to the run, which knows its checkpoints, not to the agent
            *("--max-restarts", "0", "-m", *worker),
        )
    return JobSpec(
        argv=argv,
        env=env,
        run_dir=run_dir,
        nodes=plan.world.nodes,
        ranks_per_node=plan.world.ranks_per_node,
    )


def job_mark(run_dir: Path, incarnation: int | None = None) -> str:
    """The value of MARK; without an incarnation what those of all begin with."""
    return f"{run_dir.absolute()}#{'' if incarnation is None else incarnation}"


def worker_args(run_dir: Path, *, incarnation: int, resume: Path | None) -> tuple[str, ...]:
    """What follows the worker's module name."""
    args = (str(run_dir), "--incarnation", str(incarnation))
    return args if resume is None else (*args, "--resume", str(resume.absolute()))


def prepare_argv(run_dir: Path) -> tuple[str, ...]:
    """The child that converts and tokenizes before any process group exists."""
    return (sys.executable, "-m", PREPARE, str(run_dir))


def base_env(plan: Plan, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What every child of a launch gets on top of the inherited environment; the user's own settings win."""
    env = {
        # the repository's folders have generic names (adapters, slurm): never import them from the cwd
        "PYTHONSAFEPATH": "1",
        # the agent's store keeps a dead attempt's addresses; ranks then fail to connect
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    wishes = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    if plan.world.device == "cpu":
        wishes["OMP_NUM_THREADS"] = str(max(1, num_cores() // plan.world.ranks_per_node))
    elif "PYTORCH_ALLOC_CONF" not in environ:  # the variable's newer name
        wishes["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if plan.recipe.train.deterministic:
        wishes["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # torch refuses deterministic products without it
    return env | {key: value for key, value in wishes.items() if key not in environ}


def num_cores() -> int:
    """CPU cores this process may use, which a batch system or taskset may have narrowed."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_port() -> int:
    """A TCP port of this machine that is free now; someone may take it before torchrun does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
