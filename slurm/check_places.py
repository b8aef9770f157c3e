"""Are the folders, images and programs that a profile names on this machine, as far as it can tell?

Nodes may have what a login node has not, and the other way round. A path is wrong where its first folder is here and
the rest is not; it is not checked where it means something else on each node.
"""

from __future__ import annotations

import os
from pathlib import Path

from decompft.launcher.errors import SlurmError
from decompft.slurm.check_limits import Finding
from decompft.slurm.commands import call
from decompft.slurm.profile import Profile
from decompft.slurm.profile_environment import (
    ApptainerEnvironment,
    CondaEnvironment,
    ModuleEnvironment,
    PyxisEnvironment,
    VenvEnvironment,
)
from decompft.slurm.shell_words import is_expanding

_OF_NODES = "only the nodes can tell"
_VERSION = "from importlib.metadata import version; print(version('decompft'))"


def check_places(profile: Profile) -> list[Finding]:
    """Logs, scratch, modules and the environment, as far as the profile names them."""
    found = []
    if profile.logs:
        found.append(_folder("logs", profile.logs, is_shared=True))
    if profile.scratch:
        found.append(_folder("scratch", profile.scratch, is_shared=False))
    environment = profile.environment
    modules = [*profile.modules, *(environment.load if isinstance(environment, ModuleEnvironment) else [])]
    if modules:
        found.append(_modules(modules))
    match environment:
        case VenvEnvironment():
            found.append(_python(f"{environment.path}/bin/python", f"python -m venv {environment.path}"))
        case CondaEnvironment(prefix=str(prefix)):
            found.append(_python(f"{prefix}/bin/python", f"conda create --prefix {prefix} python"))
        case CondaEnvironment():
            text = f"conda environment {environment.name}: the job activates it"
            found.append(Finding(name="environment", state="not checked", text=text))
        case ApptainerEnvironment() | PyxisEnvironment():
            found.append(_image(environment.image))
    if isinstance(environment, PyxisEnvironment):
        found.append(_pyxis())
    return found


def _folder(name: str, path: str, *, is_shared: bool) -> Finding:
    """A folder that will be written to; one that is not there yet is made where it can be."""
    if is_expanding(path):
        return Finding(name=name, state="not checked", text=f"{path}: {_OF_NODES}")
    folder = Path(path)
    if not is_shared and not folder.is_dir():
        return Finding(name=name, state="not checked", text=f"{path} is not here: {_OF_NODES}")
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        return Finding(name=name, state="wrong", text=f"{there} is a file", fix=f"name a folder as {name}")
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding(
            name=name,
            state="wrong",
            text=f"{there} is not writable for you",
            fix=f"name another folder as {name}",
        )
    later = "" if there == folder else ": will be made, but Slurm needs it on every node"
    return Finding(name=name, state="ok", text=f"{path}{later}")


def _file(name: str, path: str, fix: str) -> Finding:
    plain = str(Path(path).expanduser())
    if is_expanding(plain) or not Path(plain).is_absolute():
        return Finding(name=name, state="not checked", text=f"{path}: {_OF_NODES}")
    if Path(plain).exists():
        return Finding(name=name, state="ok", text=path)
    if not Path(*Path(plain).parts[:2]).exists():
        return Finding(name=name, state="not checked", text=f"{path} is not here: {_OF_NODES}")
    return Finding(name=name, state="wrong", text=f"{path}: no such file", fix=fix)


def _python(path: str, fix: str) -> Finding:
    """An interpreter on a shared file system, with decompft in it."""
    found = _file("environment", path, f"{fix}, and install decompft there")
    if found.state != "ok":
        return found
    try:
        answer = call([str(Path(path).expanduser()), "-P", "-c", _VERSION])
    except SlurmError as error:
        return Finding(name="environment", state="wrong", text=error.message, fix=fix)
    if answer.code != 0:
        text, fix = f"{path} has no decompft", f"{path} -m pip install decompft"
        return Finding(name="environment", state="wrong", text=text, fix=fix)
    return Finding(name="environment", state="ok", text=f"{path}, decompft {answer.stdout.strip()}")


def _image(image: str) -> Finding:
    if image.startswith(("/", "~")):
        return _file("environment", image, "import the image to that file, or name the file that is there")
    return Finding(name="environment", state="not checked", text=f"{image}: the nodes fetch it")


def _modules(names: list[str]) -> Finding:
    """A login shell tries; it is the one that knows the command `module`."""
    script = 'type module >/dev/null 2>&1 || exit 99; module load "$@" || exit 1; module list'
    try:
        answer = call(["bash", "-lc", script, "bash", *names])
    except SlurmError as error:
        return Finding(name="modules", state="not checked", text=error.message)
    if answer.code == 99:
        return Finding(name="modules", state="not checked", text="a login shell here has no command `module`")
    # the oldest kind says what is wrong, and ends with 0
    bad = [line for line in answer.stderr.splitlines() if "ERROR" in line or "rror:" in line]
    if answer.code != 0 or bad:
        words = (bad or answer.stderr.strip().splitlines() or ["module load failed"])[0].strip()
        return Finding(name="modules", state="wrong", text=words, fix="`module avail` lists what is here")
    return Finding(name="modules", state="ok", text=", ".join(names))


def _pyxis() -> Finding:
    try:
        answer = call(["srun", "--help"])
    except SlurmError as error:
        return Finding(name="pyxis", state="not checked", text=error.message)
    if "--container-image" in answer.stdout:
        return Finding(name="pyxis", state="ok", text="srun knows --container-image")
    fix = "environment: {kind: apptainer, ...}, or ask the site for pyxis"
    return Finding(name="pyxis", state="wrong", text="srun here has no --container-image", fix=fix)
