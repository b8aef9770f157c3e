"""Which rank of a dead run failed first, on which node, and why?"""

from __future__ import annotations

import platform
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from decompft.launcher.causes import (
    DISK,
    HOST_MEMORY,
    KILLED,
    NODE,
    TIMED_OUT,
    UNKNOWN,
    USER,
    Finding,
    describe_exit,
    explain,
)
from decompft.launcher.hangs import Reading, post_mortem, read_all, read_hang
from decompft.launcher.outcome import Outcome, read_ranks
from decompft.launcher.runs import RunDir

_TAIL_BYTES = 64 * 1024
_DISK_FULL_BYTES = 1 << 20
# by srun's word for them
_SIGNALS = {signal.strsignal(number): int(number) for number in signal.valid_signals()}


class _Blame(IntEnum):
    """How likely a rank is the one that failed first; the least comes first."""

    SAID_WHY = 0
    DIED = 1
    TOLD_TO_END = 2  # as torchrun tells the survivors
    LOST_ANOTHER = 3  # not the cause, though it may be the first, or the only one, to say so


@dataclass(frozen=True, kw_only=True)
class _Suspect:
    """A rank that failed."""

    blame: _Blame
    order: float  # within the same blame
    rank: int | None
    finding: Finding
    message: str
    hint: str = ""  # a rank's own, better informed than the table
    step: int = 0
    node: str = ""
    is_user_error: bool = False


@dataclass(frozen=True, kw_only=True)
class _Dead:
    """A process that torchrun, or srun, saw fail."""

    rank: int
    host: str
    code: int  # negative for a signal


def find_failure(run: RunDir, incarnation: int, returncode: int, *, oom_kills: int = 0) -> Outcome:
    """The outcome of an incarnation whose ranks left none: the first rank that failed by itself.

    Args:
        returncode: of the launched process (torchrun, or the only rank), negative for a signal.
        oom_kills: processes of this machine that the kernel killed for memory meanwhile.
    """
    folder, world = run.incarnation_dir(incarnation), run.read_plan().world
    hang = read_hang(folder)
    if hang is not None:
        return hang.outcome()
    agent_log = _before_srun_ended_it(tail(run.launcher_log(incarnation)))
    dead = list(_dead_ranks(agent_log)) or list(_dead_tasks(agent_log, world.ranks_per_node))
    ranks = read_ranks(folder)
    suspects = [_speaker(told, rank) for rank, told in ranks.items()]
    silent = [d for d in dead if d.rank not in ranks]
    if not dead and not ranks:
        silent = [_Dead(rank=0, host="", code=returncode)] if world.size == 1 else []
    for order, process in enumerate(silent):
        is_root = bool(dead) and process is dead[0]
        suspects.append(_silent(run, incarnation, process, agent_log, order, oom_kills, is_root))
    first = min(suspects, key=lambda s: (s.blame, s.order, s.rank or 0), default=None)
    if first is None:
        first = _agent(run, returncode, agent_log)
    readings = {r.rank: r for r in read_all(folder, world.size) if not r.is_stale}
    if first.blame >= _Blame.TOLD_TO_END:
        if any(s.finding.cause is TIMED_OUT for s in suspects):
            hang = post_mortem(folder, world.size)
            if hang is not None:
                return hang.outcome()
        if world.nodes > 1:
            first = _lost_node(readings, accounted={s.rank for s in suspects}) or first
    return _outcome(first, readings, is_one_node=world.nodes == 1)


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


def _speaker(told: Outcome, rank: int) -> _Suspect:
    finding = explain(told.message, told.traceback)
    is_user_error = told.result == "user_error"
    if is_user_error and finding.cause.kind != "data":
        finding = Finding(cause=USER, evidence="")
    is_consequence = finding.cause.is_consequence
    return _Suspect(
        blame=_Blame.LOST_ANOTHER if is_consequence else _Blame.SAID_WHY,
        order=told.time_s or 0.0, rank=rank, finding=finding, message=told.message, hint=told.hint,
        step=told.step, node=told.node, is_user_error=is_user_error,
    )  # fmt: skip


def _silent(
    run: RunDir, incarnation: int, dead: _Dead, agent_log: str, order: int, oom_kills: int, is_root: bool
) -> _Suspect:
    code = _signal_or_code(dead.code)
    is_ended = code == -signal.SIGTERM or (code == -signal.SIGKILL and not is_root)
    # of one rank's log every line is its own; the launcher's also has what other ranks suffered
    text = tail(run.rank_log(incarnation, dead.rank)) or agent_log
    if code in (-signal.SIGTERM, -signal.SIGKILL):  # from outside: what the rank itself said is not why
        text = _scheduler_lines(agent_log)
    finding = explain(text, exit_code=code)
    if finding.cause is KILLED and oom_kills:
        finding = Finding(
            cause=HOST_MEMORY,
            evidence=f"{finding.evidence}, and the kernel killed {oom_kills} process(es) for memory meanwhile",
        )
    blame = _Blame.LOST_ANOTHER if finding.cause.is_consequence else _Blame.DIED
    return _Suspect(
        blame=_Blame.TOLD_TO_END if is_ended else blame, order=order, rank=dead.rank,
        finding=_or_full_disk(finding, run), message=f"rank {dead.rank} {describe_exit(code)}", node=dead.host,
    )  # fmt: skip


def _agent(run: RunDir, returncode: int, agent_log: str) -> _Suspect:
    """The process that started the ranks, when none of them is known to have failed."""
    code = _signal_or_code(returncode)
    text = agent_log if code >= 0 else _scheduler_lines(agent_log)
    finding = explain(text, exit_code=code)
    return _Suspect(
        blame=_Blame.TOLD_TO_END, order=0, rank=None, finding=_or_full_disk(finding, run),
        message=f"the process that started the ranks {describe_exit(code)}",
    )  # fmt: skip


def _lost_node(readings: dict[int, Reading], accounted: set[int | None]) -> _Suspect | None:
    """The first rank of a node of which no rank left a word or an exit code, while others did."""
    seen = {reading.node for rank, reading in readings.items() if rank in accounted}
    for rank, last in readings.items():
        if seen and last.node not in seen:
            return _Suspect(
                blame=_Blame.DIED, order=0, rank=rank, node=last.node, step=last.step,
                message=f"rank {rank} and its whole node {last.node} left no word",
                finding=Finding(
                    cause=NODE,
                    evidence=f"no exit code and no log line from {last.node}; rank {rank} was last in "
                    f"{last.what} after step {last.step}",
                ),
            )  # fmt: skip
    return None


def _outcome(first: _Suspect, readings: dict[int, Reading], *, is_one_node: bool) -> Outcome:
    last = None if first.rank is None else readings.get(first.rank)
    # torchrun looks up what an address is called: 127.0.0.1 is localhost
    named = "" if first.node.partition(".")[0] == "localhost" else first.node
    node = named or (last.node if last else "") or (platform.node() if is_one_node else first.node)
    cause = first.finding.cause
    return Outcome(
        result="user_error" if first.is_user_error else "failed",
        step=max(first.step, last.step if last else 0),
        message=first.message,
        hint=first.hint or cause.hint,
        rank=first.rank,
        node=node,
        cause=cause.kind,
        meaning=cause.words,
        evidence=first.finding.evidence or first.message.splitlines()[0],
    )


def _or_full_disk(finding: Finding, run: RunDir) -> Finding:
    """A disk may be too full even to say so."""
    if finding.cause is not UNKNOWN:
        return finding
    free = shutil.disk_usage(run.path).free
    if free >= _DISK_FULL_BYTES:
        return finding
    return Finding(cause=DISK, evidence=f"{free} bytes are free in {run.path}")


def _signal_or_code(code: int) -> int:
    return 128 - code if code > 128 else code  # srun's and the shell's way to say killed by a signal


def _scheduler_lines(log: str) -> str:
    return "\n".join(line for line in log.splitlines() if "slurmstepd: " in line or "srun: " in line)


def _before_srun_ended_it(log: str) -> str:
    """The log without the word that srun itself cancelled the step: it does so after any task's failure."""
    kept, by_srun = [], False
    for line in log.splitlines(keepends=True):
        by_srun = by_srun or ("srun: " in line and "Terminating StepId=" in line)
        if not (by_srun and "CANCELLED AT" in line and "DUE TO" not in line):
            kept.append(line)
    return "".join(kept)


def _dead_ranks(agent_log: str) -> Iterator[_Dead]:
    """Every process torchrun saw fail, its root cause first.

    Its report has blocks of `host : a`, `rank : 1 (local_rank: 1)` and `exitcode : -9 (pid: 123)`, the root cause
    last; srun puts `0: ` before each line.
    """
    block = (
        r"^(?:\d+: )?\s*host\s*:\s*(\S+).*\n(?:\d+: )?\s*rank\s*:\s*(\d+) .*\n"
        r"(?:\d+: )?\s*exitcode\s*:\s*(-?\d+)"
    )
    for host, rank, code in reversed(re.findall(block, agent_log, re.MULTILINE)):
        yield _Dead(rank=int(rank), host=host, code=int(code))


def _dead_tasks(agent_log: str, ranks_per_node: int) -> Iterator[_Dead]:
    """Every task that srun saw fail before it ended the others, the first one first.

    Its lines are `srun: error: vn-2: task 1: Killed`, `... tasks 4-7: Exited with exit code 127`. A task is a rank, or
    torchrun on a node: of one that could say itself what it saw, srun's code 1 is no news.
    """
    before = agent_log.partition("Terminating StepId=")[0]
    has_torchrun = "torch/distributed/" in agent_log
    line = r"srun: error: (\S+): tasks? (\d+)[\d,-]*: (?:Exited with exit code (\d+)|([A-Z][a-z][a-z ]+))"
    for host, task, code, words in re.findall(line, before):
        known = int(code) if code else -_SIGNALS.get(words.strip(), 0)
        if known < 0 or known > 125 or (known and not has_torchrun):
            yield _Dead(rank=int(task) * (ranks_per_node if has_torchrun else 1), host=host, code=known)
