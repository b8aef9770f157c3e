"""The table of ways to die: what libraries, kernel and scheduler say, which class of cause that is, what to do.

docs/failures.md shows the same table to users.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "out_of_memory_gpu", "out_of_memory_host", "disk", "data", "non_finite", "gpu", "package", "network",
    "peer_lost", "node_lost", "hang", "preempted", "killed", "crash", "user", "unknown",
]  # fmt: skip

_LONGEST_EVIDENCE = 300


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A known way to die."""

    kind: Kind
    words: str
    hint: str
    is_consequence: bool = False  # of another rank's death or stand-still


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A cause, and what it was recognised by."""

    cause: Cause
    evidence: str  # a line that was printed, or an exit code in words; "" when nothing was recognised


GPU_MEMORY = Cause(
    kind="out_of_memory_gpu",
    words="the GPU ran out of memory",
    hint="lower train.micro_batch_size, set train.recompute=full, or use more GPUs with fsdp",
)
SHARED_MEMORY = Cause(
    kind="out_of_memory_host",
    words="the shared memory in /dev/shm is full",
    hint="make it larger (a container: --shm-size), or set NCCL_SHM_DISABLE=1",
)
HOST_MEMORY = Cause(
    kind="out_of_memory_host",
    words="the host ran out of memory",
    hint="lower train.micro_batch_size or data.sequence_length, or use fewer ranks on this machine",
)
DISK = Cause(
    kind="disk",
    words="the disk (or the quota) of the run directory is full",
    hint="free some space on that disk, or lower checkpoint.keep; committed checkpoints are not harmed",
)
FILES = Cause(
    kind="disk",
    words="a file system that the run reads or writes failed: read-only, gone, or an input/output error",
    hint="look at `dmesg` and at the file server, and resume; committed checkpoints are not harmed",
)
NON_FINITE = Cause(
    kind="non_finite",
    words="the loss or a gradient became non-finite (NaN or infinity)",
    hint="lower train.learning_rate or raise train.warmup_steps, in a fork of an earlier checkpoint",
)
DATA = Cause(
    kind="data",
    words="a record could not be read or tokenized, or a stream of records ended",
    hint="look at it with `decompft inspect data`, mend or leave out the record, and resume",
)
ASSERT = Cause(
    kind="gpu",
    words="a kernel on the GPU refused its input: often a token or label number beyond the model's",
    hint="look at the data with `decompft inspect data`; with CUDA_LAUNCH_BLOCKING=1 the traceback is the true one",
)
GPU = Cause(
    kind="gpu",
    words="the GPU or its driver failed",
    hint="resume; if it dies on the same node again, leave that node out (`nvidia-smi -q`, `dmesg | grep Xid`)",
)
PACKAGE = Cause(
    kind="package",
    words="a Python package, library or compiler is missing, broken or does not fit the driver",
    hint="run `decompft doctor` with the same Python, and install what it names",
)
NETWORK = Cause(
    kind="network",
    words="NCCL could not connect the ranks, or one of its calls failed",
    hint="set NCCL_DEBUG=INFO and resume: its log names the call and the interface, which NCCL_SOCKET_IFNAME "
    "and NCCL_IB_HCA choose; InfiniBand also needs `ulimit -l unlimited`",
)
TIMED_OUT = Cause(
    kind="hang",
    words="it waited for another rank for longer than parallel.timeout_s; the cause is with that rank",
    hint="look at the other ranks' logs and stacks; raise parallel.timeout_s if their work is honestly slow",
    is_consequence=True,
)
HANG = Cause(
    kind="hang",
    words="a rank stands still, and the others wait for it",
    hint="its stack says where; if that work is honestly slow, raise parallel.hang_s and parallel.timeout_s",
)
PEER = Cause(
    kind="peer_lost",
    words="it lost another rank; the cause is with that rank",
    hint="look for an earlier failure in the other ranks' logs; else raise parallel.timeout_s",
    is_consequence=True,
)
NODE = Cause(
    kind="node_lost",
    words="a node, or its network, went away",
    hint="resume; leave that node out if it happens again",
)
TIME_LIMIT = Cause(
    kind="preempted",
    words="the scheduler ended the job at its time limit",
    hint="resume; ask for more slurm.time, or set checkpoint.every_steps",
)
PREEMPTED = Cause(
    kind="preempted",
    words="it was told to end from outside (a scheduler, a shutdown, kill)",
    hint="resume when the machine is yours again",
)
KILLED = Cause(
    kind="killed",
    words="something killed it: the kernel, because the host ran out of memory, or a person, or a scheduler",
    hint="if the host ran out of memory (`dmesg | grep -i oom` tells), use fewer ranks on it, or less in each",
)
CRASH = Cause(
    kind="crash",
    words="a crash in compiled code",
    hint="run `decompft doctor`: library versions may not fit together",
)
MAPPED = Cause(
    kind="crash",
    words="a crash in mapped memory: a full /dev/shm, or a file cut short while it was being read",
    hint="look at `df /dev/shm` and at the model's files",
)
USER = Cause(kind="user", words="the input is wrong", hint="")
UNKNOWN = Cause(
    kind="unknown",
    words="not a failure that decompft knows",
    hint="read the log above; the whole of it is in logs/",
)

# searched in this order, so that what a death brings with it comes after what it comes from: NCCL says that a call
# failed when the GPU is out of memory; a rank that lost its peer may print a dozen lines about it
_PATTERNS: tuple[tuple[str, Cause], ...] = (
    # it may quote that rank, so before all others
    (r"another rank could not write its part|the rank that commits gave no verdict", PEER),
    (
        r"/dev/shm/nccl|shared memory segment|out of shared memory|unable to allocate shared memory",
        SHARED_MEMORY,
    ),
    (r"ibv_\w+ failed", NETWORK),
    (
        r"CUDA out of memory|torch\.(cuda\.)?OutOfMemoryError|CUDA error: out of memory|cudaErrorMemoryAllocation"
        r"|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|Cuda failure( 2)? 'out of memory'"
        r"|Error out of memory at line \d+ in file",  # bitsandbytes
        GPU_MEMORY,
    ),
    (
        r"DefaultCPUAllocator: (can't allocate|not enough) memory|\bMemoryError\b|std::bad_alloc"
        r"|Cannot allocate memory|Detected \d+ oom[_-]kill event|tasks? [\d,-]+: Out Of Memory",
        HOST_MEMORY,
    ),
    (
        r"No space left on device|\bENOSPC\b|Errno 28\b|os error 28\b|Disk quota exceeded|Errno 122\b|os error 122\b"
        r"|PytorchStreamWriter failed writing",
        DISK,
    ),
    (
        r"Read-only file system|Stale (NFS )?file handle|Errno 5\b|os error 5\b|Transport endpoint is not connected"
        r"|Errno 116\b",
        FILES,
    ),
    (
        r"(?i)non-?finite|(loss|gradient norm) (is |was |became )?[-+]?(nan|inf)\b",
        NON_FINITE,
    ),
    (
        r"no kernel image is available|driver (on your system )?is too old|driver version is insufficient"
        r"|ModuleNotFoundError|ImportError|undefined symbol|cannot open shared object file"
        r"|GLIBC(XX)?_[\d.]+' not found|Unable to JIT load|CUDAMismatchException|Failed to find C compiler"
        r"|bitsandbytes native library|Configured (CUDA|ROCm) binary not found|(InductorError|CompilationError):",
        PACKAGE,
    ),
    (r"device-side assert|indexSelect\w*: block|: Assertion `.*` failed", ASSERT),
    (
        r"uncorrectable (NVLink|ECC)|ECC error|Xid \(PCI|GPU has fallen off the bus|illegal memory access"
        r"|illegal instruction|misaligned address|CUDA error: (unknown|hardware|invalid device|unspecified launch)"
        r"|CUBLAS_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|NOT_INITIALIZED)|devices?.* busy or unavailable"
        r"|No CUDA GPUs are available|launch timed out",
        GPU,
    ),
    (
        r"errors\.DataError:|File \"[^\"]*launcher/worker/data/\w+\.py\"|datasets\.exceptions\.\w+|pyarrow\.lib\.\w+"
        r"|JSONDecodeError|UnicodeDecodeError|generator raised StopIteration",
        DATA,
    ),
    (r"DUE TO TIME LIMIT", TIME_LIMIT),
    (r"DUE TO (PREEMPTION|JOB REQUEUE)", PREEMPTED),
    (r"DUE TO NODE FAILURE|Node failure on|Communication connection failure", NODE),
    (
        r"Timed out waiting \d+ms|Watchdog caught collective operation timeout|Application timeout caused pair closure"
        r"|timed out in monitoredBarrier|waiting for clients\. \d+/\d+ clients joined|client socket has timed out",
        TIMED_OUT,
    ),
    (
        # gloo, torch's TCPStore, NCCL
        r"[Cc]onnection closed by (remote )?peer|Connection reset by peer|Connection refused|Broken pipe"
        r"|connectFullMesh failed|Connection was likely closed|ncclRemoteError|remote process exited"
        r"|NCCL communicator was aborted|Got completion from peer|RendezvousConnectionError"
        r"|client socket has failed to connect",
        PEER,
    ),
    (r"nccl(SystemError|InternalError|InvalidUsage|UnhandledCudaError|InvalidArgument)", NETWORK),
    (
        r"SignalException: Process \d+ got signal: (15|SIGTERM)|\*\*\* (JOB|STEP) \S+ ON \S+ CANCELLED",
        PREEMPTED,
    ),
)

_SIGNALS: dict[int, Cause] = {
    signal.SIGKILL: KILLED,
    signal.SIGTERM: PREEMPTED,
    signal.SIGINT: PREEMPTED,
    signal.SIGHUP: PREEMPTED,
    signal.SIGBUS: MAPPED,
    signal.SIGSEGV: CRASH,
    signal.SIGABRT: CRASH,
    signal.SIGILL: CRASH,
    signal.SIGFPE: CRASH,
}


def explain(*texts: str, exit_code: int | None = None) -> Finding:
    """The likely cause behind what a rank said and how its process ended.

    Args:
        texts: a message, a traceback, log lines; the most telling first. One that only names a consequence leaves
            the word to the next: a download in the data's code may lose its connection, too.
        exit_code: negative for a signal; None when unknown.
    """
    consequence = None
    for text in texts:
        found = _search(text)
        if found is not None and not found.cause.is_consequence:
            return found
        consequence = consequence or found
    if consequence is not None:
        return consequence
    if exit_code is None:
        return Finding(cause=UNKNOWN, evidence="")
    return Finding(cause=_SIGNALS.get(-exit_code, UNKNOWN), evidence=describe_exit(exit_code))


def describe_exit(code: int) -> str:
    """`was killed by signal 9 (SIGKILL)` or `ended with exit code 1`."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"was killed by signal {-code}"


def _search(text: str) -> Finding | None:
    for pattern, cause in _PATTERNS:
        matches = list(re.finditer(pattern, text))
        if matches:
            return Finding(cause=cause, evidence=_line_of(matches[-1], text))
    return None


def _line_of(match: re.Match[str], text: str) -> str:
    start, end = text.rfind("\n", 0, match.start()) + 1, text.find("\n", match.end())
    line = text[start : end if end >= 0 else None].strip()
    if line.startswith(
        "File "
    ):  # a place in a traceback: what was raised stands under it, where it is not indented
        below = (row.strip() for row in text[match.end() :].splitlines()[1:] if row and not row[0].isspace())
        line = next(below, line)
    return line if len(line) <= _LONGEST_EVIDENCE else line[: _LONGEST_EVIDENCE - 3] + "..."
