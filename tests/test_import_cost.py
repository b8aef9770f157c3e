"""The control plane answers without torch, and fast."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "recipes" / "tiny_map.yaml")
HEAVY = ("torch", "transformers", "numpy", "datasets", "safetensors", "bitsandbytes", "pyarrow", "pandas")

_PROBE = """
import json, sys
from decompft.launcher.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as error:
    code = error.code
print(json.dumps({"code": code, "modules": sorted(sys.modules)}), file=sys.stderr)
"""

_FLOOR = """
import argparse, yaml, pydantic
class Section(pydantic.BaseModel):
    key: int
"""


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which byte code is kept, as it is where a user installs."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("pycache"))}


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["check", TINY],
        ["check", TINY, "adapter.rnk=3"],
        ["schema"],
        ["plan", TINY],
        ["plan", TINY, "--json"],
        ["recipes", "list"],
        ["sbatch", TINY, "slurm.time=1:00:00"],
        ["launch", TINY, "--dry-run"],
    ],
    ids=" ".join,
)
def test_no_control_verb_imports_torch(argv: list[str], env: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, *argv],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(done.stderr.splitlines()[-1])
    assert report["code"] == (2 if "adapter.rnk=3" in argv else 0), done.stderr
    assert [name for name in HEAVY if name in report["modules"]] == []


@pytest.mark.parametrize("argv", [["--help"], ["check", TINY]], ids=" ".join)
def test_an_answer_takes_a_quarter_of_a_second(argv: list[str], env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "decompft.launcher.cli", *argv]
    subprocess.run(command, env=env, capture_output=True, check=True)  # writes the byte code
    floor = [sys.executable, "-c", _FLOOR]
    # in turns, and the least of several: other processes on the machine only ever add
    pairs = [(_cpu_s(command, env), _cpu_s(floor, env)) for _ in range(3)]
    answer, least = (min(column) for column in zip(*pairs, strict=True))
    # on a slow or busy machine the libraries alone take longer: then ours may add half of that
    assert answer < max(0.25, 1.5 * least), pairs


def _cpu_s(command: list[str], env: dict[str, str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=env, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
