"""The wheel holds exactly what the tree holds, and nothing of ours has a generic name."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest

pytestmark = pytest.mark.dist


ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("adapters", "launcher", "recipes", "slurm")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    out = tmp_path_factory.mktemp("dist")
    # through the sdist, as a release does: a wheel from the tree can carry a stale build/
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = out.glob("*.whl")
    return ZipFile(path)


def test_wheel_holds_exactly_the_tree(wheel: ZipFile) -> None:
    in_wheel = {name for name in wheel.namelist() if ".dist-info/" not in name}
    in_tree = {
        f"decompft/{path.relative_to(ROOT).as_posix()}"
        for top in SHIPPED
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert len(in_tree) > 30
    assert in_wheel == in_tree


def test_wheel_carries_licence_and_entry_point(wheel: ZipFile) -> None:
    names = [name for name in wheel.namelist() if ".dist-info/" in name]
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "decompft = decompft.launcher.cli:main" in wheel.read(entry_points).decode()


def test_no_module_of_ours_has_a_generic_name(wheel: ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name}
    assert tops == {"decompft"}
    # in a checkout too: an editable install must not put the root on the path
    code = f"import importlib.util as u; print([n for n in {SHIPPED!r} if u.find_spec(n)])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_there_is_no_root_package() -> None:
    assert not (ROOT / "__init__.py").exists()
    spec = find_spec("decompft")
    assert spec is not None and spec.origin is None  # a namespace has no file


def test_every_pinned_version_is_exact() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert "torch==2.13.0" in pins
    assert [line for line in pins if line.count("==") != 1 or "/" in line or "+" in line] == []
