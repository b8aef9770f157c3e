"""The run directory: what a run leaves on disk, and where."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from decompft.launcher.checkpoints import fence
from decompft.launcher.errors import UserError
from decompft.launcher.hangs import read_written
from decompft.launcher.outcome import write_atomic
from decompft.launcher.plan import Plan, to_json

_PACKAGES = (
    "decompft", "torch", "transformers", "safetensors", "bitsandbytes", "datasets", "tokenizers",
    "numpy", "pydantic", "triton", "liger-kernel", "torchao", "deepspeed",
)  # fmt: skip


@dataclass(frozen=True)
class RunDir:
    """One run's folder; the layout is DESIGN.md section 5."""

    path: Path

    @classmethod
    def create(cls, path: Path, *, recipe_text: str, plan: Plan) -> Self:
        """Make the folder and write recipe.yaml, plan.json and env.json.

        Raises:
            UserError: the folder already holds a run, or cannot be written.
        """
        run = cls(path)
        if run.plan_path.exists():
            raise run.exists_error()
        run.record(recipe_text=recipe_text, plan=plan)
        return run

    @classmethod
    def open(cls, path: Path) -> Self:
        """Take an existing run's folder.

        Raises:
            UserError: there is no run there.
        """
        run = cls(path)
        if not run.plan_path.is_file():
            raise UserError(f"{path}: not a run directory (no plan.json)", "name a folder that launch made")
        return run

    @property
    def plan_path(self) -> Path:
        return self.path / "plan.json"

    @property
    def recipe_path(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def _origin_path(self) -> Path:
        return self.path / "origin.json"

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    def incarnations(self) -> list[int]:
        """The numbers that were claimed, ascending; none where there is no run yet."""
        return sorted(int(p.name) for p in (self.path / "incarnations").glob("*") if p.name.isdecimal())

    def newest_incarnation(self) -> int:
        """Its number; 0 before the first."""
        return max(self.incarnations(), default=0)

    def incarnation_dir(self, incarnation: int) -> Path:
        return self.path / "incarnations" / str(incarnation)

    def log_dir(self, incarnation: int) -> Path:
        return self.path / "logs" / f"incarnation-{incarnation}"

    def rank_log(self, incarnation: int, rank: int) -> Path:
        return self.log_dir(incarnation) / f"rank-{rank}.log"

    def launcher_log(self, incarnation: int) -> Path:
        return self.log_dir(incarnation) / "launcher.log"

    def stop_file(self, incarnation: int) -> Path:
        """Asks every rank to save and stop; the ranks look for it at step ends."""
        return self.incarnation_dir(incarnation) / "stop"

    def exists_error(self) -> UserError:
        return UserError(
            f"{self.path}: this run directory exists already",
            "continue it with --resume auto, or choose another with --run-dir DIR",
        )

    def record(self, *, recipe_text: str, plan: Plan) -> None:
        """Write what was asked, what was decided, and on which versions.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self.recipe_path, recipe_text)
            env = json.dumps(environment(), indent=2, sort_keys=True)
            write_atomic(self.path / "env.json", env + "\n")
            # last: a folder with plan.json is a run
            write_atomic(self.plan_path, to_json(plan))
        except OSError as error:
            raise self._unwritable(error) from error

    def forget(self) -> None:
        """Undo `create` when nothing was started, so that the same command works once corrected."""
        self.plan_path.unlink(missing_ok=True)
        self._origin_path.unlink(missing_ok=True)

    def write_origin(self, checkpoint: Path) -> None:
        """Note the other run's checkpoint that this run begins from, for as long as it has none itself."""
        write_atomic(self._origin_path, json.dumps({"checkpoint": str(checkpoint.absolute())}) + "\n")

    def read_origin(self) -> Path | None:
        """The checkpoint that this run was forked from, if it was."""
        if not self._origin_path.exists():
            return None
        return Path(json.loads(self._origin_path.read_text(encoding="utf-8"))["checkpoint"])

    def read_plan(self) -> Plan:
        """The plan of the last launch.

        Raises:
            UserError: plan.json was written by another version, or by hand.
        """
        return read_plan(self.plan_path)

    def kept_plans(self) -> list[Path]:
        """The copies of plan.json that incarnations have left and that can be read, the newest first."""
        found = []
        for number in reversed(self.incarnations()):
            path = self.incarnation_dir(number) / "plan.json"
            with suppress(UserError, OSError):
                read_plan(path)
                found.append(path)
        return found

    def next_incarnation(self) -> int:
        """Claim the next number (from 1) and make its folders; from now on no older incarnation can write."""
        number = self.newest_incarnation() + 1
        folder = self.incarnation_dir(number)
        folder.parent.mkdir(exist_ok=True)
        folder.mkdir()
        self.log_dir(number).mkdir(parents=True, exist_ok=True)
        # plan.json is replaced by the next launch; this copy says what this incarnation ran
        write_atomic(folder / "plan.json", self.plan_path.read_text(encoding="utf-8"))
        fence(self.checkpoints_dir)
        return number

    def append_event(self, event: str, **details: Any) -> None:
        """Add a line to events.jsonl: start, save, signal, resume, failure, end."""
        line = json.dumps({"time_s": round(time.time(), 3), "event": event, **details}, sort_keys=True)
        with self.events_path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def lock(self) -> int:
        """Hold the run for this launch; the descriptor is passed to the job, so orphans hold it too.

        Raises:
            UserError: another launch, or a process it left behind, is using the run; or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            ranks = self._living_ranks()
            who = f" (its ranks here: pid {', '.join(map(str, ranks))})" if ranks else ""
            hint = "wait for it or stop it with Ctrl-C there; or choose another place with --run-dir DIR"
            if ranks:
                hint += f"; if its launcher is gone, `kill {ranks[0]}` has its ranks save and stop"
            raise UserError(f"{self.path}: another launch is running in this directory{who}", hint) from None
        except OSError:
            pass  # a file system without locks: the claim of the incarnation's folder must do
        return handle

    def _living_ranks(self) -> list[int]:
        """Processes on this machine that the newest incarnation's pulses name and that are there."""
        found = []
        for reading in read_written(self.incarnation_dir(self.newest_incarnation())):
            if reading.node != platform.node():
                continue
            try:
                os.kill(reading.pid, 0)
            except OSError:
                continue
            found.append(reading.pid)
        return sorted(found)

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path}: the run directory cannot be written ({error.strerror})",
            "choose another place with --run-dir DIR",
        )


def read_plan(path: Path) -> Plan:
    """A run's plan.json, or a copy of it.

    Raises:
        UserError: it was written by another version, by hand, or is damaged.
    """
    try:
        return Plan.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # pydantic's, or no text at all
        num = f" ({error.error_count()} problems)" if isinstance(error, ValidationError) else ""
        raise UserError(
            f"{path}: not a plan of this version of decompft{num}", "start a new run with --run-dir DIR"
        ) from error


def find_run(typed: str) -> Path:
    """What a user means by a run or a place in one: a path, else a name under ./runs; as typed if there is neither."""
    path = Path(os.path.expanduser(typed))
    named = Path("runs", typed)
    return named if not path.exists() and ".." not in named.parts and named.is_dir() else path


def environment() -> dict[str, Any]:
    """The versions a run is made on, read without importing any of them."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "packages": packages,
    }
