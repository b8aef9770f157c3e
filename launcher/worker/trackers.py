"""Where do numbers go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow?

Packages are imported when a recipe asks for them; wandb and mlflow are the `logging` extra.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from decompft.launcher.errors import UserError
from decompft.launcher.recipe import LoggingSection, MlflowSection, WandbSection


class Tracker(Protocol):
    """A place that takes named numbers by step."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def open_trackers(logging: LoggingSection, run_dir: Path, *, start_step: int) -> list[Tracker]:
    """The trackers that the recipe asks for; what they showed after start_step is superseded.

    Raises:
        UserError: a package is missing.
    """
    trackers: list[Tracker] = []
    if logging.tensorboard:
        trackers.append(_TensorBoard(run_dir, start_step))
    if logging.wandb is not None:
        trackers.append(_Wandb(logging.wandb, run_dir))
    if logging.mlflow is not None:
        trackers.append(_Mlflow(logging.mlflow, run_dir))
    return trackers


class _TensorBoard:
    def __init__(self, run_dir: Path, start_step: int) -> None:
        _import("tensorboard", "tensorboard", "logging.tensorboard=false")
        from torch.utils.tensorboard import SummaryWriter  # 0.5 s, and only rank 0 needs it

        purge_step = start_step + 1 if start_step else None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step, flush_secs=5)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, section: WandbSection, run_dir: Path) -> None:
        wandb = _import("wandb", "decompft[logging]", "logging.wandb=null")
        ids = _Ids(run_dir)
        try:
            self._run = wandb.init(
                project=section.project, name=section.name or run_dir.name, dir=str(run_dir),
                id=ids.get("wandb"), resume="allow",
            )  # fmt: skip
        except wandb.errors.Error as error:
            raise _refused("wandb", error, "log in with: wandb login, or set WANDB_MODE=offline") from error
        ids.put("wandb", self._run.id)
        # our own step: wandb's refuses to go back, as a resume does
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, section: MlflowSection, run_dir: Path) -> None:
        self._mlflow = _import("mlflow", "decompft[logging]", "logging.mlflow=null")
        ids = _Ids(run_dir)
        try:
            self._mlflow.set_tracking_uri(section.tracking_uri)
            self._mlflow.set_experiment(section.experiment)
            run = self._mlflow.start_run(run_id=ids.get("mlflow"), run_name=run_dir.name)
        except self._mlflow.exceptions.MlflowException as error:
            raise _refused("mlflow", error, "check logging.mlflow.tracking_uri") from error
        ids.put("mlflow", run.info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # in the background: a slow server must not slow the steps
        self._mlflow.log_metrics(dict(values), step=step, synchronous=False)

    def close(self) -> None:
        self._mlflow.flush_async_logging()
        self._mlflow.end_run()


def _refused(name: str, error: Exception, hint: str) -> UserError:
    return UserError(f"logging.{name}: {error}".strip(), f"{hint}, or switch it off: logging.{name}=null")


class _Ids:
    """trackers.json of a run directory: under which id each service knows the run, for resumes."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "trackers.json"
        self._ids: dict[str, str] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def get(self, service: str) -> str | None:
        return self._ids.get(service)

    def put(self, service: str, run_id: str) -> None:
        self._ids[service] = run_id
        self._path.write_text(json.dumps(self._ids, indent=1, sort_keys=True) + "\n")


def _import(module: str, requirement: str, switch_off: str) -> Any:  # may be absent, so untyped
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"logging.{module}: the package {error.name} is not installed",
            f"pip install '{requirement}', or switch it off: {switch_off}",
        ) from error
