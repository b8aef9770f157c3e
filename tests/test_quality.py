"""Ruff, mypy and import-linter are part of the tests: what CI checks is what a developer runs."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("mypy",),
        ("lint-imports",),
    ],
    ids=" ".join,
)
def test_checker_is_clean(command: tuple[str, ...]) -> None:
    # beside the interpreter that runs the tests, whether or not its folder is on PATH
    tool = shutil.which(command[0], path=str(Path(sys.executable).parent)) or shutil.which(command[0])
    if tool is None:
        pytest.skip(f"{command[0]} is not installed: pip install -e .[test]")
    done = subprocess.run(
        [tool, *command[1:]], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def test_adapters_know_nothing_of_ranks() -> None:
    # import-linter sees an outside package as one node, so it cannot tell torch.distributed from torch
    files = sorted((ROOT / "adapters").rglob("*.py"))
    assert files
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in _imports(path)
        if name.startswith("torch.distributed")
    ]
    assert found == []


def test_source_is_ascii() -> None:
    files = [
        p for top in ("adapters", "launcher", "slurm", "recipes", "tests") for p in (ROOT / top).rglob("*.py")
    ]
    assert len(files) > 30
    assert [str(path.relative_to(ROOT)) for path in files if not path.read_bytes().isascii()] == []


def test_no_file_is_longer_than_400_lines() -> None:
    files = [p for top in ("adapters", "launcher", "slurm") for p in (ROOT / top).rglob("*.py")]
    assert len(files) > 30
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text("utf-8").splitlines())) > 400}
    assert long == {}


def _imports(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names
