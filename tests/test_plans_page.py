"""docs/plans.md: what `decompft plan` chooses and says on known hardware, as a login node would print it."""

from __future__ import annotations

import io
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from decompft.launcher import planner, shipped, source
from decompft.launcher.errors import PlanError
from decompft.launcher.machine import Machine
from decompft.launcher.plan import Plan
from decompft.launcher.plan_view import show

PAGE = Path(__file__).parent.parent / "docs" / "plans.md"
LOGIN_NODE = Machine(num_cores=8)
SMALL, LARGE = "llama7b_map", "llama70b_map"

INTRODUCTION = """# What a plan chooses, and why

Made by `tests/test_plans_page.py` (`--update-golden` rewrites it): each block is what the command in its first line
prints on a machine without GPUs. `parallel.gpu_memory_gib` and `parallel.gpus_per_node` say what GPUs are elsewhere.

`parallel.strategy: auto` takes the first of these that fits by the forecast, with the largest micro batch that fits:

1. `single` on one rank, `ddp` on several: the base is whole on every rank.
2. The same with recomputation of activations: `norms`, `selective`, `full`, then `offloaded`
   ([what each keeps](speed.md#recomputation)).
3. `hsdp` on several nodes: the base is cut inside a node, nodes hold copies. First without recomputation, then with.
4. `fsdp`: the base is cut over all ranks. First without recomputation, then with. `hsdp` and `fsdp` gather the base for
   each micro batch: where the recipe leaves its size open, `norms` and `selective` are left out, as `full` takes more
   rows at once.
5. `fsdp` with `parallel.cpu_offload`: the pieces live in host memory. Slow, so that it comes last.

`zero1`, `zero2` and `zero3` are never taken unasked. DeepSpeed cuts what fsdp cuts or less of it, holds its buckets
beside, and starts slower; the strategies are there for those whose cluster is built around it.

The forecast's constants were fitted to measurements of one and two H200s; `tests/test_forecast_measured.py` compares
each run. What was never measured (recomputation but `full`, hsdp, offload, several nodes) is arithmetic.
Liger's kernels are counted with, unless the machine that plans has GPUs and no liger-kernel; without them
a plan counts what torch's own norms and activations keep (as a CPU's, compared there with tensors, not measured on a
GPU) and warns. `DECOMPFT_TRITON=0` turns Liger off unseen by the plan.
The time of a step is said where the GPU was measured; `--gpu H200` plans for such GPUs ([scaling](scaling.md)).
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    title: str
    recipe: str
    overrides: str
    sentence: str
    expected: tuple[str, str, bool] | None  # strategy, recompute, offload; None: refused


CASES = (
    Case(
        title="7B on one GPU of 24 GiB",
        recipe=SMALL,
        overrides="parallel.gpus_per_node=1 parallel.gpu_memory_gib=24",
        sentence="All activations of four rows would take more than the card; what attention made does not.",
        expected=("single", "selective", False),
    ),
    Case(
        title="70B on two GPUs of 24 GiB",
        recipe=LARGE,
        overrides="parallel.gpus_per_node=2 parallel.gpu_memory_gib=24",
        sentence="Cut in half and with one row at a time, base, optimizer and a layer's work are still more than a "
        "card has: the pieces go to the host. The second table says what the node must have for each of its two ranks.",
        expected=("fsdp", "full", True),
    ),
    Case(
        title="The same, with ddp asked for",
        recipe=LARGE,
        overrides="parallel.gpus_per_node=2 parallel.gpu_memory_gib=24 parallel.strategy=ddp",
        sentence="What cannot fit is refused before anything is read, with the smallest change that fits.",
        expected=None,
    ),
    Case(
        title="70B on two GPUs of 80 GiB",
        recipe=LARGE,
        overrides="parallel.gpus_per_node=2 parallel.gpu_memory_gib=80",
        sentence="The whole 4-bit base fits on each GPU, so that nothing has to be gathered while training.",
        expected=("ddp", "norms", False),
    ),
    Case(
        title="70B on eight GPUs of 80 GiB",
        recipe=LARGE,
        overrides="parallel.gpus_per_node=8 parallel.gpu_memory_gib=80",
        sentence="As on two: each GPU takes an eighth of the rows.",
        expected=("ddp", "norms", False),
    ),
    Case(
        title="70B on four nodes of eight GPUs of 80 GiB",
        recipe=LARGE,
        overrides="parallel.nodes=4 parallel.gpus_per_node=8 parallel.gpu_memory_gib=80",
        sentence="Of 64 rows a step, two are left for each of 32 ranks; nothing else changes. Several nodes are "
        "started with `decompft sbatch`.",
        expected=("ddp", "norms", False),
    ),
    Case(
        title="70B on four nodes of eight GPUs of 24 GiB",
        recipe=LARGE,
        overrides="parallel.nodes=4 parallel.gpus_per_node=8 parallel.gpu_memory_gib=24",
        sentence="One GPU is too small for the base, one node is not: it is cut inside each node, and only the "
        "adapter's gradients cross between nodes.",
        expected=("hsdp", "full", False),
    ),
)


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page does not depend on what this machine has downloaded."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title.replace(" ", "-"))
def test_the_sentence_speaks_of_what_is_chosen(case: Case) -> None:
    found = planned(case)
    if case.expected is None:
        assert isinstance(found, PlanError) and "smallest change that fits" in found.hint
    else:
        assert isinstance(found, Plan)
        assert (found.strategy, found.recompute, found.cpu_offload) == case.expected
        assert "would need" in found.strategy_reason


def test_the_page_is_current(update_golden: bool) -> None:
    text = INTRODUCTION + "".join(section(case) for case in CASES)
    if update_golden:
        PAGE.write_text(text, encoding="ascii")
    assert PAGE.read_text(encoding="ascii") == text, "run: pytest tests/test_plans_page.py --update-golden"


def planned(case: Case) -> Plan | PlanError:
    recipe = source.load(shipped.find(case.recipe), shlex.split(case.overrides))
    try:
        return planner.make(recipe, machine=LOGIN_NODE)
    except PlanError as error:
        return error


def section(case: Case) -> str:
    found, out = planned(case), io.StringIO()
    if isinstance(found, PlanError):
        out.write(f"error: {found}\n")
    else:
        show(found, Console(file=out))
    lines = [f"$ decompft plan {case.recipe} {case.overrides}", *out.getvalue().splitlines()]
    block = "\n".join(line.rstrip() for line in lines)
    return f"\n## {case.title}\n\n{case.sentence}\n\n```text\n{block}\n```\n"
