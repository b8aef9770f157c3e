"""Where the seconds between a command and its first optimizer step go, phase by phase, as rank 0 sees them."""

from __future__ import annotations

import gc
import importlib
import time

from decompft.launcher.json_lines import read_lines
from decompft.launcher.processes import process_age_s
from decompft.launcher.runs import RunDir
from decompft.launcher.worker.metrics import Metrics

SHOWN_S = 0.05  # shorter phases are in the event, not in the line


class Startup:
    """A stopwatch: `done` names what has been done since the time before; `tell` once, after the first step."""

    def __init__(self, *, process_began_s: float | None = None) -> None:
        """
        Args:
            process_began_s: epoch seconds; default when this process began.
        """
        self.began_s = time.time() - process_age_s() if process_began_s is None else process_began_s
        self._last_s = self.began_s
        self._phases: dict[str, float] = {}
        self._is_told = False

    def done(self, phase: str) -> None:
        """All since the last call, or since the process began, was `phase`."""
        now = time.time()
        self._phases[phase] = self._phases.get(phase, 0.0) + max(0.0, now - self._last_s)
        self._last_s = now

    def tell(self, metrics: Metrics, run: RunDir, *, incarnation: int, step: int) -> None:
        """Once: the event `startup` with seconds by phase, and a line. The launcher's own phases come first."""
        if self._is_told:
            return
        self._is_told = True
        phases = launcher_phases(run, incarnation, self.began_s) | self._phases
        metrics.event(
            "startup", step=step, seconds=round(sum(phases.values()), 3),
            phases={name: round(seconds, 3) for name, seconds in phases.items()},
        )  # fmt: skip
        metrics.message(startup_line(phases))


def startup_line(phases: dict[str, float]) -> str:
    """`first step after 21.3 s: prepare 3.1, start of ranks 6.0, imports 4.2, ...`."""
    shown = ", ".join(f"{name} {s:.1f}" for name, s in phases.items() if s >= SHOWN_S)
    return f"first step after {sum(phases.values()):.1f} s" + (f": {shown}" if shown else "")


def launcher_phases(run: RunDir, incarnation: int, began_s: float) -> dict[str, float]:
    """What came before this process, from the `start` event of its incarnation; {} where there is none.

    Args:
        began_s: epoch seconds at which this process began.
    """
    if not run.events_path.exists():
        return {}
    starts = [r for r in read_lines(run.events_path) if r and r.get("event") == "start"]
    mine = next((r for r in reversed(starts) if r.get("incarnation") == incarnation), None)
    if mine is None:
        return {}
    told = {name: mine[key] for name, key in (("plan", "plan_s"), ("prepare", "prepare_s")) if key in mine}
    return told | {"start of ranks": max(0.0, began_s - mine["time_s"])}


def without_collecting() -> None:
    """Until `imported`: importing torch and transformers makes objects that stay, and looking at them takes a fifth."""
    gc.disable()


def imported() -> None:
    """Import what every model needs of transformers now, and look at none of it again."""
    for name in (
        "transformers.modeling_utils",
        "transformers.modeling_layers",
        "transformers.models.auto.modeling_auto",
    ):
        importlib.import_module(name)
    gc.freeze()
    gc.enable()
