"""A run as a chain of jobs: prepare, train, merge, eval, each of which starts when the one before has ended well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from decompft.launcher.errors import SlurmError, UserError
from decompft.launcher.job import PREPARE
from decompft.launcher.plan import Plan
from decompft.launcher.runs import RunDir
from decompft.launcher.say import Say
from decompft.slurm.commands import call
from decompft.slurm.profile import Profile
from decompft.slurm.render import step_script
from decompft.slurm.run_files import SCRIPT
from decompft.slurm.submit import Submission, check_script, make_ready, submit_script

STEPS = ("prepare", "train", "merge", "eval")
_CLI = "decompft.launcher.cli"


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Which jobs a run consists of."""

    steps: tuple[str, ...] = ("train",)  # of STEPS, in that order
    merge_into: str = "dense"  # as `decompft merge --into`
    eval_tasks: tuple[str, ...] = ()  # files, as `decompft eval --task`


def read_chain(
    text: str | None, profile: Profile, *, merge_into: str | None, eval_tasks: Sequence[str]
) -> Chain:
    """What `--chain`, `--chain-merge` and `--chain-eval` mean.

    Args:
        text: e.g. prepare,train,merge; None: train.
        profile: one with `prepare` puts that step first by itself.

    Raises:
        UserError: an unknown step, another order, or an option of a step that is not in the chain.
    """
    steps = ("train",) if text is None else tuple(word.strip() for word in text.split(","))
    unknown = [step for step in steps if step not in STEPS]
    if unknown or "train" not in steps or steps != tuple(step for step in STEPS if step in steps):
        why = f"{unknown[0]!r} is no step" if unknown else "train must be in it, and the order is fixed"
        raise UserError(f"--chain {text}: {why}", f"write some of {','.join(STEPS)}, in this order")
    if profile.prepare is not None and "prepare" not in steps:
        steps = ("prepare", *steps)
    if merge_into is not None and "merge" not in steps:
        raise UserError("--chain-merge: there is no merge in the chain", "add it: --chain train,merge")
    if eval_tasks and "eval" not in steps:
        raise UserError("--chain-eval: there is no eval in the chain", "add it: --chain train,eval")
    if "eval" in steps and not eval_tasks:
        raise UserError("--chain: eval needs a file of records to score", "add --chain-eval FILE.jsonl")
    for task in eval_tasks:
        if not Path(task).is_file():
            raise UserError(f"--chain-eval {task}: no such file")
    return Chain(steps=steps, merge_into=merge_into or "dense", eval_tasks=tuple(eval_tasks))


def submit_chain(
    plan: Plan,
    recipe_text: str,
    profile: Profile,
    chain: Chain,
    *,
    run_dir: Path,
    resume: str | None,
    say: Say,
) -> tuple[Submission, ...]:
    """Submit the jobs of a run, each after the one before; arguments and errors as of `submit.make_ready`."""
    run = RunDir(run_dir)
    out = run.path / "merged"
    if "merge" in chain.steps and out.exists():
        raise UserError(f"{out}: exists already, and merge writes a new folder", "move it away")
    texts = {
        kind: step_script(plan, profile, kind=kind, commands=[(str(run.path), _command(kind, run, chain))])
        for kind in chain.steps
        if kind != "train"
    }
    for text in texts.values():
        check_script(text)
    texts["train"] = make_ready(plan, recipe_text, profile, run_dir=run_dir, resume=resume, say=say)
    done: list[Submission] = []
    try:
        for kind in chain.steps:
            after = [submission.job_id for submission in done[-1:]]
            name = SCRIPT if kind == "train" else step_path(kind)
            done.append(submit_script(run, texts[kind], name=name, kind=kind, after=after, profile=profile))
    except SlurmError:
        # half a chain is of no use; the last first, or one would start as its forerunner ends
        for submission in reversed(done):
            call(["scancel", submission.job_id], cluster=submission.cluster)
        raise
    return tuple(done)


def step_path(kind: str) -> str:
    """Of a step's script, below the run directory."""
    return f"slurm/{kind}.sbatch"


def _command(kind: str, run: RunDir, chain: Chain) -> tuple[str, ...]:
    adapter = str(run.path / "adapter")
    if kind == "prepare":
        return (PREPARE, str(run.path))
    if kind == "merge":
        return (_CLI, "merge", adapter, f"--into={chain.merge_into}", f"--out={run.path / 'merged'}")
    return (_CLI, "eval", adapter, "--task", *chain.eval_tasks)
