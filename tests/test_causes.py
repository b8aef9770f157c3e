"""A cause is recognised by what libraries, the kernel and the scheduler really print."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from tiny import fork

from decompft.launcher.causes import Kind, explain
from decompft.launcher.recipe import Source
from decompft.launcher.worker.data import records

PAGE = Path(__file__).parent.parent / "docs" / "failures.md"
# as torch, NCCL, gloo, bitsandbytes, DeepSpeed, Slurm and the kernel print them
TEXTS: list[tuple[str, str]] = [
    (
        "out_of_memory_gpu",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
        "139.80 GiB of which 1.20 GiB is free.",
    ),
    ("out_of_memory_gpu", "torch.AcceleratorError: CUDA error: out of memory\nCUDA kernel errors might be"),
    (
        "out_of_memory_gpu",
        "Error out of memory at line 351 in file /home/x/bitsandbytes/csrc/pythonInterface.c",
    ),
    (
        "out_of_memory_gpu",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ),
    (
        "out_of_memory_gpu",
        "torch.distributed.DistBackendError: NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, "
        "unhandled cuda error, NCCL version 2.27.5\nncclUnhandledCudaError: Call to CUDA function failed.\n"
        "Last error:\nCuda failure 2 'out of memory'",
    ),
    ("out_of_memory_host", "MemoryError"),
    ("out_of_memory_host", "terminate called after throwing an instance of 'std::bad_alloc'"),
    ("out_of_memory_host", "OSError: [Errno 12] Cannot allocate memory"),
    (
        "out_of_memory_host",
        "slurmstepd: error: Detected 1 oom_kill event in StepId=11300781.0. Some of the step",
    ),
    (
        "out_of_memory_host",
        "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=37205392.0. Some of your",
    ),
    ("out_of_memory_host", "0: srun: error: node107: tasks 1-3: Out Of Memory"),
    (
        "out_of_memory_host",
        "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.\n"
        "Last error:\nError while creating shared memory segment /dev/shm/nccl-Ab12Cd (size 9637888), error: "
        "No space left on device (28)",
    ),
    ("disk", "OSError: [Errno 28] No space left on device: '/runs/a/metrics.jsonl'"),
    ("disk", "OSError: [Errno 122] Disk quota exceeded"),
    (
        "disk",
        "safetensors_rust.SafetensorError: Error while serializing: I/O error: Stale file handle (os error 116)",
    ),
    ("disk", "OSError: [Errno 30] Read-only file system: '/runs/a'"),
    ("disk", "OSError: [Errno 5] Input/output error"),
    (
        "non_finite",
        "RunFailed: step 5: the loss is nan and the gradient norm 1.0; the optimizer step was not taken",
    ),
    (
        "non_finite",
        "RunFailed: step 5: the loss is 2.5 and the gradient norm inf; the optimizer step was not taken",
    ),
    ("gpu", "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered"),
    ("gpu", "RuntimeError: CUDA error: an illegal memory access was encountered"),
    ("gpu", "RuntimeError: CUDA error: device-side assert triggered"),
    (
        "gpu",
        "indexSelectSmallIndex: block: [3,0,0], thread: [0,0,0] Assertion `srcIndex < srcSelectDimSize` failed.",
    ),
    ("gpu", "RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
    ("gpu", "NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus."),
    ("package", "ModuleNotFoundError: No module named 'bitsandbytes'"),
    ("package", "ImportError: /lib/libc10.so: undefined symbol: _ZN3c105ErrorC2"),
    ("package", "ImportError: /lib64/libstdc++.so.6: version `GLIBCXX_3.4.30' not found"),
    ("package", "RuntimeError: CUDA error: no kernel image is available for execution on the device"),
    ("package", "RuntimeError: The NVIDIA driver on your system is too old (found version 11040)."),
    ("package", "RuntimeError: Unable to JIT load the fused_adam op due to ninja not being installed."),
    (
        "package",
        "RuntimeError: Attempted to use bitsandbytes native library functionality but it's not available.",
    ),
    ("package", "torch._inductor.exc.InductorError: RuntimeError: Failed to find C compiler."),
    (
        "network",
        "torch.distributed.DistBackendError: NCCL error in: /pytorch/x.cpp:3356, unhandled system error, NCCL version "
        "2.27.5\nncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.\n"
        "Last error:\nsocketStartConnect: Connect to 10.0.0.2<45763> failed : Software caused connection abort",
    ),
    (
        "network",
        "ncclSystemError: System call\nLast error:\nCall to ibv_reg_mr failed with error Cannot allocate memory",
    ),
    (
        "network",
        "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\nDuplicate GPU",
    ),
    (
        "peer_lost",
        "torch.distributed.DistBackendError: NCCL error in: /pytorch/x.cpp:3763, remote process exited or there was a "
        "network error, NCCL version 2.28.8\nncclRemoteError: A call failed possibly due to a network error or a "
        "remote process exiting prematurely.\nLast error:\nsocketProgressOpt: Call to recv from 172.1.1.1<33759> "
        "failed : Connection reset by peer",
    ),
    (
        "peer_lost",
        "ncclInternalError: Internal check failed.\nLast error:\nNet : Connection closed by remote peer user<50260>",
    ),
    (
        "peer_lost",
        "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:2",
    ),
    (
        "peer_lost",
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
    ),
    (
        "hang",
        "[rank1]:[E626 06:24:44.903881913 ProcessGroupNCCL.cpp:616] [Rank 1] Watchdog caught collective operation "
        "timeout: WorkNCCL(SeqNum=808, OpType=ALLREDUCE, NumelIn=9801523, NumelOut=9801523, Timeout(ms)=600000) ran "
        "for 600020 milliseconds before timing out.",
    ),
    (
        "hang",
        "torch.distributed.DistStoreError: Timed out after 601 seconds waiting for clients. 1/2 clients joined.",
    ),
    (
        "hang",
        "torch.distributed.DistNetworkError: The client socket has timed out after 600000ms while trying to connect",
    ),
    ("hang", "RuntimeError: Application timeout caused pair closure"),
    (
        "node_lost",
        "slurmstepd: error: *** STEP 12.0 ON vn-1 CANCELLED AT 2026-04-20T09:09:37 DUE TO NODE FAILURE ***",
    ),
    ("node_lost", "srun: error: Node failure on vn-2"),
    (
        "preempted",
        "slurmstepd: error: *** STEP 494583.0 ON n1 CANCELLED AT 2024-04-20T09:09:37 DUE TO TIME LIMIT ***",
    ),
    (
        "preempted",
        "slurmstepd: error: *** JOB 32391783 ON cn119 CANCELLED AT 2021-06-18T13:05:36 DUE TO PREEMPTION ***",
    ),
    (
        "preempted",
        "torch.distributed.elastic.multiprocessing.api.SignalException: Process 137 got signal: 15",
    ),
    ("data", "json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
    (
        "data",
        "pyarrow.lib.ArrowInvalid: JSON parse error: Missing a closing quotation mark in string. in row 12",
    ),
    ("data", "datasets.exceptions.DatasetGenerationError: An error occurred while generating the dataset"),
    ("data", "RuntimeError: generator raised StopIteration"),
    ("unknown", "ValueError: something else"),
]


@pytest.mark.parametrize(("kind", "text"), TEXTS)
def test_what_libraries_print_is_recognised_with_its_line(kind: str, text: str) -> None:
    log = f"2026-01-01 loading the base: 10 %\n{text}\nE0101 and what comes after it"
    for found in (explain(text), explain(log)):
        assert found.cause.kind == kind
        assert kind == "unknown" or found.evidence in text.splitlines()


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (signal.SIGKILL, "killed"),
        (signal.SIGTERM, "preempted"),
        (signal.SIGSEGV, "crash"),
        (signal.SIGBUS, "crash"),
    ],
)
def test_a_signal_without_a_word_is_a_cause(number: signal.Signals, kind: str) -> None:
    found = explain("", exit_code=-number)
    assert (found.cause.kind, found.evidence) == (kind, f"was killed by signal {number} ({number.name})")


def test_the_table_on_the_page_has_every_kind() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(get_args(Kind))


def message_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def test_a_tensor_too_large_for_the_host() -> None:
    with pytest.raises(RuntimeError) as told:
        torch.empty(10**15)
    assert explain(message_of(told.value)).cause.kind == "out_of_memory_host"


def test_memory_that_the_kernel_refuses() -> None:
    code = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30)); b'a' * 2**31"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert explain(done.stderr, exit_code=done.returncode).cause.kind == "out_of_memory_host"


def test_a_full_device() -> None:
    with pytest.raises(OSError) as told, open("/dev/full", "r+b", buffering=0) as file:
        file.write(b"x")
    assert explain(message_of(told.value)).cause.kind == "disk"


def test_a_lost_connection_while_reading_data_is_the_datas_failure() -> None:
    place = f'  File "{records.__file__}", line 40, in iter_records\n    for row in rows:\n'
    message = (
        "ConnectionError: ('Connection aborted.', ConnectionResetError(104, 'Connection reset by peer'))"
    )
    trace = f"Traceback (most recent call last):\n{place}{message}\n"
    found = explain(message, trace)
    assert (found.cause.kind, found.evidence) == ("data", message)
    assert explain(message).cause.kind == "peer_lost"


def test_a_record_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    try:
        list(records.iter_records(Source(path=str(tmp_path / "a.jsonl"), format="text")))
    except Exception as error:
        assert explain(str(error), traceback.format_exc()).cause.kind == "data"
    else:
        pytest.fail("the record was taken")


@pytest.mark.dist
def test_gloo_names_a_lost_and_a_late_rank(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        for name, kind in (("gone", "peer_lost"), ("late", "hang")):
            store = dist.FileStore(str(tmp_path / f"{name}.store"), 2)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=1.5)
            )
            if rank == 0:
                with pytest.raises(RuntimeError) as told:
                    dist.all_reduce(torch.ones(1)) if name == "late" else dist.recv(torch.ones(1), 1)
                assert explain(message_of(told.value)).cause.kind == kind, told.value
                (tmp_path / f"{name}.ok").touch()
            while rank == 1 and name == "late" and not (tmp_path / "late.ok").exists():
                pass
            dist.destroy_process_group()

    fork(work, 2)
    assert {p.name for p in tmp_path.glob("*.ok")} == {"gone.ok", "late.ok"}
