"""Where the main thread of a rank is right now, for the threads that watch it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Beat:
    """One reading; replaced whole, so that another thread never sees half of one."""

    what: str = "starting"
    step: int = 0  # optimizer steps done
    since: float = field(default_factory=time.monotonic)


class Pulse:
    """`at` costs an assignment: it is called many times a step."""

    def __init__(self) -> None:
        self.beat = Beat()

    def at(self, what: str, step: int | None = None) -> None:
        """Say what begins now: loading, evaluating, data, forward, backward, reducing, optimizer, saving, ending."""
        self.beat = Beat(what, self.beat.step if step is None else step)
