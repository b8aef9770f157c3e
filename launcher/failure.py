"""Why a run died, in words: which rank, the likely cause, its last lines."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from decompft.launcher.outcome import Outcome, read_ranks
from decompft.launcher.runs import RunDir

_TAIL_BYTES = 64 * 1024
_DISK_FULL_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A known way to die."""

    words: str
    hint: str
    is_consequence: bool = False  # of another rank's death


_TOLD_TO_END = Cause(
    words="it was told to end from outside (a scheduler, a shutdown, kill)",
    hint="resume when the machine is yours again",
)

# searched in this order in a rank's message and traceback, then in its last log lines
_CAUSES: tuple[tuple[str, Cause], ...] = (
    (
        r"CUDA out of memory|torch\.(cuda\.)?OutOfMemoryError|CUDA error: out of memory",
        Cause(
            words="the GPU ran out of memory",
            hint="lower train.micro_batch_size, set train.recompute=full, or use more GPUs with fsdp",
        ),
    ),
    (
        r"DefaultCPUAllocator: can't allocate|MemoryError|Cannot allocate memory",
        Cause(
            words="the host ran out of memory",
            hint="lower train.micro_batch_size or data.sequence_length, or use fewer ranks on this machine",
        ),
    ),
    (
        r"No space left on device|ENOSPC|Errno 28\b|Disk quota exceeded|Errno 122\b",
        Cause(
            words="the disk (or the quota) of the run directory is full",
            hint="free some space, or lower checkpoint.keep; committed checkpoints are not harmed",
        ),
    ),
    (
        r"(?i)non-?finite|loss (is|was|became) (nan|inf)",
        Cause(
            words="the loss or a gradient became non-finite (NaN or infinity)",
            hint="lower train.learning_rate or raise train.warmup_steps; the last checkpoint is older",
        ),
    ),
    (
        r"ModuleNotFoundError|ImportError|undefined symbol|cannot open shared object file",
        Cause(
            words="a Python package is missing or broken",
            hint="run `decompft doctor` with the same Python, and install what it names",
        ),
    ),
    (
        r"Connection closed by peer|Connection reset by peer|Connection refused|Broken pipe"
        r"|connectFullMesh failed|Timed out waiting \d+ms|ncclRemoteError|ncclSystemError"
        r"|remote process exited|Watchdog caught collective operation timeout|NCCL communicator was aborted",
        Cause(
            words="it lost another rank, or waited for one too long; the cause is with that rank",
            hint="look for an earlier failure in the other ranks' logs; else raise parallel.timeout_s",
            is_consequence=True,
        ),
    ),
    (r"SignalException: Process \d+ got signal: (15|SIGTERM)", _TOLD_TO_END),
)

_SIGNALS: dict[int, Cause] = {
    signal.SIGKILL: Cause(
        words="something killed it, most likely the kernel because the host ran out of memory",
        hint="`dmesg | grep -i oom` tells; use fewer ranks on this machine, or less memory in each",
    ),
    signal.SIGSEGV: Cause(
        words="a crash in compiled code", hint="run `decompft doctor`: library versions may not fit together"
    ),
    signal.SIGBUS: Cause(
        words="a crash in mapped memory: a full /dev/shm, or a file cut short while it was being read",
        hint="look at `df /dev/shm` and at the model's files",
    ),
    signal.SIGTERM: _TOLD_TO_END,
}

_UNKNOWN = Cause(
    words="not a failure that decompft knows", hint="read the log below; the whole of it is in logs/"
)


def explain(text: str, exit_code: int | None = None) -> Cause:
    """The likely cause behind a message, a traceback or log lines.

    Args:
        text: what the rank said.
        exit_code: of its process, negative for a signal; None when unknown.
    """
    for pattern, cause in _CAUSES:
        if re.search(pattern, text):
            return cause
    if exit_code is not None and exit_code < 0:
        return _SIGNALS.get(-exit_code, _UNKNOWN)
    return _UNKNOWN


def find_failure(run: RunDir, incarnation: int, returncode: int) -> Outcome:
    """The outcome of an incarnation whose ranks left none: the first rank that failed by itself.

    Args:
        returncode: of the launched process (torchrun, or the only rank), negative for a signal.
    """
    ranks = read_ranks(run.incarnation_dir(incarnation))
    dead = dict(_dead_ranks(tail(run.launcher_log(incarnation))))
    # a rank that only lost its peer is not the cause, though it may be the first, or the only one, to say so
    speakers = sorted((not _has_own_cause(told), told.time_s or 0.0, rank) for rank, told in ranks.items())
    # those that torchrun itself told to end come last
    silent = sorted((r for r in dead if r not in ranks), key=lambda rank: dead[rank] == -signal.SIGTERM)
    if speakers and (not speakers[0][0] or not silent):
        rank = speakers[0][2]
        return _said(ranks[rank], rank)
    if silent:
        return _fell_silent(run, incarnation, silent[0], dead[silent[0]])
    is_alone = run.read_plan().world.size == 1
    return _fell_silent(run, incarnation, 0 if is_alone else None, returncode)


def log_tail(run: RunDir, incarnation: int, rank: int | None, num_lines: int = 10) -> tuple[Path, list[str]]:
    """The last lines of a rank's log, or of the launcher's when the rank left none."""
    candidates = [run.launcher_log(incarnation)]
    if rank is not None:
        candidates.insert(0, run.rank_log(incarnation, rank))
    for path in candidates:
        lines = [line for line in tail(path).splitlines() if line.strip()]
        if lines:
            return path, lines[-num_lines:]
    return candidates[-1], []


def tail(path: Path) -> str:
    """The end of a text file, "" if there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read().decode("utf-8", errors="replace")


def describe_exit(code: int) -> str:
    """`was killed by signal 9 (SIGKILL)` or `ended with exit code 1`."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"was killed by signal {-code}"


def _has_own_cause(told: Outcome) -> bool:
    return told.result == "user_error" or not explain(told.message + "\n" + told.traceback).is_consequence


def _said(told: Outcome, rank: int) -> Outcome:
    cause = explain(told.message + "\n" + told.traceback)
    return Outcome(
        result="user_error" if told.result == "user_error" else "failed",
        step=told.step,
        message=told.message,
        # a rank's own hint is better informed than the table
        hint=told.hint or f"likely cause: {cause.words}; {cause.hint}",
        rank=rank,
    )


def _fell_silent(run: RunDir, incarnation: int, rank: int | None, code: int) -> Outcome:
    if code > 128:
        code = 128 - code  # srun's and the shell's way to say killed by a signal
    # of one rank's log every line is its own; the launcher's also has what other ranks suffered
    text = ""
    if code >= 0:
        own_log = "" if rank is None else tail(run.rank_log(incarnation, rank))
        text = own_log or tail(run.launcher_log(incarnation))
    cause = explain(text, code)
    if cause is _UNKNOWN and shutil.disk_usage(run.path).free < _DISK_FULL_BYTES:
        cause = explain("ENOSPC")  # too full even to say so
    who = "the process that started the ranks" if rank is None else f"rank {rank}"
    return Outcome(
        result="failed",
        message=f"{who} {describe_exit(code)}",
        hint=f"likely cause: {cause.words}; {cause.hint}",
        rank=rank,
    )


def _dead_ranks(agent_log: str) -> Iterator[tuple[int, int]]:
    """(rank, exit code) of every process torchrun saw fail, its root cause first.

    Its report has blocks of `rank : 1 (local_rank: 1)` and `exitcode : -9 (pid: 123)`, the root cause last;
    srun puts `0: ` before each line.
    """
    block = r"^(?:\d+: )?\s*rank\s*:\s*(\d+) .*\n(?:\d+: )?\s*exitcode\s*:\s*(-?\d+)"
    found = re.findall(block, agent_log, re.MULTILINE)
    for rank, code in reversed(found):
        yield int(rank), int(code)
