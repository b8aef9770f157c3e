"""How is a run's standing shown: as a table for people, as JSON for scripts?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from decompft.launcher.failure import tail
from decompft.launcher.report_text import duration, number, plain
from decompft.slurm.after import Record, read_record
from decompft.slurm.history import Past
from decompft.slurm.queue import Job
from decompft.slurm.reasons import explain, short
from decompft.slurm.watch import Status, script_log

_LAST_LINES = 5
_MANY = 4  # nodes that are named one by one


def to_lines(status: Status, history: Sequence[Past]) -> list[str]:
    """The table; the last line is the next command to type."""
    seen = status.seen
    rows = [*_rows(status)]
    width = max(len(name) for name, _ in rows)
    lines = [f"{seen.run.path}: {status.state}", *(f"  {name:<{width}}  {value}" for name, value in rows)]
    if history:
        lines += ["", *_table(history)]
    return [*lines, f"next: {status.next}"]


def to_json(status: Status, history: Sequence[Past]) -> dict[str, Any]:
    """The same facts; times in epoch seconds."""
    seen, job, record = status.seen, status.job, _record(status)
    return {
        "run": str(seen.run.path),
        "state": status.state,
        "code": status.code,
        "words": status.words,
        "note": status.note,
        "next": status.next,
        "job": None if job is None else _job(job, status.now_s),
        "other_jobs": [
            {"kind": other.kind, "job_id": other.job_id, "state": other.job.state if other.job else None}
            for other in status.others
        ],
        "step": seen.step,
        "total_steps": seen.total.steps,
        "total_is_exact": seen.total.is_exact,
        "saved_step": seen.saved_step,
        "loss": seen.loss,
        "tokens_per_s": seen.tokens_per_s,
        "eta_s": seen.eta_s if status.is_live else None,
        "restarts": max(len(history) - 1, 0),
        "failures_in_a_row": record.failures,
        "excluded": list(record.excluded),
        "incarnations": [
            {
                "number": past.number, "job_id": past.job_id, "nodes": list(past.nodes), "from_step": past.from_step,
                "to_step": past.to_step, "began_s": past.began_s, "took_s": past.took_s, "result": past.result,
                "words": past.words,
            }
            for past in history
        ],
    }  # fmt: skip


def job_lines(job: Job, now_s: float) -> list[str]:
    """Of a job that is no run's."""
    standing = explain(job, now_s)
    lines = [f"job {job.job_id} ({plain(job.name)}): {short(job)}", f"  {standing.words}"]
    lines += [f"  on {job.nodes}"] if job.nodes else []
    lines += [f"  it is no job of a run in ./runs; it was submitted from {plain(job.work_dir)}"]
    return [*lines, f"next: {standing.todo or f'scontrol show job {job.job_id}'}"]


def job_json(job: Job, now_s: float) -> dict[str, Any]:
    """The same facts."""
    standing = explain(job, now_s)
    return {"run": None, "words": standing.words, "next": standing.todo, "job": _job(job, now_s)}


def _rows(status: Status) -> Iterator[tuple[str, str]]:
    seen, job, record = status.seen, status.job, _record(status)
    if status.words:
        yield "state", status.words
    if job is not None:
        where = f" on {job.nodes}" if job.nodes and not job.waits else ""
        yield "job", f"{job.job_id} ({short(job)}){where}"
    for other in status.others:
        known = short(other.job) if other.job is not None else "Slurm does not know it any more"
        yield other.kind, f"{other.job_id} ({known})"
    if status.state == "failed" and seen.outcome is not None and seen.outcome.hint:
        yield "hint", plain(seen.outcome.hint)
    elif status.state == "failed" and seen.outcome is None:
        yield from _last_words(status)
    if status.note:
        yield "note", status.note
    numbers = [seen.total.beside(seen.step)]
    numbers += [f"loss {number(seen.loss)}"] if seen.loss is not None else []
    numbers += [f"{seen.tokens_per_s:,.0f} tokens/s"] if seen.tokens_per_s is not None else []
    yield "step", ", ".join(numbers)
    left = []
    if job is not None and job.left_s is not None and job.state == "RUNNING":
        left.append(f"{duration(job.left_s)} of the job's time")
    if seen.eta_s is not None and status.is_live:
        left.append(f"about {duration(seen.eta_s)} of training to the last step")
    if left:
        yield "left", ", ".join(left)
    yield "restarts", _restarts(status, record)


def _last_words(status: Status) -> Iterator[tuple[str, str]]:
    """Of the job's script, where no rank can have said what went wrong."""
    log = script_log(status.seen, status.job)
    lines = [] if log is None else [line for line in tail(log).splitlines() if line.strip()]
    if log is not None and lines:
        yield "log", f"{log}, which ends:"
        yield from (("", f"| {plain(line, 300)}") for line in lines[-_LAST_LINES:])


def _restarts(status: Status, record: Record) -> str:
    text = str(max(status.seen.incarnation - 1, 0))
    if status.seen.is_slurm:
        text += f", failures in a row {record.failures}"
    return f"{text}, excluded {', '.join(map(plain, record.excluded))}" if record.excluded else text


def _table(history: Sequence[Past]) -> list[str]:
    has_jobs = any(past.job_id for past in history)
    head = ["#", "job", "nodes", "steps", "took", "how it ended"]
    rows = [
        [
            str(past.number), past.job_id or "-", _nodes(past.nodes), f"{past.from_step:,}-{past.to_step:,}",
            duration(past.took_s), past.words,
        ]
        for past in history
    ]  # fmt: skip
    table = [row if has_jobs else [row[0], *row[3:]] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]) - 1)]
    return [
        "  " + "  ".join([*(f"{cell:<{w}}" for cell, w in zip(row[:-1], widths, strict=True)), row[-1]])
        for row in table
    ]


def _nodes(names: Sequence[str]) -> str:
    if len(names) <= _MANY:
        return plain(",".join(names)) or "-"
    return plain(f"{names[0]} ... {names[-1]} ({len(names)})")


def _job(job: Job, now_s: float) -> dict[str, Any]:
    return {
        "job_id": job.job_id, "cluster": job.cluster, "state": job.state, "reason": job.reason, "nodes": job.nodes,
        "words": explain(job, now_s).words, "start_s": job.start_s, "end_s": job.end_s, "left_s": job.left_s,
        "restarts": job.restarts, "exit_code": job.exit_code, "exit_signal": job.exit_signal, "log": job.log,
        "known_by": job.source,
    }  # fmt: skip


def _record(status: Status) -> Record:
    try:
        return read_record(status.seen.run)
    except (KeyError, TypeError, ValueError):
        return Record()  # damaged: nothing is counted
