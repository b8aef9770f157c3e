"""Which attention does a model run, and why not the faster one? Proved on this device before it is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decompft.launcher.attention import varlen_refusal
from decompft.launcher.errors import ModelError
from decompft.launcher.plan import Device
from decompft.launcher.recipe import ModelSection
from decompft.launcher.worker import packed_attention
from decompft.launcher.worker.data.documents import Documents

# documents of the proof: shorter and longer than the kernel's tiles, and a lone token
_PROOF = ((70, 1, 200), (129, 142))
_PROOF_WINDOW = 33
# bf16 keeps 8 bits: results in float32 differ by about 2**-8, a missing or a foreign document by about 1
_PROOF_BOUND = 2**-5


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What decides which kernels take a layer's attention."""

    num: int
    num_keys: int
    dim: int
    has_window: bool

    @classmethod
    def of(cls, config: Any) -> Heads:
        """Of a transformers config."""
        num = config.num_attention_heads
        return cls(
            num=num,
            num_keys=getattr(config, "num_key_value_heads", None) or num,
            dim=getattr(config, "head_dim", None) or config.hidden_size // num,
            has_window=getattr(config, "sliding_window", None) is not None,
        )


def use_attention(hf: Any, section: ModelSection, device: torch.device) -> str:
    """Give a model on meta the attention that `model.attention` asks for; says what runs.

    Raises:
        ModelError: it asks for variable-length attention, which cannot run.
    """
    if section.task != "causal-lm":
        return f"{hf.config._attn_implementation} (rows of {section.task} are not packed)"
    if section.attention in ("eager", "sdpa"):
        return f"{hf.config._attn_implementation} (model.attention)"
    heads, dtype = Heads.of(hf.config), hf.config.dtype
    reason = _refusal(hf, heads, dtype, device)
    if reason is None:
        packed_attention.register()
        hf.config._attn_implementation = packed_attention.NAME
        how = "variable-length (torch)" if device.type == "cuda" else "document by document"
        return f"{how} in packed rows, {sdpa_kernel(heads, dtype, device)} in others"
    if section.attention == "varlen":
        raise ModelError(
            f"model.attention: varlen cannot run: {reason}", "use model.attention: auto, which says what runs"
        )
    is_eager = hf.config._attn_implementation == "eager"
    return f"{'eager' if is_eager else sdpa_kernel(heads, dtype, device)}, with a mask over packed rows ({reason})"


def _refusal(hf: Any, heads: Heads, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why documents of a packed row cannot be kept apart without a mask."""
    if not type(hf).__module__.startswith("transformers."):
        return "the model's code is its repository's own"
    kind: Device = "cuda" if device.type == "cuda" else "cpu"
    compute = str(dtype).removeprefix("torch.")
    reason = varlen_refusal(hf.config.to_dict(), head_dim=heads.dim, compute=compute, device=kind)
    if reason is not None or kind == "cpu":
        return reason
    return prove(heads, dtype, device)


def prove(heads: Heads, dtype: torch.dtype, device: torch.device) -> str | None:
    """Run the kernel on a few hundred tokens, forward and backward, beside SDPA in float32; None where they agree."""
    try:
        documents = Documents.of(_PROOF).to(device)
        for window in (None, _PROOF_WINDOW) if heads.has_window else (None,):
            found = _results(packed_attention.varlen, heads, documents, window, dtype)
            expected = _results(packed_attention.by_document, heads, documents, window, torch.float32)
            error = max(_difference(a, b) for a, b in zip(found, expected, strict=True))
            if not error < _PROOF_BOUND:  # nan is no agreement
                return f"torch's variable-length kernel differs from SDPA by {error:.1e} on this device"
    # whatever a kernel, its binding or this version of torch may raise: SDPA computes the same
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return f"torch's variable-length kernel does not run here: {first}"
    return None


def _results(
    path: Any, heads: Heads, documents: Documents, window: int | None, dtype: torch.dtype
) -> list[Tensor]:
    """Output and gradients of query, key and value, of random numbers that `dtype` of the model can hold."""
    device, total = documents.starts.device, sum(documents.lengths)
    draw = torch.Generator(device).manual_seed(0)

    def random(num_heads: int) -> Tensor:
        made = torch.randn(total, num_heads, heads.dim, generator=draw, device=device)
        return made.to(torch.bfloat16).to(dtype)

    inputs = [random(n).requires_grad_(True) for n in (heads.num, heads.num_keys, heads.num_keys)]
    with torch.enable_grad():
        out: Tensor = path(*inputs, documents, heads.dim**-0.5, window)
        return [out.detach(), *torch.autograd.grad(out, inputs, random(heads.num))]


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def sdpa_kernel(heads: Heads, dtype: torch.dtype, device: torch.device) -> str:
    """Which of its kernels SDPA takes for a row without a mask, as "SDPA (flash)"."""
    choose = getattr(torch, "_fused_sdp_choice", None)  # SDPA's own choice; torch has no public name for it
    if choose is None:
        return "SDPA"

    def empty(num_heads: int) -> Tensor:
        return torch.empty(1, num_heads, 128, heads.dim, dtype=dtype, device=device, requires_grad=True)

    keys = empty(heads.num_keys)
    number = choose(empty(heads.num), keys, keys, is_causal=True, enable_gqa=heads.num != heads.num_keys)
    names = {0: "math", 1: "flash", 2: "memory-efficient", 3: "cuDNN"}
    return f"SDPA ({names.get(int(number), str(number))})"
