"""Running a job to its end: signals become a stop file, a dead rank becomes an outcome in words."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Self

from decompft.launcher.ending import conclude
from decompft.launcher.failure import tail
from decompft.launcher.job import MARK, JobSpec
from decompft.launcher.outcome import Outcome, read_outcome
from decompft.launcher.processes import marked
from decompft.launcher.runs import RunDir
from decompft.launcher.say import Say

# a scheduler's word that the end is near, some minutes before its SIGTERM
_NOTICES = (signal.SIGUSR1, signal.SIGUSR2)
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *_NOTICES)
_POLL_S = 0.2
_LEAVE_S = 30.0  # for ranks to go once the outcome is written; one that hangs never does
_SAME_S = 1.0  # schedulers and closing terminals send the same notice two or three times


class PortTaken(Exception):
    """The rendezvous port was free when it was chosen and is not any more; nothing has run."""


def supervise(
    job: JobSpec, run: RunDir, incarnation: int, *, interrupts: Interrupts, say: Say, lock: int | None = None
) -> Outcome:
    """Run a job and say how it ended; its outcome.json exists afterwards, disk permitting.

    The first SIGINT, SIGTERM or SIGHUP asks the ranks to save and stop and waits for them; the second kills
    every process of the job. SIGUSR1 and SIGUSR2 ask, too, and never kill. Signals less than a second apart are one.
    `lock` (a descriptor of `RunDir.lock`) is inherited by the job.

    Raises:
        PortTaken: another process took the port; try again with another one.
    """
    log_start, oom_kills = _size(run.metrics_path), _oom_kills()
    with run.launcher_log(incarnation).open("ab") as log:
        process = start(job.argv, job.env, stderr=log, lock=lock)
        told, ended_at = 0, None
        while _wait(process) is None:
            if ended_at is None and read_outcome(run.incarnation_dir(incarnation)) is not None:
                ended_at = time.monotonic()
            if ended_at is not None and time.monotonic() - ended_at > _LEAVE_S:
                say(f"the run has ended, but a rank is still there after {_LEAVE_S:.0f} s: killing it")
                kill_job(job, process)
                ended_at = math.inf
            if interrupts.count > told:
                told = interrupts.count
                _event(run, "signal", incarnation=incarnation, signal=interrupts.last, count=told)
                if told == 1:
                    more = "" if interrupts.is_notice else "; once more to kill them now"
                    say(f"{interrupts.last}: {_request_stop(run, incarnation)}{more}")
                else:
                    say(f"{interrupts.last}: killing every rank; what is not saved is lost")
                    # not SIGTERM: a rank answers that with a save
                    kill_job(job, process)
        # an agent that was killed leaves its ranks behind, still writing to the run
        kill_job(job, process)
    if process.returncode != 0 and told == 0 and _port_was_taken(run, incarnation):
        raise PortTaken
    return conclude(
        run, incarnation, process.returncode, was_killed=told > 1, log_start=log_start,
        oom_kills=_oom_kills() - oom_kills,
    )  # fmt: skip


class Interrupts:
    """Counts signals to stop while a launch runs, instead of dying of them.

    A SIGUSR1 or SIGUSR2 and the first of the others are one: a scheduler gives notice with one of the former, often to
    every process, and sends SIGTERM at the end, while the save may still be under way.
    """

    def __init__(self) -> None:
        self.count = 0
        self._num_orders = 0  # signals that are no notice
        self.last = ""
        self._time_s = float("-inf")
        self._before: dict[signal.Signals, Any] = {}

    @property
    def is_notice(self) -> bool:
        """Whether all so far were notices, of which no number kills."""
        return self.count > 0 and self._num_orders == 0

    def __enter__(self) -> Self:
        for number in _STOP_SIGNALS:
            # under nohup SIGHUP is ignored, and stays so, as SIGUSR1 after a script's `trap "" USR1`
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if time.monotonic() - self._time_s < _SAME_S:
            return
        self._time_s = time.monotonic()
        self._num_orders += number not in _NOTICES
        self.count = max(1, self._num_orders)
        self.last = signal.Signals(number).name


def start(
    argv: tuple[str, ...], env: dict[str, str], *, stderr: Any = None, lock: int | None = None
) -> subprocess.Popen[bytes]:
    """Start a child in a session of its own, so that Ctrl-C in the terminal reaches only us.

    Its stdout is ours, so that rank 0 sees a terminal where there is one. Notices, which a scheduler may
    send to every process of a job step, are ours to pass on: the child and its children inherit that they are ignored.
    """
    return subprocess.Popen(
        argv,
        env=os.environ | env,
        stdin=subprocess.DEVNULL,
        stderr=stderr,
        start_new_session=True,
        preexec_fn=_ignore_notices,  # the launcher has one thread
        pass_fds=() if lock is None else (lock,),
    )


def _ignore_notices() -> None:
    for number in _NOTICES:
        signal.signal(number, signal.SIG_IGN)


def kill_job(job: JobSpec, process: subprocess.Popen[bytes]) -> None:
    """Kill a job's processes: its group, and the ranks, which torchrun puts in sessions of their own."""
    if MARK in job.env:
        for pid, _ in marked(job.env[MARK]):
            _kill(os.kill, pid)
    _kill(os.killpg, process.pid)


def _request_stop(run: RunDir, incarnation: int) -> str:
    """Ask the ranks to save and stop; what was done, in words."""
    try:
        run.stop_file(incarnation).touch()
    except OSError as error:
        return f"the ranks cannot be asked to stop ({error.strerror}) and go on"
    return "asked every rank to save and stop"


def _event(run: RunDir, event: str, **details: Any) -> None:
    try:
        run.append_event(event, **details)
    except OSError:
        pass  # a full disk must not keep a signal from the ranks


def _port_was_taken(run: RunDir, incarnation: int) -> bool:
    if any(run.log_dir(incarnation).glob("rank-*.log")):
        return False  # the ranks got as far as logging: the agent had its port
    return "EADDRINUSE" in tail(run.launcher_log(incarnation))


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return None


def _kill(how: Callable[[int, int], None], target: int) -> None:
    try:
        how(target, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # ended meanwhile


def _oom_kills() -> int:
    """Processes that this machine's kernel has killed for memory; 0 where it does not count them."""
    try:
        counters = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in counters if line.startswith("oom_kill ")), 0)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
