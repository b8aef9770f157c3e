"""What a GPU's libraries allocate at their first use, used once before the base fills the memory.

cuBLAS makes its handle and workspace at the first product, NCCL its channels at the first collective: late, either may
find no memory, in the middle of a step. The project's own kernels are compiled where they prove themselves
(chosen_kernels.py), before the base as well.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from decompft.launcher.worker.engines.base import Engine

SIZE = 256  # of the products: large enough for tensor cores, 128 KiB


def warm_up(engine: Engine) -> None:
    """A product of each dtype and one all-reduce; nothing on a CPU."""
    if engine.device.type != "cuda":
        return
    for dtype in (torch.bfloat16, torch.float32):
        square = torch.zeros(SIZE, SIZE, dtype=dtype, device=engine.device)
        square @ square
    if engine.world_size > 1:
        dist.all_reduce(torch.zeros(1, device=engine.device))
    torch.cuda.synchronize(engine.device)
    torch.cuda.empty_cache()  # what it used goes back; handles and channels stay
