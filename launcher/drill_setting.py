"""What does a drill run? The user's recipe, shortened, in a scratch folder, by launches like any other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from decompft.launcher import checking, planner, shipped, source
from decompft.launcher.drill_launch import Ended, Launch
from decompft.launcher.errors import EXIT_DONE, EXIT_USER, PlanError, RecipeError, RunFailed, UserError
from decompft.launcher.plan import Plan
from decompft.launcher.runs import RunDir
from decompft.launcher.say import Say

FEWEST_STEPS = 8  # two saves, an evaluation between them, and room around each
_OWN = ("train.max_steps", "train.epochs", "train.stop_after_steps", "train.early_stop_evals",
        "train.eval_every_steps", "checkpoint.every_steps", "logging.every_steps", "logging.tensorboard",
        "logging.wandb", "logging.mlflow")  # fmt: skip
_LEAST_LIMIT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One drill of one recipe."""

    plan: Plan
    words: tuple[str, ...]  # RECIPE and overrides that every launch is given
    folder: Path  # of its run directories and of what the launches print
    steps: int  # of an unbroken run
    every: int  # steps between saves
    eval_every: int | None  # steps between evaluations; None: nothing is held out
    say: Say

    def run(self, name: str) -> RunDir:
        return RunDir(self.folder / name)

    def launch(self, name: str, *words: str, resume: bool = False) -> Launch:
        """Start the recipe, or continue it, in the run directory `name`."""
        again = ("--resume", "auto") if resume else ()
        size = self.plan.world.size
        number = len(list(self.folder.glob(f"{name}.launch-*.log"))) + 1
        log = self.folder / f"{name}.launch-{number}.log"
        return Launch((*self.words, *words, *again), self.run(name), log, world_size=size)


@dataclass(frozen=True, kw_only=True)
class Unbroken:
    """The run that the others are compared with."""

    run: RunDir
    seconds: float  # of the whole launch
    first_step_s: float  # from the command to the first step

    @property
    def limit_s(self) -> float:
        """How long another launch of the same may take before it counts as hanging."""
        return max(_LEAST_LIMIT_S, 5 * self.seconds)


def make_setting(
    recipe: str, overrides: Sequence[str], *, steps: int, folder: Path | None, verb: str, say: Say
) -> Setting:
    """Check the recipe as `launch` would, shortened, and make the scratch folder.

    Raises:
        UserError: the recipe, an override, the number of steps or the folder is wrong; nothing was started.
    """
    if steps < FEWEST_STEPS:
        raise UserError(
            f"--steps {steps}: a drill needs {FEWEST_STEPS} steps or more", f"use --steps {FEWEST_STEPS}"
        )
    for override in overrides:
        key = override.partition("=")[0]
        if any(key == own or key.startswith(own + ".") for own in _OWN):
            raise RecipeError(f"override {override}: a drill sets {key} itself", "its length is --steps N")
    path = shipped.find(recipe)
    data = source.load(path, overrides).data
    every, eval_every = steps // 4, steps // 2 if data.eval or data.eval_fraction else None
    own = (
        f"train.max_steps={steps}", "train.epochs=null", "train.stop_after_steps=null",
        "train.early_stop_evals=null", f"train.eval_every_steps={eval_every or 'null'}",
        f"checkpoint.every_steps={every}", "logging.every_steps=1", "logging.tensorboard=false",
        "logging.wandb=null", "logging.mlflow=null", "sweep=null",
    )  # fmt: skip
    shortened = source.load(path, (*overrides, *own))
    for warning in checking.check(shortened, strict=True):
        say(f"warning: {warning}")
    plan = planner.make(shortened)
    if plan.world.nodes > 1:
        raise PlanError(
            f"parallel.nodes: a drill runs on one machine, the recipe asks for {plan.world.nodes}",
            "inside an allocation, drill one of its nodes: add parallel.nodes=1",
        )
    return Setting(
        plan=plan, words=(recipe, *overrides, *own), folder=_scratch(folder, plan.name, verb), steps=steps,
        every=every, eval_every=eval_every, say=say,
    )  # fmt: skip


def run_unbroken(setting: Setting) -> Unbroken:
    """Run the recipe from its first step to its last.

    Raises:
        UserError: the launch found fault with the recipe or its data.
        RunFailed: the run failed without the drill's doing.
    """
    setting.say(f"unbroken: {setting.steps} steps from start to end")
    began = time.monotonic()
    with setting.launch("unbroken") as launch:
        launch.until(lambda now: now.step >= 1)
        first_step_s = time.monotonic() - began
        ended = launch.wait()
    if ended.code != EXIT_DONE:
        message = f"the unbroken run did not end well, so there is nothing to prove: {ended.text}"
        hint = "the recipe must run before it can be drilled: decompft launch"
        raise UserError(message, hint) if ended.code == EXIT_USER else RunFailed(message, hint)
    setting.say(f"unbroken: finished in {ended.seconds:.1f} s, its first step after {first_step_s:.1f} s")
    return Unbroken(run=setting.run("unbroken"), seconds=ended.seconds, first_step_s=first_step_s)


def resume_to_end(setting: Setting, name: str, unbroken: Unbroken) -> Ended:
    """Continue a run to its last step."""
    with setting.launch(name, resume=True) as launch:
        ended = launch.wait(unbroken.limit_s)
    if ended.code == EXIT_DONE:
        setting.say(f"{name}: resumed, and finished in {ended.seconds:.1f} s")
    else:
        setting.say(f"{name}: resumed, but it did not finish: {ended.text}")
    return ended


def _scratch(folder: Path | None, name: str, verb: str) -> Path:
    path = folder or Path("runs") / f"drill-{name}-{verb}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        path.mkdir(parents=True, exist_ok=folder is not None)
        if any(path.iterdir()):
            raise UserError(
                f"{path}: a drill needs a folder of its own, this one is not empty", "name a new one"
            )
    except OSError as error:
        raise UserError(
            f"{path}: cannot be made: {error.strerror}", "name another with --run-dir DIR"
        ) from error
    return path
