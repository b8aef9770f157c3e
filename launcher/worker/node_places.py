"""Are the folders, the memory and the versions of this node what the run needs? Without torch."""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
import secrets
import shutil
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from decompft.launcher.machine import detect
from decompft.launcher.node_file import Problem
from decompft.launcher.plan import Plan

SCRATCH = "DECOMPFT_SCRATCH"
SCRATCH_BYTES = 1 << 30  # free, at least
_PROBE_BYTES = 1 << 20  # written for real: quotas do not show in the free space
_PATIENCE_S = 5.0  # an NFS client may show a new file seconds late
_HINT = "see whether and how its file system is mounted on that node"
_PACKAGES = ("decompft.adapters", "decompft.launcher", "decompft.recipes", "decompft.slurm")


def write_token(folder: Path, node_id: int) -> tuple[str, list[Problem]]:
    """Leave a file with a name that nobody can guess; the name, or why the run folder cannot be written.

    Args:
        folder: incarnations/N/nodes; it is made, but not the folder of the incarnation, which the head has made: where
            that is missing, the run folder is another one.
    """
    name = f".token-{node_id}-{secrets.token_hex(8)}"
    if not sees(folder.parent.parent, folder.parent.name):
        text = f"{folder.parent}: there is no such folder here"
        return "", [Problem(kind="run folder", severity="bad", text=text, hint=_HINT)]
    try:
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"here\n")
    except OSError as error:
        text = f"{folder}: cannot be written: {error.strerror or error}"
        return "", [Problem(kind="run folder", severity="bad", text=text, hint=_HINT)]
    return name, []


def sees(folder: Path, name: str, *, patience_s: float = _PATIENCE_S) -> bool:
    """Whether a file that another node has made is here; listing is what makes NFS ask the server again."""
    end = time.monotonic() + patience_s
    while True:
        try:
            if name in os.listdir(folder):
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.05)


def file_system(path: Path, mounts: str | None = None) -> str:
    """Type and source of the mount that a path lies on, e.g. `nfs4 server:/home`; "" when unknown."""
    try:
        text = Path("/proc/self/mounts").read_text() if mounts is None else mounts
    except OSError:
        return ""
    real, best, found = os.path.realpath(path), "", ""
    for line in text.splitlines():
        source, place, kind = line.split()[:3]
        place = place.replace("\\040", " ")
        inside = real == place or real.startswith(place.rstrip("/") + "/")
        if inside and len(place) >= len(best):  # the last of equal ones lies on top
            best, found = place, f"{kind} {source}"
    return found


def disk_problems(run_dir: Path, plan: Plan) -> tuple[int | None, list[Problem]]:
    """Free bytes of the run folder, and whether the checkpoints to come fit; asked once, by the head node."""
    free = _free(run_dir)
    keep = plan.recipe.checkpoint.keep + plan.recipe.checkpoint.keep_best
    there = len(list((run_dir / "checkpoints").glob("step-*"))) if (run_dir / "checkpoints").is_dir() else 0
    one = plan.checkpoint_bytes
    wanted = one * max(1, keep + 1 - there)  # a new one is written before the oldest goes
    if free is None or free >= wanted:
        return free, []
    text = f"{run_dir}: {_gib(free)} GiB are free, and a checkpoint takes {_gib(one)} GiB"
    if free < one:
        hint = "free some space, or choose another place with --run-dir DIR"
        return free, [Problem(kind="disk", severity="user", text=text, hint=hint)]
    text += f", of which {keep} are kept while a new one is written"
    return free, [Problem(kind="disk", severity="warn", text=text, hint="lower checkpoint.keep")]


def scratch_problems(environ: Mapping[str, str] = os.environ) -> list[Problem]:
    """Whether the scratch folder, if one is set, takes a file and has room."""
    if not environ.get(SCRATCH):
        return []
    folder = Path(environ[SCRATCH])

    def bad(text: str) -> list[Problem]:
        hint = "free it, or name another scratch folder in the profile"
        return [Problem(kind="scratch", severity="bad", text=f"{folder}: {text}", hint=hint)]

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(os.urandom(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return bad(f"scratch cannot be written: {error.strerror or error}")
    free = _free(folder)
    if free is not None and free < SCRATCH_BYTES:
        return bad(f"{_gib(free)} GiB of scratch are free, less than {_gib(SCRATCH_BYTES)}")
    return []


def memory_problems(plan: Plan) -> tuple[int | None, list[Problem]]:
    """Free host memory in bytes, and whether the plan's forecast for this node fits."""
    free = _memory_free()
    rank = plan.forecast.total_bytes if plan.world.device == "cpu" else plan.forecast.host_total_bytes
    wanted = rank * plan.world.ranks_per_node
    if free is None or free >= wanted:
        return free, []
    text = f"{_gib(free)} GiB of host memory are free, {_gib(wanted)} are forecast"
    hint = "other processes on that node hold it, or it has less than the others"
    # a forecast errs by some tens of percent, and a cache that could be dropped counts as free already
    return free, [
        Problem(kind="memory", severity="bad" if free < wanted / 2 else "warn", text=text, hint=hint)
    ]


def versions() -> dict[str, str]:
    """What has to be equal on all nodes, read without importing any of it."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found | {"code": code_digest()}


def code_digest() -> str:
    """sha256 over names and bytes of decompft's own Python files, as they are installed here."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for root in sorted(importlib.import_module(package).__path__):
            for path in sorted(Path(root).rglob("*.py")):
                digest.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _memory_free() -> int | None:
    """MemAvailable, or less where a cgroup's limit is lower."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
                limit = detect({"DECOMPFT_DEVICE": "cpu"}).host_memory_bytes  # no nvidia-smi for this
                return available if limit is None else min(available, limit)
    except (OSError, ValueError):
        pass
    return None


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f}"
