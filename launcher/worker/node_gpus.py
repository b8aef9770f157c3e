"""Are the GPUs of this node there, healthy and free, and do they compute? nvidia-smi, then a product that is known.

nvidia-smi is asked before this process touches a GPU, so that all memory in use is somebody else's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from decompft.launcher.machine import MIB, Gpu, visible_gpus
from decompft.launcher.node_file import Problem

# an idle GPU shows some hundred MiB of the driver's own
FOREIGN_BYTES = 1 << 30
_SMI_TIMEOUT_S = 10.0
_FIELDS = ("index", "uuid", "name", "memory.used", "ecc.errors.uncorrected.volatile.total")
_ROWS = "--query-remapped-rows=gpu_uuid,remapped_rows.pending,remapped_rows.failure"
# the newer name first; older drivers only know the other
_THROTTLES = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
# of NVML's nvmlClocksEventReason*; the others (idle, application clocks, power cap) are no sign of sickness
_SLOWDOWNS = {0x08: "hardware slowdown", 0x40: "hardware thermal slowdown", 0x80: "power brake"}
_WARM = {0x20: "software thermal slowdown"}
_REPLACE = "tell the site's administrators; the GPU needs a reset or a replacement"


@dataclass(frozen=True, kw_only=True)
class GpuState:
    """What nvidia-smi says of one GPU."""

    index: str
    uuid: str
    name: str
    used_bytes: int | None
    ecc_errors: int | None  # uncorrected since the driver was loaded; None where there is no ECC
    remap_pending: bool
    remap_failure: bool
    throttle: int = 0  # bits of NVML's reasons


def check_gpus(wanted: int, environ: Mapping[str, str] = os.environ) -> tuple[list[GpuState], list[Problem]]:
    """The visible GPUs and what is wrong with them, without torch; empty where there is no nvidia-smi."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return [], []
    try:
        text = _ask(smi, "--query-gpu=" + ",".join(_FIELDS))
    except (OSError, subprocess.SubprocessError) as error:
        output = error.output if isinstance(error, subprocess.CalledProcessError) else ""
        said = (str(output or error).strip().splitlines() or ["no word"])[0]
        return [], [_bad("gpu", f"nvidia-smi does not work: {said}", _REPLACE)]
    states = parse_states(text, rows=_ask_if_known(smi, _ROWS), throttles=_throttles(smi))
    shown = visible_gpus([Gpu(s.name, s.uuid, None) for s in states], environ.get("CUDA_VISIBLE_DEVICES"))
    uuids = {gpu.uuid for gpu in shown}
    states = [state for state in states if state.uuid in uuids]
    problems = [problem for state in states for problem in _judge(state, smi)]
    if any(gpu.name == "MIG slice" for gpu in shown):  # slices share a GPU; nvidia-smi tells of whole ones
        return states, problems
    return states, problems + count_problem(len(shown), wanted)


def parse_states(text: str, *, rows: str, throttles: str) -> list[GpuState]:
    """Three of nvidia-smi's CSVs: `_FIELDS`; uuid, pending, failure of row remapping; uuid, bits of slowdowns."""
    remapped = {row[0]: row[1:] for row in _csv(rows, 3)}
    bits = {row[0]: int(row[1], 16) for row in _csv(throttles, 2) if re.fullmatch("0x[0-9a-fA-F]+", row[1])}
    states = []
    for index, uuid, name, used, ecc in _csv(text, len(_FIELDS)):
        pending, failure = remapped.get(uuid, ("", ""))
        states.append(
            GpuState(
                index=index,
                uuid=uuid,
                name=name,
                used_bytes=int(used) * MIB if used.isdigit() else None,
                ecc_errors=int(ecc) if ecc.isdigit() else None,
                remap_pending=_is_true(pending),
                remap_failure=_is_true(failure),
                throttle=bits.get(uuid, 0),
            )
        )
    return states


def count_problem(found: int, wanted: int) -> list[Problem]:
    """Fewer GPUs visible than asked for is bad, more is worth a line."""
    if found < wanted:
        text = f"{found} of the {wanted} GPUs asked for are visible"
        return [_bad("gpu count", text, "a GPU may have fallen off the bus (`nvidia-smi`, `dmesg`)")]
    if found > wanted:
        text = f"{found} GPUs are visible, {wanted} were asked for: others' jobs may use the same ones"
        return [Problem(kind="gpu count", severity="warn", text=text)]
    return []


def compute_problems(device: str, wanted: int) -> tuple[list[str], list[Problem]]:
    """Names of the GPUs that torch sees, and each product of small integers that is not exactly right."""
    import torch

    if device == "cpu":
        return [], [] if _is_exact("cpu") else [
            _bad("cpu", "a matrix product is wrong", "leave this node out")
        ]
    if not torch.cuda.is_available():
        hint = "the driver does not fit torch's CUDA, or the container has no access: see nvidia-smi"
        return [], [_bad("gpu", "torch cannot use the GPUs of this node", hint)]
    count = torch.cuda.device_count()
    names, problems = [], count_problem(count, wanted)
    for number in range(min(count, wanted)):
        name = torch.cuda.get_device_name(number)
        names.append(name)
        try:
            if not _is_exact(f"cuda:{number}"):
                problems.append(_bad("gpu", f"GPU {number} ({name}): a matrix product is wrong", _REPLACE))
        except RuntimeError as error:  # torch's own, of CUDA errors of every kind
            said = (str(error).strip().splitlines() or [""])[0]
            problems.append(_bad("gpu", f"GPU {number} ({name}): a matrix product failed: {said}", _REPLACE))
    return names, problems


def _is_exact(device: str) -> bool:
    """Products of matrices of -1, 0 and 1: every sum and partial sum of 256 is exact in bfloat16, too."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-1, 2, (1024, 256), generator=generator).double()
    b = torch.randint(-1, 2, (256, 1024), generator=generator).double()
    right = a @ b
    return all(
        bool(torch.equal((a.to(device, dtype) @ b.to(device, dtype)).double().cpu(), right))
        for dtype in (torch.float32, torch.bfloat16)
    )


def _judge(state: GpuState, smi: str) -> list[Problem]:
    where = f"GPU {state.index} ({state.name})"
    problems = []
    if state.ecc_errors:
        text = f"{where}: {state.ecc_errors} uncorrected ECC error(s) since the driver was loaded"
        problems.append(_bad("gpu", text, _REPLACE))
    if state.remap_failure:
        problems.append(_bad("gpu", f"{where}: a memory row could not be remapped", _REPLACE))
    if state.remap_pending:
        text = f"{where}: a memory row waits to be remapped, which needs a reset"
        problems.append(_bad("gpu", text, _REPLACE))
    if state.used_bytes is not None and state.used_bytes > FOREIGN_BYTES:
        text = f"{where}: {state.used_bytes / 2**30:.1f} GiB are in use by others{_users(smi, state.uuid)}"
        problems.append(_bad("gpu memory", text, "end what was left behind there, or leave the node out"))
    for bit, name in _SLOWDOWNS.items():
        if state.throttle & bit:
            text = f"{where}: slowed down ({name}) although nothing runs on it"
            problems.append(_bad("gpu", text, "cooling or power of that node: tell its administrators"))
    for bit, name in _WARM.items():
        if state.throttle & bit:
            problems.append(Problem(kind="gpu", severity="warn", text=f"{where}: slowed down ({name})"))
    return problems


def _throttles(smi: str) -> str:
    for field in _THROTTLES:
        text = _ask_if_known(smi, f"--query-gpu=uuid,{field}")
        if text:
            return text
    return ""


def _users(smi: str, uuid: str) -> str:
    """The processes on a GPU, in words; a container or another user's job may hide them."""
    rows = _csv(_ask_if_known(smi, "--query-compute-apps=gpu_uuid,pid,process_name"), 3)
    names = [f"pid {row[1]} {row[2]}" for row in rows if row[0] == uuid]
    return f" ({', '.join(names)})" if names else ""


def _ask_if_known(smi: str, query: str) -> str:
    """ "" from a driver that does not know the question."""
    try:
        return _ask(smi, query)
    except (OSError, subprocess.SubprocessError):
        return ""


def _ask(smi: str, query: str) -> str:
    return subprocess.run(
        [smi, query, "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=_SMI_TIMEOUT_S,
        check=True,
    ).stdout


def _csv(text: str, num_fields: int) -> list[list[str]]:
    rows = [[field.strip() for field in line.split(",", num_fields - 1)] for line in text.splitlines()]
    return [row for row in rows if len(row) == num_fields]


def _is_true(text: str) -> bool:
    return text.lower() in ("yes", "1")


def _bad(kind: str, text: str, hint: str) -> Problem:
    return Problem(kind=kind, severity="bad", text=text, hint=hint)
