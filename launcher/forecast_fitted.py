"""What of the forecast only a measurement tells: each constant with the runs it was fitted to.

To refit: run benchmarks/gpu_7b.py on GPUs, commit its rows into benchmarks/results, change the
constants here until tests/test_forecast_measured.py lists no row that it need not list.
"""

from __future__ import annotations

from decompft.launcher.strategies import Strategy

GIB = 1 << 30

# CUDA context, cuBLAS workspace, allocator slack; with it one H200's peaks are met within 2 % with
# MAP and 4 % with LoRA (benchmarks/results/single_gpu.json)
CUDA_CONTEXT_BYTES = int(0.9 * GIB)
# NCCL's channels and buffers on one node, and what its streams keep from the allocator. ddp and fsdp:
# what two H200s held beyond tensors, less what one held (benchmarks/results/multi_gpu.json).
# The others are first guesses until they are measured: hsdp has fsdp's communicator and one more for
# the replicas, zero1 and zero2 all-reduce like ddp, zero3 gathers like fsdp.
NCCL_BYTES: dict[Strategy, int] = {
    "single": 0,
    "ddp": int(0.8 * GIB),
    "fsdp": int(1.3 * GIB),
    "hsdp": int(1.7 * GIB),
    "zero1": int(0.8 * GIB),
    "zero2": int(0.8 * GIB),
    "zero3": int(1.3 * GIB),
}
# a Python process that has imported torch and transformers, resident
CPU_PROCESS_BYTES = int(0.6 * GIB)
# the same with CUDA's host side
CUDA_PROCESS_BYTES = int(2.5 * GIB)
# what importing DeepSpeed adds to either; a first guess
DEEPSPEED_PROCESS_BYTES = int(0.2 * GIB)

# Effective FLOP/s of needed work (4 a weight and token, plus attention; 28.0 GFLOP a token of
# Llama-2-7B's shape): MAP's tokens/s on one H200, benchmarks/results/single_gpu.json; LoRA's are 1.1 x
EFFECTIVE_FLOPS = {("H200", "none"): 15_516 * 28.0e9, ("H200", "full"): 11_128 * 28.0e9}
# the share of it a GPU that two reached, while other work ran on the host; nothing else was timed
PARALLEL_SHARE: dict[Strategy, float] = {"single": 1.0, "ddp": 0.94, "fsdp": 0.72}
# smaller models do not fill the card, and the figures above say nothing of them
MIN_KNOWN_HIDDEN = 2048
