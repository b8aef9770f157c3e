"""What does Slurm say of a job? squeue first, then scontrol for the details, and sacct for what both have forgotten.

A site without accounting loses the last part only. The formats are -o and -P, since the JSON differs by version.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from decompft.launcher.errors import SlurmError
from decompft.slurm.commands import call
from decompft.slurm.times import seconds

# in names, comments and folders it is the least likely character
_SEPARATOR = "\x1f"
_QUEUE_FIELDS = "%i %A %T %r %N %P %S %e %l %L %E %n %x %j %k %Z"
_SACCT_FIELDS = "jobid,jobidraw,state,reason,nodelist,partition,start,end,exitcode,jobname"
_TIMEOUT_S = 30.0
_LIVE = (
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "RESIZING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD",
    "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED", "SUSPENDED",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job, or one task of an array, as Slurm tells of it; times in epoch seconds."""

    job_id: str  # "23"; of an array "27_0", its pending rest "27_[3-5%2]"
    raw_id: str = ""  # "28" where job_id is "27_0"
    cluster: str = ""  # "" is the one of this machine
    state: str  # in Slurm's word: PENDING, RUNNING, TIMEOUT, ...
    reason: str = ""  # as squeue writes it; of an ended job it may be an old one
    nodes: str = ""  # Slurm's own list, e.g. vn-[1-2]
    partition: str = ""
    start_s: float | None = None  # began, or is expected to
    end_s: float | None = None
    limit_s: float | None = None
    left_s: float | None = None  # of the time limit
    dependency: str = ""
    asked_nodes: str = ""  # by name, with -w
    excluded: str = ""
    name: str = ""
    comment: str = ""
    work_dir: str = ""
    exit_code: int | None = None
    exit_signal: int | None = None
    restarts: int | None = None  # Slurm's count of requeues
    log: str = ""  # the file that the batch script's output goes to
    source: Literal["queue", "accounting"] = "queue"

    @property
    def is_live(self) -> bool:
        """It waits, runs or ends; Slurm may start it (again)."""
        return self.state in _LIVE

    @property
    def waits(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")

    def belongs_to(self, job_id: str) -> bool:
        """Whether it is that job, or a task of that array."""
        return job_id in (self.job_id, self.raw_id) or self.job_id.startswith(f"{job_id}_")


@dataclass(frozen=True, kw_only=True)
class Queued:
    """A job, or one task of an array, that waits or runs."""

    job_id: str  # of an array its own
    task: str  # "" of a job that is no array
    script: str  # absolute

    @property
    def names(self) -> tuple[str, ...]:
        return (self.job_id, f"{self.job_id}_{self.task}") if self.task else (self.job_id,)


def is_job_id(word: str) -> bool:
    """`23`, `27_0`."""
    return re.fullmatch(r"\d+(_\d+)?", word, re.ASCII) is not None


def find_jobs(job_ids: Iterable[str], *, cluster: str = "", from_accounting: bool = True) -> tuple[Job, ...]:
    """What is known of these jobs: from squeue, and from sacct of those that squeue does not know.

    Of an array's id all its tasks. Ids that nobody knows are left out.

    Raises:
        SlurmError: squeue is not here, or cannot ask its controller.
    """
    ids = tuple(dict.fromkeys(job_ids))
    if not ids:
        return ()
    # a task may be asked for by both of its numbers
    found = tuple({job.job_id: job for job in _ask_squeue(ids, cluster)}.values())
    forgotten = [job_id for job_id in ids if not any(job.belongs_to(job_id) for job in found)]
    if forgotten and from_accounting:
        rows = _ask_sacct(forgotten, cluster)
        # a job has a row for each time it was requeued: the last one stands
        found += tuple({row.job_id: row for row in rows}.values())
    return found


def find_job(job_id: str, *, cluster: str = "") -> Job | None:
    """One job with its details, or None when neither the queue nor accounting knows it.

    Of an array's id: a task that runs, else the first.

    Raises:
        SlurmError: squeue is not here, or cannot ask its controller.
    """
    found = find_jobs([job_id], cluster=cluster)
    if not found:
        return None
    return with_details(min(found, key=lambda job: (job.state != "RUNNING", not job.is_live)))


def with_details(job: Job) -> Job:
    """Exit code, restarts and log file, which only scontrol knows while it remembers the job."""
    if job.source != "queue":
        return job
    argv = ("scontrol", "-o", "show", "job", job.raw_id)
    answer = call(argv, cluster=job.cluster, timeout_s=_TIMEOUT_S)
    lines = answer.lines if answer.code == 0 else []
    told = _words(next((line for line in lines if f"JobId={job.raw_id} " in line), ""))
    code, _, number = told.get("ExitCode", "").partition(":")
    return replace(
        job,
        exit_code=_whole(code),
        exit_signal=_whole(number),
        restarts=_whole(told.get("Restarts", "")),
        log=told.get("StdOut", ""),
    )


def my_jobs(*, cluster: str = "") -> tuple[Queued, ...]:
    """All of them: of ids, an unknown one beside a known one is no error for Slurm, but alone it is.

    Raises:
        SlurmError: squeue is not here, or cannot ask its controller.
    """
    rows = _squeue(("--me", "-r"), "%F %K %o", cluster)
    return tuple(Queued(job_id=job_id, task=_known(task), script=script) for job_id, task, script in rows)


def past_rows(job_id: str, *, cluster: str = "") -> tuple[Job, ...]:
    """How each start of a job ended, from sacct, oldest first; empty where there is no accounting."""
    return tuple(row for row in _ask_sacct([job_id], cluster) if row.start_s is not None)


def _ask_squeue(ids: Sequence[str], cluster: str) -> tuple[Job, ...]:
    rows = _squeue(("-a", "-r", "-t", "all", "-j", ",".join(ids)), _QUEUE_FIELDS, cluster)
    return tuple(_from_squeue(fields, cluster) for fields in rows)


def _squeue(options: Sequence[str], fields: str, cluster: str) -> Iterator[list[str]]:
    """The fields of each job that it tells of; of ids that it does not know none.

    Raises:
        SlurmError: it is not here, or cannot ask its controller.
    """
    argv = ("squeue", "-h", *options, "-o", fields.replace(" ", _SEPARATOR))
    answer = call(argv, cluster=cluster, timeout_s=_TIMEOUT_S)
    if answer.code != 0 and "Invalid job id" not in answer.stderr:
        raise SlurmError(
            f"squeue: {answer.words}",
            "the controller may be busy or down: try again, or look at `scontrol ping`",
        )
    return _split(answer.lines, fields.count("%"))


def _from_squeue(fields: list[str], cluster: str) -> Job:
    (job_id, raw_id, state, reason, nodes, partition, start, end, limit, left, dependency, asked, excluded,
     name, comment, work_dir) = fields  # fmt: skip
    is_pending = state == "PENDING"
    return Job(
        job_id=job_id, raw_id=raw_id, cluster=cluster, state=state, reason=_known(reason), nodes=nodes,
        partition=partition, start_s=_epoch(start), end_s=None if is_pending else _epoch(end),
        limit_s=_length(limit), left_s=_length(left), dependency=_known(dependency),
        asked_nodes=_known(asked), excluded=_known(excluded), name=name, comment=_known(comment),
        work_dir=work_dir,
    )  # fmt: skip


def _ask_sacct(ids: Sequence[str], cluster: str) -> tuple[Job, ...]:
    options = ("-D", "-X", "-n", "-P", f"--delimiter={_SEPARATOR}")
    argv = ("sacct", *options, "-j", ",".join(ids), "-o", _SACCT_FIELDS)
    try:
        answer = call(argv, cluster=cluster, timeout_s=_TIMEOUT_S)
    except SlurmError:
        return ()  # no accounting here, or none that answers
    lines = answer.lines if answer.code == 0 else []  # 1: "accounting storage is disabled"
    return tuple(_from_sacct(fields, cluster) for fields in _split(lines, _SACCT_FIELDS.count(",") + 1))


def _from_sacct(fields: list[str], cluster: str) -> Job:
    job_id, raw_id, state, reason, nodes, partition, start, end, exit_code, name = fields
    word, _, by = state.partition(" ")  # CANCELLED by 1000
    if word in ("PENDING", "RUNNING", "SUSPENDED"):  # only asked when the queue has forgotten the job
        word = "UNKNOWN"
    code, _, number = exit_code.partition(":")
    return Job(
        job_id=job_id, raw_id=raw_id, cluster=cluster, state=word, reason=by or _known(reason),
        nodes="" if nodes == "None assigned" else nodes, partition=partition, start_s=_epoch(start),
        end_s=_epoch(end), exit_code=_whole(code), exit_signal=_whole(number), name=name, source="accounting",
    )  # fmt: skip


def _split(lines: Sequence[str], num_fields: int) -> Iterator[list[str]]:
    """The rows; with -M squeue also prints the cluster's name."""
    for line in lines:
        fields = [field.strip() for field in line.split(_SEPARATOR)]
        if len(fields) == num_fields:
            yield fields


def _words(line: str) -> dict[str, str]:
    """`Key=value` words of a line of scontrol; values may hold blanks."""
    keys = [*re.finditer(r"(?:^| )([A-Za-z][\w/:]*)=", line)]
    ends = [*(key.start() for key in keys), len(line)][1:]
    return {key.group(1): line[key.end() : end].strip() for key, end in zip(keys, ends, strict=True)}


def _known(word: str) -> str:
    return "" if word in ("(null)", "None", "N/A") else word


def _whole(word: str) -> int | None:
    return int(word) if word.isdecimal() else None


def _epoch(word: str) -> float | None:
    """A time as Slurm writes it by default, in this machine's zone; None for Unknown, N/A or another format."""
    try:
        return time.mktime(time.strptime(word, "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):
        return None


def _length(word: str) -> float | None:
    found = seconds(word)
    return None if found is None else float(found)
