"""Verbs that watch and end runs: their arguments, and what each of them calls. Only prints and exits."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from decompft.launcher.errors import EXIT_DONE, UserError


def add_run_verbs(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the verbs.

    Args:
        verb: makes the parser of a verb from its name and a line of help.
    """
    runs = verb("runs", "list the runs of a folder, or the tasks of a sweep, and how each of them stands")
    runs.add_argument(
        "folder", metavar="DIR", nargs="?", type=Path, default=Path("runs"), help="default: ./runs"
    )
    _add_json(runs)
    runs.set_defaults(run=_runs)

    status = verb("status", "show how a run stands, here or in Slurm's queue")
    _add_run(status)
    _add_json(status)
    status.set_defaults(run=_status)

    logs = verb("logs", "print what the ranks of a run wrote")
    _add_run(logs)
    how = logs.add_mutually_exclusive_group()
    how.add_argument("--follow", action="store_true", help="go on until the run ends, over all its restarts")
    how.add_argument(
        "--first-error", action="store_true", help="who failed first, why, and the lines about it"
    )
    logs.add_argument("--incarnation", type=int, metavar="N", help="default: the newest")
    logs.add_argument("--rank", metavar="K|all|launcher", default="0", help="default: 0")
    logs.set_defaults(run=_logs)

    cancel = verb("cancel", "have a run save its state, and end it")
    _add_run(cancel)
    cancel.add_argument("--now", action="store_true", help="end it at once; what is not saved is lost")
    cancel.set_defaults(run=_cancel)


def _runs(args: argparse.Namespace) -> int:
    from decompft.launcher.runs import find_run
    from decompft.launcher.sweep_folder import is_sweep
    from decompft.slurm import run_list

    sweep = find_run(str(args.folder))
    if is_sweep(sweep):
        _show_sweep(sweep, args)
        return EXIT_DONE
    found = run_list.list_runs(args.folder)
    if args.json:
        _print_json(run_list.to_json(found))
    else:
        print("\n".join(run_list.to_lines(found)))
    return EXIT_DONE


def _status(args: argparse.Namespace) -> int:
    import time

    from decompft.launcher.sweep_folder import is_sweep
    from decompft.slurm import history, status_text, watch

    path, job = watch.find_named(args.run_name)
    if path is not None and is_sweep(path):
        return _show_sweep(path, args)
    if path is None:
        assert job is not None
        now_s = time.time()
        if args.json:
            _print_json(status_text.job_json(job, now_s))
        else:
            print("\n".join(status_text.job_lines(job, now_s)))
        return watch.code_of(job, now_s)
    status = watch.status_of(path)
    past = history.read_history(status)
    if args.json:
        _print_json(status_text.to_json(status, past))
    else:
        print("\n".join(status_text.to_lines(status, past)))
    return status.code


def _logs(args: argparse.Namespace) -> int:
    from decompft.slurm import logs

    path = _path(args.run_name)
    if not args.rank.isdecimal() and args.rank not in (logs.EVERY, logs.LAUNCHER):
        raise UserError(f"--rank {args.rank}: not a rank", "give its number, all, or launcher")
    if args.first_error:
        logs.first_error(path, incarnation=args.incarnation, say=_say)
    elif args.follow:
        if args.incarnation is not None:
            raise UserError("--follow: goes on with the newest incarnation", "leave out --incarnation")
        status = logs.follow(path, rank=args.rank, say=_say, tell=_tell)
        _tell(f"{status.state}: {status.words}" if status.words else status.state)
        _tell(f"next: {status.next}")
    else:
        logs.show(path, incarnation=args.incarnation, rank=args.rank, say=_say)
    return EXIT_DONE


def _cancel(args: argparse.Namespace) -> int:
    from decompft.launcher.sweep_folder import is_sweep
    from decompft.slurm import cancel, cancel_sweep, watch

    path, job = watch.find_named(args.run_name)
    if path is not None and is_sweep(path):
        return cancel_sweep.cancel_sweep(path, now=args.now, say=_say)
    if path is None:
        assert job is not None
        return cancel.cancel_job(job, _say)
    return cancel.cancel(path, now=args.now, say=_say)


def _show_sweep(path: Path, args: argparse.Namespace) -> int:
    from decompft.slurm import sweep_table

    table = sweep_table.read_table(path)
    if args.json:
        _print_json(sweep_table.to_json(table))
    else:
        print("\n".join(sweep_table.to_lines(table)))
    return table.code


def _path(word: str) -> Path:
    from decompft.launcher.sweep_folder import is_sweep
    from decompft.slurm import watch

    path, job = watch.find_named(word)
    if path is None:
        assert job is not None
        raise UserError(
            f"{word}: a job of no run in ./runs",
            f"its own log is {job.log}" if job.log else "name the run's folder",
        )
    if is_sweep(path):
        raise UserError(
            f"{word}: a sweep, each task of which has logs of its own",
            f"name the run of a task, a folder in {path}",
        )
    return path


def _add_run(parser: argparse.ArgumentParser) -> None:
    # not `run`: that is the function to call
    parser.add_argument(
        "run_name", metavar="RUN|JOBID", help="a folder, a name under ./runs, or a job of Slurm's"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the same facts as JSON")


def _print_json(value: object) -> None:
    import json

    print(json.dumps(value, indent=2, sort_keys=True))


def _say(line: str) -> None:
    print(line, flush=True)


def _tell(line: str) -> None:
    """What is about the logs, not in them."""
    sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)
