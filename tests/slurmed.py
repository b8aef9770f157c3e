"""tiny_map.yaml as a job of the real Slurm, and what a test asks of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

from testbed import Cluster, cannot

from decompft.launcher.checkpoints import list_checkpoints, step_of
from decompft.launcher.processes import read_proc
from decompft.launcher.runs import RunDir

CLI = [sys.executable, "-m", "decompft.launcher.cli"]
STEPS = 40
# a step of tiny_map takes a twentieth of a second; the start of its ranks half a minute on a busy machine
START_S = 150.0
# Slurm takes a dead node for down after twice SlurmdTimeout, 30 s in the testbed, and starts its job elsewhere after
# REQUEUE_DELAY and a turn of its scheduler, 6 to 21 s; from the start before the death it was 113 s at most
REPLACED_S = 150.0 + START_S


@dataclass
class Submitted:
    """A submitted run."""

    cluster: Cluster
    folder: Path  # of submission
    run: RunDir
    job: str
    shown: str  # what `launch --slurm` said

    def rows(self) -> list[dict[str, Any]]:
        return json_lines(self.run.metrics_path)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in json_lines(self.run.path / "events.jsonl") if row["event"] == kind]

    def saved(self) -> int:
        return max((step_of(path) for path in list_checkpoints(self.run.checkpoints_dir)), default=0)

    def until_step(self, step: int, seconds: float = START_S) -> None:
        self.cluster.until(
            lambda: any(row["step"] >= step for row in self.rows()), seconds, f"step {step}\n{self.log()}"
        )

    def until_incarnation(self, number: int, seconds: float = START_S) -> None:
        self.cluster.until(
            lambda: len(self.events("start")) >= number, seconds, f"incarnation {number}\n{self.log()}"
        )

    def finished(self, seconds: float) -> None:
        """Wait for the end; the run is trained to its last step and left an adapter."""
        state = self.cluster.finished(self.job, seconds)
        assert state == "COMPLETED", f"{state}\n{self.log()}"
        assert (self.run.path / "adapter/adapter.safetensors").exists(), self.log()

    def log(self) -> str:
        """All that the job said, for a failed test."""
        files = [
            *sorted(self.run.path.glob("logs/*.out")),
            *sorted(self.run.path.glob("logs/*/launcher.log")),
        ]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-4000:]}" for path in files)

    def ranks(self) -> list[int]:
        """Process ids of this run's ranks; a cluster beside this one may train a run of the same name."""
        return [
            int(folder.name)
            for folder in Path("/proc").glob("[0-9]*")
            if b"\0RANK=" in read_proc(int(folder.name), "environ")
            and b".worker.main\0" in read_proc(int(folder.name), "cmdline")
            and os.path.realpath(folder / "cwd") == str(self.folder)
        ]

    def steps_lost(self) -> int:
        """Steps between the last that an incarnation took and where the next one began.

        From the logs of rank 0: a resumed run drops the rows of metrics.jsonl that it trains again.
        """
        lost = ended = 0
        for row in self.events("start"):
            began = step_of(Path(row["checkpoint"])) if row["checkpoint"] else 0
            lost += max(0, ended - began)
            log = self.run.rank_log(row["incarnation"], 0)
            text = log.read_text(errors="replace") if log.exists() else ""
            ended = max((int(step) for step in re.findall(r" step +(\d+)/", text)), default=began)
        return lost

    def samples(self) -> dict[int, int]:
        """A checksum of the ids of each step's samples."""
        return {row["step"]: row["samples"] for row in self.rows()}


def submit(
    cluster: Cluster,
    folder: Path,
    *words: str,
    profile: str = "",
    env: dict[str, str] | None = None,
    as_user: Sequence[str] = (),
) -> Submitted:
    """`decompft launch tiny_map --slurm site.yaml` with two nodes of one rank.

    Args:
        as_user: words before the command that make it another user's, the interpreter last.
    """
    interface = "eth0" if cluster.mode == "veth" else "lo"
    (folder / "site.yaml").write_text(
        f"network: {{interface: {interface}}}\ncpus_per_node: 2\ntime: '0:30:00'\n{profile or 'node_check: false'}\n"
    )
    argv = [
        *(as_user or CLI[:1]), *CLI[1:],
        "launch", "tiny_map", "--slurm", "site.yaml", f"train.max_steps={STEPS}", "parallel.nodes=2",
        "logging.tensorboard=false", f"data.cache_dir={folder / 'cache'}", "--run-dir", "run", *words,
    ]  # fmt: skip
    done = subprocess.run(
        argv, cwd=folder, env=job_env() | (env or {}), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    run = RunDir(folder / "run")
    job = json_lines(run.path / "slurm/jobs.jsonl")[-1]["job_id"]
    return Submitted(cluster, folder, run, job, done.stdout)


def job_env() -> dict[str, str]:
    return os.environ | {
        "DECOMPFT_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "DECOMPFT_PYTHON": sys.executable
    }  # fmt: skip


def unbroken(folder: Path) -> dict[int, int]:
    """The samples of each step of the same run on this machine, never interrupted."""
    argv = [
        *CLI, "launch", "tiny_map", f"train.max_steps={STEPS}", "logging.tensorboard=false",
        f"data.cache_dir={folder / 'cache'}", "--run-dir", "run",
    ]  # fmt: skip
    done = subprocess.run(argv, cwd=folder, env=job_env(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {row["step"]: row["samples"] for row in json_lines(folder / "run/metrics.jsonl")}


def slow_steps(folder: Path, seconds: float) -> dict[str, str]:
    """An environment in which a step takes that much longer, so that a test can interrupt where it wants to.

    Once there is a file `hurry` in the folder, it does not.
    """
    return patched(
        folder,
        f"""
        import os, sys, time, zlib
        crc32 = zlib.crc32
        def slow(*words):
            if sys._getframe(1).f_globals.get("__name__") == "decompft.launcher.worker.train":
                time.sleep(0 if os.path.exists({str(folder / "hurry")!r}) else {seconds})
            return crc32(*words)
        zlib.crc32 = slow
        """,
    )


def slow_saves(folder: Path, seconds: float) -> dict[str, str]:
    """An environment in which the ranks' fsync of a checkpoint takes so long each; several make a save."""
    return patched(
        folder,
        f"""
        import os, time
        fsync = os.fsync
        def slow(handle):
            if "RANK" in os.environ and "checkpoints" in os.readlink(f"/proc/self/fd/{{handle}}"):
                time.sleep({seconds})
            fsync(handle)
        os.fsync = slow
        """,
    )


def patched(folder: Path, text: str) -> dict[str, str]:
    """An environment in which every Python runs `text` first."""
    site = folder / "site"
    site.mkdir(exist_ok=True)
    with (site / "sitecustomize.py").open("a") as file:
        file.write(dedent(text))
    return {"PYTHONPATH": str(site)}


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that is being written: the last line may be half a row."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1] if line]


def python_for_everyone(folder: Path) -> Path:
    """This interpreter with its packages, where any user may run it; this one may lie in a private folder."""
    home, packages = Path(sys.base_prefix), Path(sysconfig.get_path("purelib"))
    checkout = Path(__file__).resolve().parents[1]  # most installations for tests are editable
    for path in (packages, *packages.parents, checkout, *checkout.parents):
        if not path.stat().st_mode & stat.S_IXOTH:
            cannot(
                f"other users cannot reach this checkout or its packages: {path} is closed to them (chmod o+x)"
            )
    version = f"python3.{sys.version_info.minor}"
    made = folder / "python"
    (made / "bin").mkdir(parents=True)
    shutil.copy2(Path(sys.executable).resolve(), made / "bin" / version)
    left_out = shutil.ignore_patterns("site-packages", "test", "tests", "__pycache__", "idlelib", "*.a")
    shutil.copytree(home / "lib" / version, made / "lib" / version, ignore=left_out, symlinks=True)
    for library in (home / "lib").glob("libpython*.so*"):
        shutil.copy2(library, made / "lib")
    site = made / "lib" / version / "site-packages"
    site.mkdir()
    (site / "packages.pth").write_text(f"import site; site.addsitedir({str(packages)!r})\n")
    script = folder / "python3"
    script.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={made}/lib exec {made}/bin/{version} "$@"\n')
    script.chmod(0o755)
    return script
