"""A run of `single` that adds each step's micro batches in opposite order: what rounding alone does to a loss curve.

python benchmarks/reordered.py RECIPE RUN_DIR [KEY=VALUE ...]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from decompft.launcher.planner import make
from decompft.launcher.runs import RunDir
from decompft.launcher.source import load
from decompft.launcher.worker.data import feed
from decompft.launcher.worker.main import Rank, run_rank
from decompft.launcher.worker.tools import prepare


def main() -> None:
    recipe, folder, overrides = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    rank = prepared_rank(recipe, folder, overrides)
    original = feed.PreparedTrain.step

    def reversed_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        step = original(self, *args, **kwargs)
        step.micro_batches.reverse()
        return step

    feed.PreparedTrain.step = reversed_step  # type: ignore[method-assign]
    run_rank(rank)


def prepared_rank(recipe: Path, folder: Path, overrides: list[str]) -> Rank:
    """A run's only rank, for `run_rank` in this process; what it says goes to stdout."""
    run = RunDir.create(folder, recipe_text=recipe.read_text(), plan=make(load(recipe, overrides)))
    prepare.main([str(run.path)])
    return Rank(run=run, incarnation=run.next_incarnation(), resume=None, rank=0, stream=sys.stdout)


if __name__ == "__main__":
    main()
