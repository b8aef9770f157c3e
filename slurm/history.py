"""What became of each start of a run, and where did it run?"""

from __future__ import annotations

from dataclasses import dataclass

from decompft.launcher.outcome import Outcome
from decompft.launcher.report_data import Incarnation, find_incarnations, read_events
from decompft.launcher.report_text import plain
from decompft.slurm.queue import Job, past_rows
from decompft.slurm.reasons import explain
from decompft.slurm.run_files import JobStart, read_start
from decompft.slurm.watch import Status


@dataclass(frozen=True, kw_only=True)
class Past:
    """One incarnation."""

    number: int
    job_id: str  # "" outside of Slurm
    nodes: tuple[str, ...]
    from_step: int
    to_step: int | None  # as far as it is known
    began_s: float | None
    took_s: float | None
    result: str  # finished, checkpointed, failed, user_error; running; "" when it left no word
    words: str  # how it ended


def read_history(status: Status) -> tuple[Past, ...]:
    """The starts of a run, oldest first.

    Where one left no outcome, accounting is asked what became of its job, if there is accounting.
    """
    run = status.seen.run
    told: dict[str, tuple[Job, ...]] = {}
    found = []
    incarnations = find_incarnations(run, read_events(run.events_path))
    for this in incarnations:
        start = read_start(run.incarnation_dir(this.number))
        is_newest = this is incarnations[-1]
        is_living = is_newest and this.outcome is None and status.state == "running"
        if start is not None and this.outcome is None and not is_living and start.job_id not in told:
            told[start.job_id] = past_rows(start.job_id, cluster=status.seen.cluster)
        rows = () if start is None else told.get(start.job_id, ())
        result, words = _end(this.outcome, start, rows, status.now_s, is_living=is_living)
        end_s = status.now_s if is_living else this.last_s
        to_step = this.outcome.step if this.outcome else this.last_step
        if is_newest and this.outcome is None:  # events name a step now and then only
            to_step = max(to_step or 0, status.seen.step)
        found.append(
            Past(
                number=this.number,
                job_id=start.job_id if start else "",
                nodes=start.nodes if start else (),
                from_step=this.from_step,
                to_step=max(to_step or 0, this.from_step),
                began_s=this.began_s,
                took_s=_took(this, end_s),
                result=result,
                words=words,
            )  # fmt: skip
        )
    return tuple(found)


def _took(this: Incarnation, end_s: float | None) -> float | None:
    if this.began_s is None or end_s is None or end_s <= this.began_s:
        return None
    return end_s - this.began_s


def _end(
    outcome: Outcome | None, start: JobStart | None, rows: tuple[Job, ...], now_s: float, *, is_living: bool
) -> tuple[str, str]:
    if is_living:
        return "running", "running"
    if outcome is None:
        # accounting has a row for each start of the job, in order
        if start is not None and start.restart < len(rows):
            row = rows[start.restart]
            words = "requeued from outside" if row.state == "REQUEUED" else explain(row, now_s).words
            return "", f"left no word; {words}"
        return "", "left no word"
    if outcome.result == "finished":
        return outcome.result, "finished"
    if outcome.result == "checkpointed":
        words = plain(outcome.message, 160) or "stopped in order"
        return outcome.result, words if "nothing to save" in words else f"saved: {words}"
    where = f" on {plain(outcome.node)}" if outcome.node else ""
    what = plain(outcome.meaning or outcome.message.partition("\n")[0], 160)
    is_named = outcome.rank is None or (not where and f"rank {outcome.rank}" in what)
    return outcome.result, f"failed: {what}" if is_named else f"failed: rank {outcome.rank}{where}: {what}"
