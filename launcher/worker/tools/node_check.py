"""Can this node train, alone and with the others? A few seconds on every node of a job, before the ranks start.

One process a node: `python -m decompft.launcher.worker.tools.node_check RUN_DIR --incarnation N --nodes K --node-id I
--address A --port P`. What is found goes to incarnations/N/nodes/NODE.json, which launcher/node_report.py reads; the
exit code is 0 whatever is found, since a step of srun would kill the other nodes' checks for another one.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import platform
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from decompft.launcher.errors import EXIT_FAILED, UserError
from decompft.launcher.node_file import PHASE_DONE, PHASE_TORCH, Link, NodeFile, Problem, nodes_dir
from decompft.launcher.plan import Plan
from decompft.launcher.runs import RunDir
from decompft.launcher.worker import node_gpus, node_links, node_places
from decompft.launcher.worker.node_lead import Lead
from decompft.launcher.worker.node_meeting import Gone, Member
from decompft.launcher.worker.tools.main import run_tool

_LAST_WORDS_S = 3.0  # kept for writing files once everything else has taken too long


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    check = _Check(args)
    watch = threading.Timer(args.timeout, check.give_up)
    watch.daemon = True
    watch.start()
    # should compiled code hold the interpreter, so that the timer's thread cannot run
    faulthandler.dump_traceback_later(args.timeout + _LAST_WORDS_S, exit=True)
    try:
        check.run()
    finally:
        watch.cancel()
        faulthandler.cancel_dump_traceback_later()


class _Check:
    """One node's check; `file` is what it would leave behind at this moment."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._begin = time.monotonic()
        self._end = self._begin + args.timeout - _LAST_WORDS_S
        self._run = RunDir(args.run_dir)
        self._folder = nodes_dir(self._run.incarnation_dir(args.incarnation))
        self.file = NodeFile(
            node=os.environ.get("SLURMD_NODENAME") or platform.node(),
            node_id=args.node_id,
            phase="starting",
            took_s=0.0,
            device=args.device,
            versions=node_places.versions(),
        )

    def run(self) -> None:
        token = self._look()
        lead = self._lead(token)
        member: Member | None = None
        try:
            if self._args.nodes > 1:
                member = self._meet(can_write=bool(token))
            self._compute()
            if member is not None:
                self._time_links(member)
            self._to(PHASE_DONE)
            if member is not None:
                with suppress(Gone):
                    member.step({"kind": "result", "file": self.file.to_json()}, end_s=self._end)
        except Exception as error:
            self._add(Problem(kind="check", severity="bad", text=f"the check broke: {_first_line(error)}"))
            self._to(self.file.phase)
            raise
        finally:
            if member is not None:
                member.close()
            if lead is not None:
                lead.join()
            if token:
                with suppress(OSError):
                    (self._folder / token).unlink()
            for problem in self.file.problems:
                print(f"{self.file.node}: {problem.severity}: {problem.text}", file=sys.stderr, flush=True)

    def give_up(self) -> None:
        """The time is up: the file of the last phase is on disk already, and says what this node was doing."""
        print(
            f"{self.file.node}: the check did not end within {self._args.timeout:.0f} s; it was {self.file.phase}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_FAILED)

    def _look(self) -> str:
        """All that needs neither torch nor another node; returns the name of this node's token."""
        args, run_dir = self._args, self._run.path
        token, problems = node_places.write_token(self._folder, args.node_id)
        self._to("looking at its GPUs and folders")
        plan = self._plan() if token else None
        if token and plan is None:
            text = f"{run_dir}: there is no plan.json of this version here"
            problems.append(Problem(kind="run folder", severity="bad", text=text))
        memory = disk = None
        if plan is not None:
            memory, found = node_places.memory_problems(plan)
            problems += found
            if args.node_id == 0:
                disk, found = node_places.disk_problems(run_dir, plan)
                problems += found
        problems += node_places.scratch_problems()
        if args.device == "cuda":
            problems += node_gpus.check_gpus(args.gpus)[1]
        self.file = replace(
            self.file,
            memory_free_bytes=memory,
            run_dir_free_bytes=disk,
            file_system=node_places.file_system(run_dir),
            problems=tuple(problems),
        )
        return token

    def _lead(self, token: str) -> Lead | None:
        """The head's part, if this is the head of several nodes."""
        args = self._args
        if args.node_id or args.nodes == 1:
            return None
        try:
            lead = Lead(
                args.port,
                args.nodes,
                folder=self._folder,
                token=token,
                device=args.device,
                hello_end_s=self._begin + args.timeout / 3,
                end_s=self._end,
            )
        except OSError as error:
            text = f"port {args.port} cannot be opened there: {error.strerror or error}"
            self._add(Problem(kind="head", severity="bad", text=text))
            return None
        lead.start()
        return lead

    def _plan(self) -> Plan | None:
        try:
            return self._run.read_plan()
        except (UserError, OSError):
            return None

    def _meet(self, *, can_write: bool) -> Member | None:
        """Connect to the head, compare clocks and folders; None when it cannot be reached."""
        self._to("waiting for the other nodes")
        args = self._args
        address = "127.0.0.1" if args.node_id == 0 else args.address
        try:
            member = Member(args.node_id, address, args.port, end_s=self._begin + args.timeout / 2)
            ahead, off_by = member.clock(end_s=self._end)
            token = member.step({"kind": "hello", "node": self.file.node}, end_s=self._end)["token"]
        except (Gone, KeyError) as error:
            self._add(Problem(kind="head", severity="warn", text=f"the head node cannot be reached: {error}"))
            self.file = replace(self.file, reached_head=False)
            return None
        # where nothing could be written, enough time has gone by
        patience = {} if can_write else {"patience_s": 0.5}
        self.file = replace(
            self.file,
            reached_head=True,
            clock_ahead_s=round(ahead, 4),
            clock_error_s=round(off_by, 4),
            # a head that cannot write has said so itself
            sees_head=node_places.sees(self._folder, token, **patience) if token else None,
        )
        return member

    def _compute(self) -> None:
        self._to(PHASE_TORCH)
        try:
            import torch

            torch.set_num_threads(1)  # the ranks' matter, not ours
        except Exception as error:  # a broken installation raises anything
            text = f"torch cannot be loaded: {_first_line(error)}"
            self._add(
                Problem(kind="torch", severity="bad", text=text, hint="run `decompft doctor` on that node")
            )
            return
        self._to("computing")
        names, problems = node_gpus.compute_problems(self._args.device, self._args.gpus)
        known = {problem.text for problem in self.file.problems}  # nvidia-smi may have counted, too
        self.file = replace(self.file, gpus=tuple(names))
        self._add(*(problem for problem in problems if problem.text not in known))

    def _time_links(self, member: Member) -> None:
        """Reduce with the partners that the head names, until it names no more."""
        self._to("timing the network")
        can_reduce = not any(problem.kind in ("torch", "gpu", "gpu count") for problem in self.file.problems)
        message: dict[str, Any] = {"kind": "ready", "can_reduce": can_reduce}
        store = None  # kept over the rounds; the head's serves the others
        if can_reduce and self._args.node_id == 0:
            store = node_links.host_store(self._args.address)
            message["port"] = store.port
        links: dict[str, Link] = {}
        try:
            while answer := member.step(message, end_s=self._end):
                message = {"kind": "link"}
                if answer["peer"] is None:  # a pause
                    continue
                mb_per_s, said = 0.0, ""
                try:
                    store = store or node_links.join_store(self._args.address, answer["port"])
                    mb_per_s = node_links.measure(store, answer["key"], answer["rank"], self._args.device)
                except (RuntimeError, ValueError, OSError) as error:  # torch's, of networks of every kind
                    said = _first_line(error)
                link = Link(peer=answer["peer"], mb_per_s=round(mb_per_s, 1), error=said)
                known = links.get(link.peer)
                if known is None or link.mb_per_s >= known.mb_per_s:
                    links[link.peer] = link
                message |= asdict(link)
        except Gone as error:
            self._add(Problem(kind="head", severity="warn", text=f"while timing the network: {error}"))
        self.file = replace(self.file, links=tuple(links.values()))

    def _add(self, *problems: Problem) -> None:
        self.file = replace(self.file, problems=(*self.file.problems, *problems))

    def _to(self, phase: str) -> None:
        """Begin a phase, and leave a file that says so."""
        took_s = round(time.monotonic() - self._begin, 2)
        self.file = replace(self.file, phase=phase, took_s=took_s)
        with suppress(
            OSError
        ):  # a folder that cannot be written is among the problems; the head writes for us
            if self._folder.is_dir():
                self.file.write(self._folder)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="node_check")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--incarnation", type=int, required=True)
    parser.add_argument("--nodes", type=int, required=True, help="nodes that take part")
    parser.add_argument("--node-id", type=int, required=True, help="this one's number; 0 is the head")
    parser.add_argument("--address", required=True, help="of the head, as the others reach it")
    parser.add_argument("--port", type=int, required=True, help="that is free on the head")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--gpus", type=int, default=0, help="asked for on each node")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="of the whole check")
    return parser


if __name__ == "__main__":
    run_tool(main, sys.argv[1:])
