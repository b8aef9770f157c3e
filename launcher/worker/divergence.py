"""How far is a merged model's prediction from that of base and adapter?

One model is in memory at a time: the first one's logits at the compared tokens are kept, on the host, as
float32: tokens x vocabulary x 4 bytes.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decompft.launcher.errors import RunFailed
from decompft.launcher.worker.build import DTYPES
from decompft.launcher.worker.data.batches import Batch, collate
from decompft.launcher.worker.data.rows import Row
from decompft.launcher.worker.inference import Adapter, load
from decompft.launcher.worker.load import Progress
from decompft.launcher.worker.model import LossModel

_CHUNK = 256  # tokens whose distributions are in float64 at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """Of two models over the same tokens; of classifiers over the same records."""

    kl_nats: float  # mean KL(unmerged || merged) of the next token's distribution
    top1_agreement: float  # part of the tokens for which both predict the same one
    num_tokens: int  # compared: the targets with loss


def measure(
    adapter: Adapter, merged: Path, rows: Sequence[Row], *, base: str | None, progress: Progress
) -> Divergence:
    """Run both models over `rows`, on a GPU if there is one, in the compute dtype of the training.

    Args:
        merged: a folder that `merge` wrote; transformers loads it by itself.
        base: as `inference.load`.

    Raises:
        RunFailed: a model's logits are not finite.
    """
    rows_twice = 2 * len(rows)
    unmerged = load(adapter.folder, base=base, say=lambda line: None)
    device, attention = unmerged.device, unmerged.model.config._attn_implementation
    kept: list[Tensor] = []
    with torch.inference_mode():
        for done, row in enumerate(rows, start=1):
            kept.append(_ours(unmerged.model, collate([row], 0, 1).to(device)).cpu())
            progress(done, rows_twice)
        del unmerged
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        plain = load_plain(adapter, merged, device, attention)
        kl = agree = 0.0
        for done, (row, ours) in enumerate(zip(rows, kept, strict=True), start=1):
            theirs = _theirs(plain, adapter.model.task, collate([row], 0, 1).to(device))
            for one, other in zip(ours.split(_CHUNK), theirs.split(_CHUNK), strict=True):
                one = one.to(device)
                kl += _kl_sum(one, other)
                agree += float((one.argmax(-1) == other.argmax(-1)).sum())
            progress(len(rows) + done, rows_twice)
    count = sum(len(logits) for logits in kept)
    if not math.isfinite(kl):
        raise RunFailed(
            f"{merged}: the merged model's predictions, or those before the merge, are not finite",
            "ask the adapter with decompft eval or generate: did it train to an end?",
        )
    return Divergence(kl_nats=kl / count, top1_agreement=agree / count, num_tokens=count)


def load_plain(adapter: Adapter, folder: Path, device: torch.device, attention: str) -> Any:
    """A model's folder through transformers alone.

    Args:
        attention: transformers' name of the attention; another one may leave out what a config asks for.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForCausalLM if adapter.model.task == "causal-lm" else AutoModelForSequenceClassification
    return auto.from_pretrained(
        folder,
        dtype=DTYPES[adapter.quantization.activations],
        attn_implementation=attention,
        device_map={"": str(device)},
        trust_remote_code=adapter.model.trust_remote_code,
        local_files_only=True,
    ).eval()


def _ours(model: LossModel, batch: Batch) -> Tensor:
    """float32 logits (targets, V) of one row's targets, or (1, num_labels)."""
    if batch.labels is not None:
        return model.class_logits(batch)
    if not model.plain_head:
        return model.logits(batch.input_ids, batch.position_ids, batch.documents)[0][batch.target_index]
    hidden = model.hidden(batch.input_ids, batch.position_ids, batch.documents)
    return model.head(hidden[0][batch.target_index])


def _theirs(model: Any, task: str, batch: Batch) -> Tensor:
    if (
        batch.labels is not None
    ):  # our reading of a decoder's last token, which transformers finds by its pad id
        return LossModel(model, task).class_logits(batch)
    given = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    # no mask and no cache: else documents of a packed row would see each other
    logits: Tensor = model(input_ids=batch.input_ids, use_cache=False, **given).logits
    return logits[0][batch.target_index].float()


def _kl_sum(ours: Tensor, theirs: Tensor) -> float:
    """Sum of KL(ours || theirs) over rows of logits (n, V), in float64: equal logits give 0."""
    log_p = torch.log_softmax(ours.double(), dim=-1)
    log_q = torch.log_softmax(theirs.double(), dim=-1)
    return float((log_p.exp() * (log_p - log_q)).sum())
