"""Where can variable-length attention run, and why not elsewhere? Torch-free, for the plan and the worker alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from decompft.launcher.errors import PlanError
from decompft.launcher.plan import Device
from decompft.launcher.recipe import Recipe

# families whose layers hand what they are given on to the attention function; a test holds each of them
# to transformers' own attention
FAMILIES = ("gemma", "gemma2", "gemma3_text", "gpt2", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3")

# flash attention's largest head
_MAX_HEAD_DIM = 256

_DEFAULT_CAPS = {"gemma2": 50.0}  # transformers' own


def score_cap(config: Mapping[str, Any]) -> float | None:
    """The cap of attention scores that a model's config asks for, written out or not."""
    cap: float | None = config.get("attn_logit_softcapping", _DEFAULT_CAPS.get(config["model_type"]))
    return cap


def varlen_refusal(config: Mapping[str, Any], *, head_dim: int, compute: str, device: Device) -> str | None:
    """Why packed documents cannot go through variable-length attention; None where they can.

    Args:
        compute: dtype of activations, e.g. bfloat16.
        device: "cuda" is torch's kernel, "cpu" is SDPA of one document after another.
    """
    if config["model_type"] not in FAMILIES:
        return f"it was not proven for model type {config['model_type']}"
    if score_cap(config) is not None:
        return "the model caps its attention scores"
    if config.get("use_bidirectional_attention") or not config.get("is_causal", True):
        return "the model looks ahead"
    if device == "cpu":
        return None
    if compute == "float32":
        return "the kernel computes in bfloat16, quantization.compute is float32"
    if head_dim % 8 or head_dim > _MAX_HEAD_DIM:
        return f"the kernel takes heads of a multiple of 8 up to {_MAX_HEAD_DIM}, the model's have {head_dim}"
    return None


def refuse_attention(recipe: Recipe, config: Mapping[str, Any], *, head_dim: int, device: Device) -> None:
    """A `model.attention` that the model, or the device, cannot take.

    Raises:
        PlanError: with what can be done instead.
    """
    wanted = recipe.model.attention
    if wanted == "sdpa" and score_cap(config) is not None:
        raise PlanError(
            "model.attention: sdpa would leave out the cap of attention scores that this model was trained with",
            "use model.attention: auto or eager",
        )
    reason = None
    if wanted == "varlen":
        compute = recipe.quantization.activations
        reason = varlen_refusal(config, head_dim=head_dim, compute=compute, device=device)
    if reason is not None:
        raise PlanError(f"model.attention: varlen cannot run: {reason}", "use model.attention: auto")
