"""The control plane answers without torch, and loads little else."""

from __future__ import annotations

import json
import os
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

# what the recipe's checker stands on; a library more is start-up time that every command pays
LIBRARIES = {"pydantic", "pydantic_core", "yaml", "annotated_types", "typing_extensions", "typing_inspection"}


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


def test_a_check_loads_no_library_but_the_checkers(env: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, "check", TINY], env=env, capture_output=True, text=True, check=True
    )
    modules = json.loads(done.stderr.splitlines()[-1])["modules"]
    tops = {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)
    # "_" and "__": the compiled half of a library, and the finder of an editable install
    own = {name for name in tops if not name.startswith("_")} - {"decompft", "cython_runtime"}
    assert own <= LIBRARIES
