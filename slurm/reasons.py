"""What do Slurm's states and reason codes mean for a job, in words, and what is there to do?"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from decompft.launcher.causes import describe_exit
from decompft.launcher.report_text import duration, plain
from decompft.slurm.queue import Job

Kind = Literal["waits", "stuck", "runs", "done", "failed", "cancelled", "unknown"]

# reason as squeue writes it, without blanks and underscores -> what the job waits for
_WAITS = {
    "": "submitted; the scheduler has not looked at it yet",
    "priority": "jobs of higher priority are before it",
    "resources": "it is next, and waits for nodes to become free",
    "jobarraytasklimit": "as many tasks of its array run as the array's throttle allows",
    "licenses": "it waits for a license",
    "reservation": "it waits for its reservation to begin",
    "prolog": "the site's prolog is still running on its nodes",
    "cleaning": "its last start is still being cleaned up",
    "nodedown": "a node that it needs is down",
    "partitiondown": "its partition is closed for starts at the moment",
    "partitioninactive": "its partition is inactive at the moment",
    "schedulerdefer": "the scheduler has put it off",
    "frontenddown": "no front end node is there",
    "federatedjoblock": "it waits for its federation",
    "burstbufferresources": "it waits for burst buffer space",
    "burstbufferstagein": "its burst buffer is being filled",
}
# the same for what never ends by itself
_STUCK = {
    "dependencyneversatisfied": "a job that it was to follow has failed, so it would wait for ever",
    "badconstraints": "no node can ever fulfil what it asks for (constraint, GPUs, memory, CPUs)",
    "invalidaccount": "its account does not exist or may not be used",
    "invalidqos": "its QOS does not exist or may not be used",
    "accountnotallowed": "its account may not use this partition",
    "qosnotallowed": "its QOS may not be used in this partition",
    "accountingpolicy": "the site's accounting policy does not let it run",
    "partitiontimelimit": "it asks for more time than its partition allows",
    "partitionnodelimit": "it asks for more, or fewer, nodes than its partition allows",
    "reservationdeleted": "its reservation was deleted",
    "deadline": "it cannot end before its deadline any more",
    "invalidbbspec": "its burst buffer request is not valid",
}
# held: a person must let it go
_HELD = {
    "jobhelduser": "it is held by its owner",
    "launchfailedrequeuedheld": "a node's health check (the prolog) failed as it was about to start, so Slurm "
    "took the node out and holds the job until somebody lets it go",
    "jobrequeuedinheldstate": "it was requeued and held",
    "jobholdmaxrequeue": "it was requeued more often than the site allows",
    "specialexit": "it ended with the site's special exit code and is held",
}
_ENDS = {
    "TIMEOUT": "it reached its time limit and was killed",
    "PREEMPTED": "a job of higher priority took its nodes",
    "NODE_FAIL": "a node failed",
    "BOOT_FAIL": "a node could not boot",
    "OUT_OF_MEMORY": "it used more memory than it asked for, and was killed",
    "DEADLINE": "it reached its deadline and was killed",
    "REVOKED": "another cluster of the federation took it",
    "FAILED": "its script failed",
}
_OUR_CODES = {2: "the input is wrong", 3: "the run failed", 75: "it stopped in order, to be run again"}


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a job stands."""

    kind: Kind
    words: str
    todo: str = ""  # a command that would get it going, if one would


def explain(job: Job, now_s: float) -> Standing:
    """How a job stands: it waits, waits for a hand (`stuck`), runs, or has ended in one of four ways."""
    if job.state in ("REQUEUE_HOLD", "SPECIAL_EXIT"):
        return _held(job, _HELD["jobrequeuedinheldstate" if job.state == "REQUEUE_HOLD" else "specialexit"])
    if job.waits:
        return _pending(job, now_s)
    if job.is_live:
        return _running(job, now_s)
    if job.state == "COMPLETED":
        return Standing(kind="done", words="the job has ended")
    if job.state == "CANCELLED" and _word(job.reason) == "dependencyneversatisfied":
        return Standing(
            kind="failed", words="Slurm cancelled it, since a job that it was to follow has failed"
        )
    if job.state == "CANCELLED":
        by = f" {plain(job.reason)}" if job.reason.startswith("by ") else ""
        return Standing(kind="cancelled", words=f"the job was cancelled{by}")
    if job.state == "UNKNOWN":
        return Standing(
            kind="unknown", words="the queue has forgotten the job, and accounting saw no end of it"
        )
    if _word(job.reason) == "joblaunchfailure" or (job.exit_code, job.exit_signal) == (0, 53):
        return _no_log(job)
    words = _ENDS.get(job.state, f"its state is {plain(job.state)}")
    if job.state == "FAILED":
        words += _code(job)
    return Standing(kind="failed", words=words)


def short(job: Job) -> str:
    """A state in a lower-case word for a table, with what a pending job waits for."""
    reason = job.reason.split(",")[0] if job.waits and len(job.reason) < 40 else ""
    return plain(f"{job.state.lower()}, {reason}" if reason else job.state.lower())


def _pending(job: Job, now_s: float) -> Standing:
    reason = _word(job.reason)
    if reason in _HELD:
        return _held(job, _HELD[reason])
    if reason == "jobheldadmin":
        return Standing(kind="stuck", words="it is held by an administrator, who alone can release it")
    if reason == "begintime":
        return Standing(kind="waits", words=_begin(job, now_s))
    if reason == "dependency":
        return Standing(kind="waits", words=f"it waits for {plain(job.dependency) or 'another job'}")
    if reason in _STUCK:
        words = _STUCK[reason]
        if job.excluded:
            words += f"; {plain(job.excluded)} was left out for its failures, and a new launch takes it back"
        return Standing(kind="stuck", words=words, todo=_cancel(job))
    if reason.startswith("reqnodenotavail") or reason.startswith("nodesrequiredforjobaredown"):
        return _no_nodes(job)
    if reason.startswith(("qos", "assoc", "max")):
        return _limit(job, reason)
    words = _WAITS.get(reason, f"Slurm's reason is {plain(job.reason)}")
    if job.start_s is not None and job.start_s > now_s:
        words += f"; Slurm expects to start it {_when(job.start_s, now_s)}"
    return Standing(kind="waits", words=words)


def _begin(job: Job, now_s: float) -> str:
    until = "" if job.start_s is None else f" {_when(job.start_s, now_s)}"
    if job.start_s is not None and job.start_s <= now_s:
        until = " any moment now"
    if job.restarts == 0:
        return f"it is to begin{until or ' later'}"
    return f"requeued; Slurm starts a requeued job again after a delay{',' + until if until else ''}"


def _no_nodes(job: Job) -> Standing:
    match = re.search(r"UnavailableNodes:[ _]?(\S+)", job.reason)
    which = f" ({plain(match.group(1))})" if match else ""
    if "maintenance" in job.reason.lower():
        return Standing(
            kind="waits", words="its nodes are reserved for maintenance, which would begin before its end"
        )
    if job.asked_nodes:
        words = f"it asks for {plain(job.asked_nodes)} by name, and not all of them are available{which}"
        return Standing(kind="stuck", words=words, todo=_cancel(job))
    return Standing(kind="waits", words=f"nodes that it needs are down, drained or reserved{which}")


def _limit(job: Job, reason: str) -> Standing:
    """QOSMaxJobsPerUserLimit, AssocGrpCPUMinutesLimit, ...: some go by, some do not."""
    whose = "its QOS" if reason.startswith("qos") else "its account or user"
    told = f"Slurm's reason is {plain(job.reason)}"
    if "perjob" in reason or "walldurationper" in reason:
        words = f"it asks for more than {whose} allows to one job; {told}"
        return Standing(kind="stuck", words=words, todo=_cancel(job))
    if "minutes" in reason and "runminutes" not in reason:
        return Standing(kind="stuck", words=f"the computing time of {whose} is used up; {told}")
    return Standing(kind="waits", words=f"other jobs use all that {whose} may use at a time; {told}")


def _held(job: Job, words: str) -> Standing:
    return Standing(kind="stuck", words=words, todo=f"scontrol{_on(job)} release {job.job_id}")


def _running(job: Job, now_s: float) -> Standing:
    if job.state == "RUNNING":
        since = "" if job.start_s is None else f" for {duration(max(now_s - job.start_s, 0.0))}"
        return Standing(kind="runs", words=f"running{since}")
    words = {
        "CONFIGURING": "its nodes are being made ready",
        "COMPLETING": "its processes are being ended",
        "SUSPENDED": "suspended by Slurm, to go on later",
        "STOPPED": "stopped by a signal, its nodes are kept",
    }
    return Standing(kind="runs", words=words.get(job.state, f"its state is {plain(job.state)}"))


def _no_log(job: Job) -> Standing:
    folder = str(PurePosixPath(job.log).parent) if job.log else ""
    words = "Slurm could not start its script: most often the folder of its log file is missing on the node"
    todo = f"mkdir -p {folder}" if folder else ""
    return Standing(kind="stuck", words=f"{words} ({plain(folder)})" if folder else words, todo=todo)


def _code(job: Job) -> str:
    if job.exit_code in _OUR_CODES:
        return f" with exit code {job.exit_code} ({_OUR_CODES[job.exit_code]})"
    if job.exit_code:
        return f" with exit code {job.exit_code}"
    return f": it {describe_exit(-job.exit_signal)}" if job.exit_signal else ""


def _cancel(job: Job) -> str:
    return f"scancel{_on(job)} {job.job_id}"


def _on(job: Job) -> str:
    return f" -M {job.cluster}" if job.cluster else ""


def _when(time_s: float, now_s: float) -> str:
    """`at 14:03:12 (in 6 s)`."""
    form = "%H:%M:%S" if time_s - now_s < 20 * 3600 else "%Y-%m-%d %H:%M"
    return f"at {time.strftime(form, time.localtime(time_s))} (in {duration(time_s - now_s)})"


def _word(reason: str) -> str:
    return re.sub(r"[\s_]", "", reason).lower()
