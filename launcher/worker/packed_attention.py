"""Attention inside documents alone: no mask over the row, no work between documents.

Shapes: B rows, T tokens a row, N = B T tokens, H heads, K key heads (H is a multiple of K), D head dimension.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decompft.launcher.worker.data.documents import Documents

# the name under which transformers finds it
NAME = "decompft_packed"


def register() -> None:
    """Make the attention known to transformers; a second time changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    # of a call without documents, such as that of `generate`
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """A layer's attention, as transformers calls it: query (B, H, T, D), key and value (B, K, T, D) -> (B, T, H, D).

    Args:
        attention_mask: not read where documents are given.
        sliding_window: a token sees itself and those before it, so many in all.
        documents: of the batch; None leaves the call to transformers' own SDPA.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if documents is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    assert dropout == 0.0, "the base's own dropout is off"
    window = sliding_window if sliding_window and documents.longest > sliding_window else None
    if not documents.is_packed and window is None:
        # causal, and padding lies at the end: no trained token sees it
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)
    rows, tokens = query.shape[0], query.shape[2]
    query_NHD, key_NKD, value_NKD = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    path = varlen if query.is_cuda else by_document
    out_NHD = path(query_NHD, key_NKD, value_NKD, documents, scaling, window)
    return out_NHD.unflatten(0, (rows, tokens)), None


def by_document(
    query_NHD: Tensor,
    key_NKD: Tensor,
    value_NKD: Tensor,
    documents: Documents,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """SDPA of one document after another, (N, H, D): the path of a CPU, and what `varlen` is held to."""
    sizes = list(documents.lengths)
    parts = zip(query_NHD.split(sizes), key_NKD.split(sizes), value_NKD.split(sizes), strict=True)
    return torch.cat([_one_document(query, key, value, scaling, window) for query, key, value in parts])


def _one_document(
    query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query_THD, key_TKD, value_TKD))
    length = query.shape[2]
    band = None
    if window is not None and length > window:
        at = torch.arange(length, device=query.device)
        back = at[:, None] - at
        band = (back >= 0) & (back < window)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=band, is_causal=band is None, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out[0].transpose(0, 1)


def varlen(
    query_NHD: Tensor,
    key_NKD: Tensor,
    value_NKD: Tensor,
    documents: Documents,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """torch's variable-length flash attention, (N, H, D): one kernel for all documents of a batch."""
    from torch.nn.attention.varlen import varlen_attn

    is_grouped = query_NHD.shape[1] != key_NKD.shape[1]
    options: dict[str, Any] = {"enable_gqa": True} if is_grouped and _asks_for_groups() else {}
    out = varlen_attn(
        query_NHD, key_NKD, value_NKD, documents.starts, documents.starts, documents.longest, documents.longest,
        # (tokens before, tokens after); -1 is all
        scale=scaling, window_size=(-1 if window is None else window - 1, 0), **options,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


@cache
def _asks_for_groups() -> bool:
    """torch 2.11 has no such argument and hands fewer key heads on to a kernel that takes them."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
