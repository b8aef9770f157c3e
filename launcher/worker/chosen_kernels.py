"""Which implementation computes what on this device: settled before the model has memory, told on the first line."""

from __future__ import annotations

from typing import Any

import torch

from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.inject import adapters
from decompft.adapters.kernels.proved import SWITCH, is_off
from decompft.adapters.spec import spec_of
from decompft.launcher.recipe import ModelSection, QuantizationSection
from decompft.launcher.recompute import Recompute
from decompft.launcher.worker.attention import use_attention
from decompft.launcher.worker.engines.base import Engine
from decompft.launcher.worker.fp8 import use_fp8
from decompft.launcher.worker.gated import use_gated
from decompft.launcher.worker.liger import keep_outputs
from decompft.launcher.worker.norms import use_norms


def choose_kernels(
    hf: Any,
    section: ModelSection,
    quantization: QuantizationSection,
    engine: Engine,
    *,
    dtype: torch.dtype,
    recompute: Recompute,
) -> str:
    """Of norms and activations, of the frozen base, of attention; in words, what runs and why not the other.

    Args:
        hf: the model on meta, injected.
        dtype: of its activations.
        recompute: the mode that will be set.
    """
    found = (
        _use_liger(hf, engine),
        _prove_kernels(hf, engine, quantization.format, dtype, recompute),
        use_fp8(hf, quantization, engine.device),
        f"attention: {use_attention(hf, section, engine.device)}",
    )
    return "; ".join(words for words in found if words)


def _use_liger(hf: Any, engine: Engine) -> str:
    """Liger's fused norm, rotary and activation on a GPU where it is installed; says what runs."""
    if engine.device.type != "cuda":
        return "torch (no GPU)"
    if is_off():
        return f"torch ({SWITCH}=0)"
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:
        return "torch (liger-kernel is not installed: pip install decompft[gpu])"
    import inspect

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(hf.config.model_type)
    if apply is None:
        return f"torch (liger-kernel has nothing for {hf.config.model_type})"
    known = inspect.signature(apply).parameters
    # the loss is ours: it never holds all logits and makes no gradient of the frozen head
    off = {n: False for n in ("cross_entropy", "fused_linear_cross_entropy") if n in known}
    apply(model=hf, **off)
    keeps = any(spec_of(a.config).keeps_output(a.config) for _, a in adapters(hf))
    if not keep_outputs(keeps):
        for module in hf.modules():
            if isinstance(module, FrozenLinear):
                module.output_is_overwritten = True
    return "liger-kernel"


def _prove_kernels(hf: Any, engine: Engine, format: str, dtype: torch.dtype, recompute: Recompute) -> str:
    """Those of ours that these layers will want, proved before training, and norms and MLPs put in place."""
    if engine.device.type != "cuda":
        return ""
    from decompft.adapters.kernels.proved import prove_all  # which only a GPU needs

    methods = {layer.config.method for _, layer in adapters(hf)}
    said = prove_all(engine.device, dtype, methods, format, hf.config.model_type)
    use_norms(hf, recompute)
    use_gated(hf)
    return said
