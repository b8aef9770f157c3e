"""Every base format under every strategy: the losses are those of `single` over the same format."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny import losses, make_run, run_ranks

from decompft.adapters.formats import FORMAT_SPECS
from decompft.launcher.errors import UserError
from decompft.launcher.strategies import STRATEGIES
from decompft.launcher.support import cell

pytestmark = pytest.mark.dist

STEPS = 2
# float32; three times what the order of micro batches does to single is below it (test_engine_parity)
TOLERANCE = 1e-4
# ranks, and of hsdp those that share a copy: 2 x 2
MESH = {"hsdp": {"gpus_per_node": 4, "shard_size": 2}}


def curve(folder: Path, base: str, strategy: str) -> list[float]:
    mesh = MESH.get(strategy, {"gpus_per_node": 1 if strategy == "single" else 2})
    run = make_run(
        folder,
        f"{base}-{strategy}",
        quantization={"format": base, "compute": "float32", "cache": False},
        # a rate at which the second loss is far from the first: a wrong step would show
        train={"max_steps": STEPS, "learning_rate": 0.05, "global_batch_size": 4, "micro_batch_size": 1},
        parallel={"strategy": strategy, **mesh},
    )
    run_ranks(run)
    return losses(run)


@pytest.fixture(scope="module", autouse=True)
def deepspeed_before_fork() -> None:
    """Imported once: in each of 30 forked ranks it would take 2 s."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")  # one for all cells: the data is tokenized once


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, list[float]]:
    return {base: curve(folder, base, "single") for base in FORMAT_SPECS}


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "single"])
@pytest.mark.parametrize("base", FORMAT_SPECS)
def test_cell_trains_as_single_or_is_refused(
    folder: Path, single: dict[str, list[float]], base: str, strategy: str
) -> None:
    if cell(strategy, quantization={"format": base}):
        with pytest.raises(UserError):
            curve(folder, base, strategy)
        return
    found = curve(folder, base, strategy)
    assert len(found) == STEPS and found == pytest.approx(single[base], rel=TOLERANCE)


def test_formats_differ_and_steps_move_the_loss(single: dict[str, list[float]]) -> None:
    """Else equal curves would prove nothing."""
    assert len({tuple(losses) for losses in single.values()}) == len(FORMAT_SPECS)
    assert all(abs(a - b) > 10 * TOLERANCE * a for a, b in single.values())
