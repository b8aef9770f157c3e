"""What a device, its host and their links were measured to do: every constant of the time forecast, with its run.

To refit: time the rows of benchmarks/results again, change the constants until tests/test_simulator_measured.py
holds. Fitted to one GPU: `flops`, `fp8_flops`, `norm_bytes_per_s`, `launch_s`, `FORWARD_SHARE`, `METHODS`, single's
`tail_s`. Fitted to two at micro batch 4, before linears computed in one node: the other `tail_s`, `zero_hook_s`,
`zero3_gather_s`. `gather_s` was measured by itself (docs/parallel.md). Not measured: links.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from decompft.launcher.collectives import Fabric, Link
from decompft.launcher.strategies import Strategy


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """One kind of device with the host that feeds it."""

    name: str
    flops: float  # FLOP/s of needed work (simulator.flops) while busy with LoRA
    fp8_flops: float | None = None  # the same where the frozen products are in fp8; None: not measured
    norm_bytes_per_s: float = (
        math.inf
    )  # a norm's forward pass: what it reads and writes; not measured, it is free
    launch_s: float = 0.0  # host: a kernel's launch, with autograd's share of it
    gather_s: float = 0.0  # host: fsdp's gathering of a tensor, whatever its size
    zero_hook_s: float = 0.0  # host: ZeRO-1 and 2's hook of a trained tensor, a micro batch
    zero3_gather_s: float = 0.0  # host: ZeRO-3's gathering of a linear layer
    tail_s: Mapping[str, float]  # by strategy: reducing, clipping and AdamW, a trained tensor and step
    overlaps: bool = True  # links work while the device computes


H200 = Rates(
    name="H200",
    # LoRA, 4 rows: 19,394 tokens/s of 28.2 GFLOP, less the tail (single_gpu.json, lora-none-bfloat16, call H). Before:
    # call F's 18,560, without kernels for the loss and the norms, on a card 4 % slower (PEFT: 15,782 tokens/s there,
    # 16,382 in call H, 15,754 on another card of H's day)
    flops=8_192 * 28.2e9 / (8_192 / 19_394 - 5e-3),
    # between LoRA's and MAP's rows of call H in fp8, with and without recomputation, all of them recorded
    fp8_flops=832e12,
    # LoRA, 4 rows: Liger's 65 norms of 8,192 tokens of 4,096 bfloat16 numbers in 2.31 ms (profile_step.py, 2026-11-23)
    norm_bytes_per_s=65 * 2 * 8_192 * 4_096 * 2 / 2.31e-3,
    # MAP in fp8: both passes on one thread of the host 304 ms (benchmarks/host_time.py, 2026-11-23), over the 16,230
    # launches that METHODS counts; there are fewer since. No row of call H holds it
    launch_s=304e-3 / 16_230,
    gather_s=0.1e-3,
    # zero2, 4 rows: 591 ms a step (matrix.json), less MAP's launches and the tail, over 896 tensors
    zero_hook_s=42e-6,
    # zero3, 4 rows: 1,209 ms a step (matrix.json), less the same, over 2 x 224 linears
    zero3_gather_s=1.1e-3,
    # "reduce, clip, step" over MAP's 896 tensors: single's of profile_7b.txt, the others' of profile_engines.txt, from
    # before AdamW's step took a tenth; hsdp has fsdp's, zero1 zero2's: not measured
    tail_s={
        strategy: seconds / 896
        for strategy, seconds in {
            "single": 10e-3, "ddp": 18e-3, "fsdp": 64e-3, "hsdp": 64e-3,
            "zero1": 34e-3, "zero2": 34e-3, "zero3": 191e-3,
        }.items()
    },
)  # fmt: skip
GPUS = {rates.name: rates for rates in (H200,)}
GPU_MEMORY_GIB = {"H200": 139.8}  # as nvidia-smi says
# smaller models do not fill the card, and the figures above say nothing of them
MIN_KNOWN_HIDDEN = 2048
# of the launches of a step; of _FrozenLinear's own host time, profile_engines.txt (single)
FORWARD_SHARE = 0.43
# engines whose hooks run again while a layer is recomputed
RECOMPUTING_GATHERS: tuple[Strategy, ...] = ("fsdp", "hsdp", "zero3")

# method -> launches of a step of 32 layers at 4 rows, GPU time over LoRA's at 8 (at 4 where 8 did not fit):
# adapters_7b.json
METHODS: dict[str, tuple[int, float]] = {
    "adalora": (15_509, 1.01),
    "bitfit": (4_483, 0.96),
    "delora": (14_140, 1.00),
    "dora": (15_346, 1.05),
    "flexlora": (9_525, 0.99),
    "flora": (9_171, 1.00),
    "ia3": (5_504, 0.95),
    "liera": (31_297, 1.41),
    "lora": (7_943, 1.00),
    "lora_dash": (8_853, 1.01),
    "lora_init": (9_063, 1.00),
    "lora_tsd": (9_653, 1.01),
    "map": (16_230, 1.04),
    "milora": (7_943, 1.00),
    "moslora": (9_171, 1.00),
    "mpc_d": (11_463, 1.00),
    "mpc_n": (7_943, 1.00),
    "mpc_o": (11_239, 1.01),
    "olora": (7_943, 1.00),
    "pissa": (7_943, 0.99),
    "speclora": (9_301, 1.00),
    "spectral_adapter": (8_844, 1.01),
    "ssb": (6_210, 1.00),
    "ssl": (4_277, 0.96),
    "svdiff": (9_562, 2.87),
    "svft": (10_023, 1.01),
    "trilora": (8_917, 1.00),
    "vera": (8_615, 1.00),
}
METHOD_LAYERS = 32  # of the model that METHODS was counted on
UNCOUNTED = "map"  # a method that is not in the table is taken for this one

# what a save adds to the steps around it: trained numbers and moments, copied to the host; two H200s, resume.json
SAVE_BYTES_PER_S = 1.0e9

# NVLink 4 has 450 GB/s one way; nccl-tests of others on eight H100s reach 350 to 480. Not measured here.
NVLINK = Link(bytes_per_s=350e9, latency_s=2e-6)
NODE_GPUS = 8
NETWORK_GBIT_PER_S = (
    3200.0  # of a node: a card of 400 Gbit/s a GPU (InfiniBand NDR), as eight-GPU nodes of H100s have
)
NETWORK_SHARE = 0.8  # of it that a collective reaches; by nccl-tests of others, 0.7 to 0.95
NETWORK_LATENCY_S = 8e-6


def fabric(network_gbit_per_s: float = NETWORK_GBIT_PER_S) -> Fabric:
    """Eight-GPU nodes with NVLink, and a network of so much a node."""
    network = Link(
        bytes_per_s=network_gbit_per_s * 1e9 / 8 * NETWORK_SHARE, latency_s=NETWORK_LATENCY_S
    )  # fmt: skip
    return Fabric(in_node=NVLINK, network=network)
