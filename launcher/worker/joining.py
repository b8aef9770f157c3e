"""Which linears of a model family are given one and the same x, so that they are one autograd node."""

from __future__ import annotations

from typing import Any

from decompft.adapters.joint import join
from decompft.launcher.worker.engines.base import Engine

_ATTENTION = ("q_proj", "k_proj", "v_proj")
_LLAMA = (_ATTENTION, ("gate_proj", "up_proj"))
# by model type; a test sees every member be called with its group's x. Phi-3 and GPT-2 have these linears in one.
# What is not here computes linear by linear: a cross-attention, say, gives k another x than q
GROUPS: dict[str, tuple[tuple[str, ...], ...]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "phi": (_ATTENTION,),
    "bert": (("query", "key", "value"),),
}


def join_linears(hf: Any, engine: Engine) -> int:
    """Join what can be; returns the number of groups. An engine that gathers module by module has none."""
    if engine.gathers_by_module:
        return 0
    return join(hf, GROUPS.get(hf.config.model_type, ()))
