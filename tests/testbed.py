"""A real Slurm of virtual nodes on this machine, for tests that submit.

The testbed's scripts are found by DECOMPFT_SLURM_TESTBED, default beside the checkout. Tests that use it are marked
`slurm`; without it they are skipped with the reason, but in CI (the variable CI is set by .ci/run) they fail.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

TESTBED = Path(
    os.environ.get("DECOMPFT_SLURM_TESTBED", Path(__file__).resolve().parents[2] / "shared/slurm-testbed")
)
LIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "RESIZING")


@dataclass
class Cluster:
    """The running testbed, as a test sees it."""

    folder: Path  # of the testbed's state
    mode: str  # ns, plain or veth

    def run(self, *argv: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """Run a program of Slurm's; its stdout. A code other than 0 fails the test."""
        done = subprocess.run(
            argv, cwd=cwd, env=os.environ | (env or {}), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *argv: str, cwd: Path, env: dict[str, str] | None = None) -> str:
        """sbatch --parsable; the job's id."""
        return self.run("sbatch", "--parsable", *argv, cwd=cwd, env=env).split(";")[0]

    def show(self, job: str) -> dict[str, str]:
        """`scontrol show job`, as far as its values hold no blank."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def until(self, is_true: Callable[[], Any], seconds: float, what: str = "") -> Any:
        """Wait for a truth, and return it; the test fails when the time is up."""
        end = time.monotonic() + seconds
        while True:
            found = is_true()
            if found:
                return found
            assert time.monotonic() < end, (
                f"not within {seconds} s: {what}\n{self.run('squeue', '-o', '%all')}"
            )
            time.sleep(0.2)

    def finished(self, job: str, seconds: float) -> str:
        """Wait for a job's end; its state."""
        self.until(lambda: self.state(job) not in LIVE, seconds, f"the end of job {job}")
        return self.state(job)

    def node(self, *words: str) -> None:
        """`node kill NAME`, `node start NAME`, ... of the testbed."""
        done = subprocess.run([str(TESTBED / "node"), *words], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    def cancel_all(self) -> None:
        """End every job, and wait until the nodes are free.

        Not only what a test has submitted: its jobs submit successors, and one left behind takes a node of every
        later test, and of every later session, for the testbed keeps its queue.
        """
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            jobs = self.run("squeue", "-h", "-o", "%F").split()  # of an array its own id
            if jobs:
                subprocess.run(["scancel", *jobs], capture_output=True, timeout=60)
            # a node that a test killed and started again, too: until it is idle, the next job's first is another
            elif set(self.run("sinfo", "-h", "-N", "-o", "%t").split()) == {"idle"}:
                return
            time.sleep(0.2)
        nodes = self.run("sinfo", "-N", "-o", "%N %t %E")
        warnings.warn(f"the cluster is not free:\n{self.run('squeue')}\n{nodes}", stacklevel=2)


def start(
    patch: pytest.MonkeyPatch, *, number: int, settings: Mapping[str, str] | None = None
) -> Iterator[Cluster]:
    """Bring a testbed up (or take the one that runs), with this process's environment set to it.

    Args:
        number: several can stand side by side, with the same node names.
        settings: of `up`, behind SLURM_TESTBED_.
    """
    if why := _why_not():
        cannot(why)
    folder = Path(os.environ.get("SLURM_TESTBED_DIR", "/tmp/slurm-testbed"))
    for name, value in (settings or {}).items():
        patch.setenv(f"SLURM_TESTBED_{name}", value)
    if number:
        folder = folder.with_name(f"{folder.name}-{number}")
        patch.setenv("SLURM_TESTBED_DIR", str(folder))
        port = int(os.environ.get("SLURM_TESTBED_PORT", "16810")) + 60 * number
        patch.setenv("SLURM_TESTBED_PORT", str(port))
        patch.setenv("SLURM_TESTBED_ETC_LINK", "0")
    was_up = subprocess.run([str(TESTBED / "status")], capture_output=True, timeout=60).returncode == 0
    with _alone():
        done = subprocess.run([str(TESTBED / "up")], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    mode = next(word for word in ("veth", "plain", "ns") if f"mode {word}" in done.stderr)
    cluster = Cluster(folder, mode)
    try:
        cluster.cancel_all()  # a session that was killed left its own
        yield cluster
    finally:
        if not was_up:
            with _alone():
                subprocess.run([str(TESTBED / "down")], capture_output=True, timeout=120)


@contextmanager
def _alone() -> Iterator[None]:
    """Two testbeds that write /etc/hosts at once lose each other's node names."""
    with Path("/tmp/decompft-testbed.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cannot(why: str) -> NoReturn:
    """Skip what this machine cannot run, with the reason; in CI it fails."""
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


def _why_not() -> str:
    if not (TESTBED / "up").exists():
        return f"there is no Slurm testbed at {TESTBED} (DECOMPFT_SLURM_TESTBED)"
    if os.geteuid() != 0:
        return "the Slurm testbed needs root"
    return ""
