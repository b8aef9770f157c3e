"""`decompft drill`: the proof, on this machine, that a run of this recipe survives; a table of verdicts."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from decompft.launcher import drill_kill, drill_preempt, drill_resume
from decompft.launcher.drill_processes import has_proc
from decompft.launcher.drill_setting import Setting, Unbroken, make_setting, run_unbroken
from decompft.launcher.drill_verdicts import Verdict
from decompft.launcher.errors import EXIT_DONE, EXIT_FAILED, UserError
from decompft.launcher.outcome import write_atomic

if TYPE_CHECKING:
    from rich.console import Console

DRILLS: dict[str, Callable[[Setting, Unbroken], list[Verdict]]] = {
    "kill": drill_kill.drill,
    "resume": drill_resume.drill,
    "preempt": drill_preempt.drill,
}
_PLAIN_WIDTH = 140


def drill(
    kind: str,
    recipe: str,
    overrides: Sequence[str],
    *,
    run_dir: Path | None,
    steps: int,
    keep: bool,
    json_path: Path | None,
    console: Console,
) -> int:
    """Drill a recipe and print the verdicts.

    Args:
        kind: a key of DRILLS.
        run_dir: the scratch folder, new or empty; default runs/drill-NAME-KIND-TIME.
        steps: optimizer steps of an unbroken run.
        keep: leave the scratch folder though every claim holds.
        json_path: takes the verdicts as JSON.

    Returns:
        0 when no claim fails, else 3.

    Raises:
        UserError: the input is wrong, or the recipe cannot run.
        RunFailed: the unbroken run failed.
    """

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    if not has_proc():
        raise UserError(
            "decompft drill needs Linux: it finds the ranks through /proc", "drill where you train"
        )
    if json_path is not None and not json_path.absolute().parent.is_dir():
        raise UserError(f"{json_path}: its folder does not exist", "make it first")
    setting = make_setting(recipe, overrides, steps=steps, folder=run_dir, verb=kind, say=say)
    world, saves = setting.plan.world, setting.every
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
    say(f"drill {kind}: {setting.plan.name}, {setting.plan.strategy} on {ranks} ({world.device}), {steps} steps, "
        f"a save every {saves}, in {setting.folder}")  # fmt: skip
    try:
        with _ended_by_signals():
            verdicts = DRILLS[kind](setting, run_unbroken(setting))
    except BaseException:
        say(f"kept, with the logs of every launch: {setting.folder}")
        raise
    show(verdicts, console)
    failed = [verdict for verdict in verdicts if verdict.result == "FAILS"]
    if json_path is not None:
        write_json(json_path, kind, setting, verdicts)
    if failed:
        say(f"{len(failed)} of {len(verdicts)} claims FAIL; runs and logs are kept: {setting.folder}")
        return EXIT_FAILED
    holding = sum(verdict.result == "holds" for verdict in verdicts)
    rest = len(verdicts) - holding
    say(f"{holding} claims hold, none fails" + (f", {rest} could not be tried" if rest else ""))
    if keep:
        say(f"kept: {setting.folder}")
    else:
        shutil.rmtree(setting.folder)
    return EXIT_DONE


def show(verdicts: Sequence[Verdict], console: Console) -> None:
    """Print the table; plain, and wide enough to be read back, where there is no terminal."""
    from rich.table import Table  # 30 ms, and only the end needs it
    from rich.text import Text

    if not console.is_terminal:
        console.width = max(console.width, _PLAIN_WIDTH)
    colors = {"holds": "green", "FAILS": "bold red", "not applicable": "dim"}
    part = ""
    table = Table.grid(padding=(0, 2))
    for verdict in verdicts:
        if verdict.part != part:
            part = verdict.part
            table.add_row(Text(part, style="bold"))
        color = colors[verdict.result]
        table.add_row(Text(f"  {verdict.claim}"), Text(verdict.result, style=color), Text(verdict.measured))
    console.print(table)


def write_json(path: Path, kind: str, setting: Setting, verdicts: Sequence[Verdict]) -> None:
    """What was drilled, and its verdicts."""
    plan = setting.plan
    head: dict[str, Any] = {
        "drill": kind, "recipe": plan.name, "strategy": plan.strategy, "world_size": plan.world.size,
        "device": plan.world.device, "steps": setting.steps, "save_every": setting.every,
    }  # fmt: skip
    rows = [asdict(verdict) for verdict in verdicts]
    write_atomic(path, json.dumps({**head, "verdicts": rows}, indent=2, sort_keys=True) + "\n")


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a drill as Ctrl-C does, so that its launches end with it."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
