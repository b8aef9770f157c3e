"""Set a mode of recomputation on a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from decompft.adapters.base import Adapter
from decompft.adapters.frozen.again import contexts
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.inject import adapters
from decompft.launcher.recompute import BY_PIECES, MODES, Pieces, Recompute, pieces_of
from decompft.launcher.worker.forget import MlpPart, forget
from decompft.launcher.worker.host_inputs import checkpoint_on_host


def set_recompute(hf: Any, blocks: list[nn.Module], mode: Recompute, *, count: int | None = None) -> None:
    """Before anything is sharded, after kernels are chosen.

    Args:
        hf: the transformers model.
        blocks: its repeated layers.
        count: of `selective`: the first so many, while the others run norms and the activation again; None: all.
    """
    assert mode in MODES, mode
    if mode == "none":
        return
    if mode in BY_PIECES:
        pieces = pieces_of(hf.config.model_type)
        assert pieces is not None, f"the plan takes full for {hf.config.model_type}"
        first = len(blocks) if count is None else count
        for index, block in enumerate(blocks):
            part: MlpPart = "nothing" if mode == "norms" else "front" if index < first else "activation"
            forget(block, pieces, mlp=part)
        return
    # the state of random numbers cannot be read while a CUDA graph is recorded, and nothing draws without dropout
    drops = any(a.config.dropout for _, a in adapters(hf))
    how = {"use_reentrant": False, "preserve_rng_state": drops, "context_fn": contexts}
    _leave_out_last(blocks, pieces_of(hf.config.model_type))
    hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    if mode == "offloaded":
        on_host = checkpoint_on_host(draws=drops)
        for module in hf.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = on_host


def _leave_out_last(blocks: list[nn.Module], pieces: Pieces | None) -> None:
    """The product that only a block's output has, which nobody reads the second time."""
    if pieces is None or not pieces.adds_output:
        return
    for block in blocks:
        if not type(block).__module__.startswith("transformers."):  # a repository's own: who knows
            return
        last = block.get_submodule(f"{pieces.mlp}.{pieces.last}")
        base = last.base if isinstance(last, Adapter) else last
        if isinstance(base, FrozenLinear):
            base.ends_block = True
