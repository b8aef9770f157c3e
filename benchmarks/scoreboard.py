"""Every method on the same data, seeds and learning-rate search: the scoreboard's cells, run on some GPUs.

    python benchmarks/scoreboard.py --model SMOLLM2.gguf --data ../shared/data/commonsense --gpus 4 --per-gpu 6 \
        --minutes 25 --merge benchmarks/results/scoreboard.json --out benchmarks/results/scoreboard.json

A second start skips what is finished. Several cells share a GPU, because a model of 135M parameters is bound by the
host; `time` cells come first and have their GPU to themselves. With --minutes nothing is started that would probably
not end in time, and what still runs then is killed and counts as not run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from scoreboard_cases import cases
from scoreboard_cells import (
    KINDS,
    Budget,
    Cell,
    Row,
    Setup,
    Store,
    all_cells,
    order_of,
    read_results,
    write_json,
    write_search_files,
)
from scoreboard_worker import prepare_data

HERE = Path(__file__).resolve().parent
WRITE_EVERY_S = 60


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    began = time.monotonic()
    budget = Budget(**json.loads(args.budget))
    setup = Setup(
        recipe=args.recipe, model=args.model, data=args.data.resolve(), work=args.work.resolve(), budget=budget,
        overrides=tuple(args.override),
    )  # fmt: skip
    store = Store(setup)
    for path in args.merge:
        store.merge(read_results(path)[1])
    write_search_files(setup)
    if args.prepare:
        for cell in all_cells(cases()[:1], budget, ("search", "time")):
            prepare_data(order_of(setup, store, cell, cell.rate))
        return
    chosen = [c for c in cases() if not args.cases or c.name in args.cases]
    deadline = math.inf if args.minutes is None else began + 60 * args.minutes
    board = Board(store, deadline)
    pool = Pool(args.gpus, args.per_gpu, setup.work / "logs")
    writer = Writer(args.out, store)
    try:
        for kinds, per_gpu in ((("time",), 1), (tuple(k for k in KINDS if k != "time"), args.per_gpu)):
            cells = [c for c in all_cells(chosen, budget, [k for k in kinds if k in args.kinds])]
            run_cells(board, cells, pool, per_gpu, writer)
    finally:
        pool.kill()
        writer.write()
    left = sum(store.row(c) is None for c in all_cells(chosen, budget, args.kinds))
    print(f"{len(store.rows)} cells on file, {left} of those asked for are missing, "
          f"{time.monotonic() - began:.0f} s", flush=True)  # fmt: skip


def run_cells(board: Board, cells: list[Cell], pool: Pool, per_gpu: int, writer: Writer) -> None:
    """Run what is not finished of `cells`, on the first `per_gpu` processes of each GPU."""
    board.open(cells)
    slots = pool.slots(per_gpu)
    threads = [threading.Thread(target=_serve, args=(board, slot, writer), daemon=True) for slot in slots]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        threads[0].join(0.2)
        time.sleep(0.2)
        writer.write_now_and_then()
        if board.is_over():
            board.close()
            pool.kill()
    for thread in threads:
        thread.join()


def _serve(board: Board, slot: Slot, writer: Writer) -> None:
    """One process's cells, until there is nothing left for it."""
    while (taken := board.take()) is not None:
        cell, order = taken
        row = slot.run(order)
        if row is None and board.closed:
            return  # killed: not finished, whatever it had done
        if row is None:
            died = f"its process died: {slot.last_words()}"
            row = {**order["row"], "ended": "error", "message": died, "seconds": 0.0}
        board.finished(cell, row)
        print(describe(row, board.count()), flush=True)


class Board:
    """Which cell is next; shared by the threads that serve processes."""

    def __init__(self, store: Store, deadline: float) -> None:
        self.store = store
        self.closed = False
        self._deadline = deadline
        self._changed = threading.Condition()
        self._waiting: list[Cell] = []
        self._running: set[str] = set()
        self._seconds: dict[tuple[str, str], list[float]] = {}
        self._total = 0

    def open(self, cells: list[Cell]) -> None:
        self._waiting = [cell for cell in cells if self.store.row(cell) is None]
        self._total = len(self._waiting)

    def take(self) -> tuple[Cell, dict[str, Any]] | None:
        """The first cell that can run now, waiting for one if others must end before; None: no more."""
        with self._changed:
            while True:
                if self.closed:
                    return None
                for cell in list(self._waiting):
                    rate = self._rate(cell)
                    if rate is None:
                        continue
                    if math.isnan(rate) or time.monotonic() + self._expected(cell) > self._deadline:
                        self._waiting.remove(cell)  # no rate of its search worked, or no time is left
                        continue
                    self._waiting.remove(cell)
                    self._running.add(cell.name)
                    order = order_of(
                        self.store.setup, self.store, cell, None if cell.kind == "base" else rate
                    )
                    return cell, order
                if not self._running or not self._waiting:
                    return None
                self._changed.wait(1.0)

    def finished(self, cell: Cell, row: Row) -> None:
        with self._changed:
            self._running.discard(cell.name)
            if row["ended"] == "ok":
                self._seconds.setdefault((cell.kind, cell.form), []).append(row["seconds"])
            self.store.keep(row)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def is_over(self) -> bool:
        return time.monotonic() >= self._deadline

    def count(self) -> str:
        with self._changed:
            return f"{self._total - len(self._waiting) - len(self._running)}/{self._total}"

    def _rate(self, cell: Cell) -> float | None:
        """None: its search has not ended; NaN: it found nothing."""
        if cell.kind != "train":
            return cell.rate if cell.rate is not None else 0.0
        return self.store.best_rate(cell.case)

    def _expected(self, cell: Cell) -> float:
        """Seconds, from the slower ones of its kind so far; 0 before the first has ended."""
        known = self._seconds.get((cell.kind, cell.form), [])
        return statistics.quantiles(known, n=4)[2] if len(known) > 3 else max(known, default=0.0)


class Slot:
    """A place for one worker process, started when its first cell comes and again after it died."""

    def __init__(self, gpu: int, log: Path) -> None:
        self.gpu = gpu
        self.log = log
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._dead = False

    def run(self, order: dict[str, Any]) -> Row | None:
        """The cell's row; None when the process died over it, or was killed."""
        process = self._start()
        if process is None:
            return None
        into, out = _pipes(process)
        try:
            into.write(json.dumps(order) + "\n")
            into.flush()
            line = out.readline()
        except OSError:
            line = ""
        row: Row | None = json.loads(line) if line else None
        if row is None or row["ended"] == "error":
            process.wait()
        return row

    def kill(self) -> None:
        """For good."""
        with self._lock:
            self._dead = True
            if self._process is not None and self._process.poll() is None:
                self._process.kill()
                self._process.wait()

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-1500:]

    def _start(self) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._dead:
                return None
            if self._process is None or self._process.poll() is not None:
                env = os.environ | {
                    "CUDA_VISIBLE_DEVICES": str(self.gpu), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
                    "TOKENIZERS_PARALLELISM": "false", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
                }  # fmt: skip
                with self.log.open("a") as log:
                    self._process = subprocess.Popen(
                        [sys.executable, str(HERE / "scoreboard_worker.py")],
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env,
                    )  # fmt: skip
            return self._process


class Pool:
    """The slots of all GPUs."""

    def __init__(self, gpus: int, per_gpu: int, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._slots = [
            [Slot(gpu, logs / f"gpu{gpu}-{place}.log") for gpu in range(gpus)] for place in range(per_gpu)
        ]

    def slots(self, per_gpu: int) -> list[Slot]:
        return [slot for layer in self._slots[:per_gpu] for slot in layer]

    def kill(self) -> None:
        for slot in self.slots(len(self._slots)):
            slot.kill()


class Writer:
    """The one file with all cells, every minute and at the end."""

    def __init__(self, path: Path, store: Store) -> None:
        self._path = path
        self._store = store
        self._last = time.monotonic()

    def write(self) -> None:
        write_json(
            self._path, {"budget": asdict(self._store.setup.budget), "cells": self._store.valid(cases())}
        )

    def write_now_and_then(self) -> None:
        if time.monotonic() - self._last > WRITE_EVERY_S:
            self._last = time.monotonic()
            self.write()


def describe(row: Row, count: str) -> str:
    """A line for the screen."""
    text = f"{count} {row['cell']} {row['ended']} {row['seconds']:.0f} s"
    if row["ended"] != "ok":
        return f"{text}: {row['message'].strip().splitlines()[-1][:300]}"
    if row["kind"] == "search":
        return f"{text}, held-out loss {row['held_out_loss']:.4f}"
    if row["kind"] == "time":
        return f"{text}, {row['step_s']:.3f} s a step"
    return f"{text}, accuracy {row['accuracy']['mean']:.4f}, label loss {row['label_loss']['mean']:.4f}"


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the four training and test files")
    parser.add_argument("--model", help="SmolLM2's GGUF file; default the recipe's")
    parser.add_argument("--recipe", type=Path, default=HERE / "scoreboard.yaml")
    parser.add_argument("--work", type=Path, default=HERE.parent / ".bench" / "scoreboard")
    parser.add_argument("--out", type=Path, required=True, help="one file with all cells")
    parser.add_argument("--merge", nargs="*", type=Path, default=[], help="earlier files like --out")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--per-gpu", type=int, default=6, help="cells that share a GPU")
    parser.add_argument("--prepare", action="store_true", help="convert and tokenize only; needs no GPU")
    parser.add_argument("--minutes", type=float, help="end by then; default: when all is done")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--cases", nargs="*", help="names; default all")
    parser.add_argument("--budget", default="{}", help="JSON over the defaults of Budget, for trials")
    parser.add_argument(
        "--override", nargs="*", default=[], help="KEY=VALUE of the recipe for every cell, for trials"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
