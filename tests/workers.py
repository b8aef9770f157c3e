"""A launch without its seconds of imports: the worker's own main in forked processes, and the launcher's ending."""

from __future__ import annotations

import logging
import multiprocessing as mp
import os
import signal
import sys
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import tiny  # noqa: F401  imports the whole stack before any fork
import torch

from decompft.launcher.ending import conclude, report
from decompft.launcher.job import free_port
from decompft.launcher.outcome import Outcome
from decompft.launcher.runs import RunDir
from decompft.launcher.worker.main import main

Rank = mp.context.ForkProcess
TIMEOUT_S = 120


class Ended(NamedTuple):
    """What a launch leaves on the terminal."""

    outcome: Outcome
    said: str  # by the launcher, at the end
    screen: str  # by rank 0


def start_ranks(
    run: RunDir, *, resume: Path | None = None, incarnation: int | None = None
) -> tuple[int, list[Rank]]:
    """Start an incarnation; returns its number and its processes."""
    incarnation = incarnation or run.next_incarnation()
    size = run.read_plan().world.size
    env = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    argv = [str(run.path), "--incarnation", str(incarnation)]
    argv += [] if resume is None else ["--resume", str(resume)]
    ranks = [mp.get_context("fork").Process(target=_rank, args=(k, env, argv)) for k in range(size)]
    for process in ranks:
        process.start()
    return incarnation, ranks


def end_ranks(run: RunDir, incarnation: int, ranks: list[Rank]) -> Ended:
    """Wait as torchrun does, which tells the survivors of a dead rank to end; then speak as the launcher does."""
    running = list(ranks)
    while running:
        gone = wait([process.sentinel for process in running], timeout=TIMEOUT_S)
        if not gone:
            for process in running:
                process.kill()
            raise AssertionError(f"ranks hang: {[ranks.index(p) for p in running]}")
        for process in [process for process in running if process.sentinel in gone]:
            process.join()
            running.remove(process)
        if any(process.exitcode for process in ranks):
            for process in running:
                process.terminate()
    codes = [process.exitcode or 0 for process in ranks]
    # torchrun's own code is 1 whatever the ranks' are
    outcome = conclude(run, incarnation, codes[0] if len(codes) == 1 else int(any(codes)))
    lines: list[str] = []
    report(run, incarnation, outcome, again="AGAIN", say=lines.append)
    return Ended(outcome, "\n".join(lines), _screen(Path(run.path)).read_text())


def run_worker(run: RunDir, *, resume: Path | None = None, incarnation: int | None = None) -> Ended:
    """Run an incarnation, by default the next one, to its end."""
    incarnation, ranks = start_ranks(run, resume=resume, incarnation=incarnation)
    return end_ranks(run, incarnation, ranks)


def _rank(rank: int, env: dict[str, str], argv: list[str]) -> None:
    torch.set_num_threads(1)  # first: a forked process hangs in the parent's OpenMP pool
    # pytest's are in the way of what the rank prints and logs
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    logging.root.handlers.clear()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C of the test run is pytest's
    os.environ |= env | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": env["WORLD_SIZE"]}
    sys.argv = ["worker", *argv]
    os.dup2(os.open(_screen(Path(argv[0])), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    main()
    os._exit(0)


def _screen(run_dir: Path) -> Path:
    """Beside the run directory, which may be a full disk."""
    return run_dir.parent / f"{run_dir.name}.screen"
