"""What is executed for a plan, as data."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from test_runs import make_plan

from decompft.launcher.job import base_env, free_port, make_job, num_cores


def job_of(ranks: int, environ: dict[str, str] | None = None):  # type: ignore[no-untyped-def]
    checkpoint = Path("/runs/x/checkpoints/step-00000100")
    return make_job(
        make_plan(ranks=ranks),
        Path("/runs/x"),
        incarnation=3,
        resume=checkpoint,
        port=4242,
        environ=environ or {},
    )


WORKER = ("-m", "decompft.launcher.worker.main", "/runs/x", "--incarnation", "3")
RESUME = ("--resume", "/runs/x/checkpoints/step-00000100")


def test_several_ranks_run_under_torchrun_with_a_static_rendezvous() -> None:
    job = job_of(2)
    assert job.argv == (
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2"),
        *("--master-addr", "127.0.0.1", "--master-port", "4242", "--max-restarts", "0"),
        *WORKER,
        *RESUME,
    )
    assert "RANK" not in job.env
    assert job.env["PYTHONSAFEPATH"] == job.env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_one_rank_runs_without_torchrun() -> None:
    job = job_of(1)
    assert job.argv == (sys.executable, *WORKER, *RESUME)
    ranks = {key: job.env[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    assert ranks == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def test_cores_are_shared_among_the_ranks_of_a_cpu_run() -> None:
    assert job_of(1).env["OMP_NUM_THREADS"] == str(num_cores())
    assert job_of(2).env["OMP_NUM_THREADS"] == str(max(1, num_cores() // 2))


def test_the_users_own_settings_win_and_secrets_are_not_copied() -> None:
    theirs = {"OMP_NUM_THREADS": "7", "TOKENIZERS_PARALLELISM": "true", "HF_TOKEN": "hf_secret"}
    job = job_of(2, theirs)
    assert not job.env.keys() & theirs.keys()
    assert "hf_secret" not in repr(job)


def test_a_deterministic_run_gets_the_workspace_that_torch_asks_for() -> None:
    plan = make_plan()
    train = plan.recipe.train.model_copy(update={"deterministic": True})
    fixed = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"train": train})})
    assert base_env(fixed, {})["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "CUBLAS_WORKSPACE_CONFIG" not in base_env(fixed, {"CUBLAS_WORKSPACE_CONFIG": ":16:8"})
    assert "CUBLAS_WORKSPACE_CONFIG" not in base_env(plan, {})


def test_cuda_runs_get_expandable_segments_unless_the_user_chose() -> None:
    plan = make_plan()
    cuda = plan.model_copy(update={"world": plan.world.model_copy(update={"device": "cuda"})})
    assert base_env(cuda, {})["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        assert "PYTORCH_CUDA_ALLOC_CONF" not in base_env(cuda, {name: "backend:native"})
    assert "PYTORCH_CUDA_ALLOC_CONF" not in base_env(plan, {})


def test_free_port_can_be_bound() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))


def test_launching_never_imports_torch() -> None:
    code = (
        "import sys, decompft.launcher.local, decompft.slurm.render;"
        "print([m for m in ('torch', 'transformers', 'numpy', 'rich', 'yaml', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
