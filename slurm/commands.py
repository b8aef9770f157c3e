"""The one place that starts Slurm's own programs."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from decompft.launcher.errors import SlurmError

# sacct of a busy site can take long; everything else answers in milliseconds
TIMEOUT_S = 60.0
_ENV = {"SLURM_TIME_FORMAT": "standard"}  # a user's own form of dates would not be understood
_SPEAKER = re.compile(r"^(s(batch|cancel|control|queue): )?(error: )?")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a program said."""

    code: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[str]:
        """Of stdout, without empty ones."""
        return [line for line in self.stdout.splitlines() if line.strip()]

    @property
    def words(self) -> str:
        """What it told the user, in one line, without its own name before it."""
        told = (self.stderr.strip() or self.stdout).splitlines()
        lines = [_SPEAKER.sub("", line).strip() for line in told if "--help" not in line]
        return "; ".join(line for line in lines if line) or f"exit code {self.code}"


def call(
    argv: Sequence[str],
    *,
    cluster: str = "",
    timeout_s: float = TIMEOUT_S,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
) -> Answer:
    """Run squeue, sbatch, scontrol, ...; a code other than 0 is the caller's to judge.

    Args:
        cluster: which one to ask, where there are several; "" is the one of this machine.

    Raises:
        SlurmError: the program is not there, or gives no answer in time.
    """
    try:
        done = subprocess.run(
            [argv[0], *(("-M", cluster) if cluster else ()), *argv[1:]],
            input=stdin,
            env={**os.environ, **_ENV, **(env or {})},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError as error:
        raise SlurmError(
            f"{argv[0]}: no such program on this machine",
            "type this on a login node of the cluster, or load its module for Slurm",
        ) from error
    except OSError as error:
        raise SlurmError(f"{argv[0]}: cannot be started ({error.strerror})", "look at PATH") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"{argv[0]}: no answer within {timeout_s:.0f} s", "the controller may be busy or down: try again"
        ) from error
    return Answer(code=done.returncode, stdout=done.stdout, stderr=done.stderr)
