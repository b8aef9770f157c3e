"""`decompft doctor --slurm` looks at the folders, modules and interpreters that a profile names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from slurm_site import Site
from slurm_site import site as site

from decompft.slurm.check_limits import Finding

pytestmark = pytest.mark.dist


def test_folders_are_there_or_can_be_made_or_are_the_nodes_business(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert site.check(logs=f"{tmp_path}/new/logs")["logs"].text.endswith("Slurm needs it on every node")
    assert site.check(logs=f"{tmp_path}/file/logs")["logs"].state == "wrong"
    assert site.check(scratch=str(tmp_path))["scratch"].state == "ok"
    for path in ("/local/$SLURM_JOB_ID", "~/scratch", "/not-here/scratch"):
        assert site.check(scratch=path)["scratch"].state == "not checked"


def test_a_folder_that_is_not_writable_is_wrong(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert site.check(logs=f"{site.folder}/logs")["logs"].text == f"{site.folder} is not writable for you"


def test_an_environment_must_be_there_with_decompft_in_it(site: Site, tmp_path: Path) -> None:
    def of(path: str) -> Finding:
        return site.check(environment={"kind": "venv", "path": path})["environment"]

    assert of("~/venv").state == "wrong" and "python -m venv ~/venv" in of("~/venv").fix
    (tmp_path / "venv/bin").mkdir(parents=True)
    site.program("../venv/bin/python", "exit 1")
    assert of("~/venv").fix == "~/venv/bin/python -m pip install decompft"
    site.program("../venv/bin/python", "echo 0.1.0")
    assert of("~/venv").text == "~/venv/bin/python, decompft 0.1.0"
    assert of("/not-here/venv").state == of("$WORK/venv").state == "not checked"
    conda = {"kind": "conda", "prefix": str(tmp_path / "venv")}
    assert site.check(environment=conda)["environment"].state == "ok"
    assert site.check(environment={"kind": "conda", "name": "ft"})["environment"].state == "not checked"


def test_an_image_must_be_there_and_pyxis_known(site: Site, tmp_path: Path) -> None:
    image = tmp_path / "a.sqsh"
    found = site.check(environment={"kind": "pyxis", "image": str(image)})
    assert found["environment"].state == "wrong" and found["pyxis"].state == "wrong"
    image.write_text("")
    site.program("srun", "echo '  --container-image=[USER@][REGISTRY#]IMAGE'")
    found = site.check(environment={"kind": "pyxis", "image": str(image)})
    assert found["environment"].state == found["pyxis"].state == "ok"
    found = site.check(environment={"kind": "apptainer", "image": "docker://a/b:1"})
    assert found["environment"].state == "not checked" and "pyxis" not in found


@pytest.mark.parametrize(
    ("function", "state", "words"),
    [
        ("", "not checked", "no command `module`"),
        ("module() { :; }", "ok", "gcc/13, cuda/12.8"),
        ("module() { echo 'Lmod has detected the following error: no cuda/12.8' >&2; return 1; }", "wrong", "no cuda"),
        ("module() { echo 'ModuleCmd_Load.c(213):ERROR:105: Unable to locate' >&2; }", "wrong", "Unable to locate"),
    ],
)  # fmt: skip
def test_modules_are_tried_in_a_login_shell(site: Site, function: str, state: str, words: str) -> None:
    (site.folder / "bin/bash").symlink_to("/bin/bash")
    (site.folder / ".bash_profile").write_text(function + "\n")
    found = site.check(modules=["gcc/13"], environment={"kind": "module", "load": ["cuda/12.8"]})["modules"]
    assert found.state == state and words in found.text
