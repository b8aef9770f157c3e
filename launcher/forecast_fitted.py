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
# NCCL's channels and buffers on one node, and what its streams keep from the allocator: what two H200s
# held beyond tensors, less what one held (benchmarks/results/matrix.json). hsdp and zero1 were not measured:
# hsdp has fsdp's communicator and one more for the replicas, zero1 reduces like zero2.
NCCL_BYTES: dict[Strategy, int] = {
    "single": 0,
    "ddp": int(0.8 * GIB),
    "fsdp": int(1.45 * GIB),
    "hsdp": int(1.85 * GIB),
    "zero1": int(1.5 * GIB),
    "zero2": int(1.5 * GIB),
    "zero3": int(1.9 * GIB),
}
# a Python process that has imported torch and transformers, resident
CPU_PROCESS_BYTES = int(0.6 * GIB)
# the same with CUDA's host side; with it the host's peaks of one and two H200s are met within 20 %
CUDA_PROCESS_BYTES = int(1.8 * GIB)
# what NCCL adds on the host of each of several ranks
NCCL_HOST_BYTES = int(0.4 * GIB)
# what importing DeepSpeed adds
DEEPSPEED_PROCESS_BYTES = int(0.05 * GIB)

# Effective FLOP/s of needed work (4 a weight and token, plus attention; 28.0 GFLOP a token of
# Llama-2-7B's shape): MAP's tokens/s on one H200, benchmarks/results/single_gpu.json; LoRA's are 1.1 x
EFFECTIVE_FLOPS = {("H200", "none"): 15_516 * 28.0e9, ("H200", "full"): 11_128 * 28.0e9}
# Not measured. Selective: of what full adds to a token's time, the part of a block's weights that it
# multiplies by again (gate and up: 44.6 % of Llama-2-7B's). Offloaded: full, and 3 % for its copies.
ESTIMATED_FLOPS = {
    ("H200", "selective"): 28.0e9 / (1 / 15_516 + 0.446 * (1 / 11_128 - 1 / 15_516)),
    ("H200", "offloaded"): 0.97 * 11_128 * 28.0e9,
}
# the share of it a GPU that two reached at micro batch 4 (matrix.json); larger ones come closer to 1
PARALLEL_SHARE: dict[Strategy, float] = {
    "single": 1.0,
    "ddp": 0.98,
    "fsdp": 0.72,
    "zero2": 0.86,
    "zero3": 0.42,
}
# smaller models do not fill the card, and the figures above say nothing of them
MIN_KNOWN_HIDDEN = 2048
