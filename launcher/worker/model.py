"""The model as transformers defines it, on meta, behind one module that returns a loss sum."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decompft.adapters.base import Adapter
from decompft.adapters.token_rows import TokenHead
from decompft.launcher.errors import ModelError
from decompft.launcher.recipe import ModelSection
from decompft.launcher.worker import packed_attention
from decompft.launcher.worker.data.batches import IGNORE, Batch
from decompft.launcher.worker.data.documents import Documents
from decompft.launcher.worker.loss import TrainedRows, head_logits, token_loss_sum

# the frozen base's own dropout is off: only adapter.dropout drops anything
_DROPOUTS = (
    "attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "classifier_dropout", "embd_pdrop",
    "embedding_dropout", "hidden_dropout", "hidden_dropout_prob", "resid_pdrop", "summary_first_dropout",
)  # fmt: skip

# families whose forward is decoder -> head (-> softcap) and nothing else, so that the head may be
# applied chunk by chunk; a test holds each of them to transformers' own logits
PLAIN_HEADS = ("gemma", "gemma2", "gemma3_text", "gpt2", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3")


def read_config(section: ModelSection, model_dir: Path | None) -> Any:
    """transformers' config object of the recipe's model, dropouts off.

    Raises:
        ModelError: transformers does not know the model type, or refuses the config.
    """
    from transformers import AutoConfig

    try:
        if model_dir is None:
            assert section.config is not None
            fields = dict(section.config)
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        else:
            config = AutoConfig.from_pretrained(
                model_dir, trust_remote_code=section.trust_remote_code, local_files_only=True
            )
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(
            f"{model_dir or 'model.config'}: {error}", "check model_type and config.json"
        ) from error
    for name in _DROPOUTS:
        if getattr(config, name, None) is not None:
            setattr(config, name, 0.0)
    config.use_cache = False
    if section.task == "sequence-classification":
        config.num_labels = section.num_labels
    return config


def build_on_meta(config: Any, section: ModelSection, dtype: torch.dtype) -> Any:
    """The transformers model with every parameter on meta, nothing initialised."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForCausalLM if section.task == "causal-lm" else AutoModelForSequenceClassification
    try:
        with torch.device("meta"):
            return auto.from_config(
                config,
                dtype=dtype,
                attn_implementation=_attention(config, section),
                trust_remote_code=section.trust_remote_code,
            )
    except ValueError as error:  # e.g. an encoder asked for as a causal LM
        raise ModelError(
            f"model type {config.model_type}: {error}", f"it cannot do task {section.task}"
        ) from error


def fill_buffers(model: Any) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies, masks), parameters untouched.

    After materialize they are garbage; transformers' own initialiser fills what is not flagged.

    Raises:
        ModelError: it left one out.
    """
    own = {
        f"{n}.{b}": t
        for n, m in model.named_modules()
        if not isinstance(m, Adapter)
        for b, t in m._buffers.items()
    }
    marked = {n: t.fill_(_mark(t)) for n, t in own.items() if t is not None and _mark(t) is not None}
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for module in model.modules():
        # GPT-2's initialiser reaches into child layers for weights that injection has replaced
        if not any(True for _ in module.buffers(recurse=False)):
            module._is_hf_initialized = True
    model.initialize_weights()
    left = [n for n, t in marked.items() if (t.isnan() if t.is_floating_point() else t == _mark(t)).any()]
    if left:
        raise ModelError(
            f"model type {model.config.model_type}: nothing computes its buffer {left[0]}",
            "this version of decompft cannot build the model; please report its id",
        )


def _mark(buffer: Tensor) -> float | None:
    """A value that no initialiser writes; None where each value is one that might be."""
    if buffer.is_floating_point():
        return math.nan
    return torch.iinfo(torch.int64).min if buffer.dtype == torch.int64 else None


def _attention(config: Any, section: ModelSection) -> str:
    """sdpa has no argument for a cap of the attention scores (Gemma 2) and would leave it out silently."""
    is_capped = getattr(config, "attn_logit_softcapping", None) is not None
    return "eager" if is_capped or section.attention == "eager" else "sdpa"


def blocks(model: Any) -> list[nn.Module]:
    """The repeated layers: the children of the longest module list."""
    lists: list[Any] = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=_length)) if lists else []


def _length(found: Any) -> int:
    return len(found)


def head_names(model: Any) -> list[str]:
    """Output heads by name: never adapted, kept in the compute dtype."""
    head = model.get_output_embeddings()
    names = [n for n, m in model.named_modules() if head is not None and m is head]
    return names or [n for n, _ in model.named_children() if n in ("score", "classifier")]


class LossModel(nn.Module):
    """A transformers model whose forward is the sum of its loss over trained tokens (or labels).

    It is the root that engines shard, so that the head's weight is whole while the loss uses it.
    """

    def __init__(self, model: Any, task: str) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.config = model.config
        self.plain_head = self.config.model_type in PLAIN_HEADS

    def forward(self, batch: Batch) -> Tensor:
        """Loss sum, float32 scalar: over tokens with a target, or over rows with a label."""
        if self.task == "sequence-classification":
            assert batch.labels is not None, "classification rows have labels"
            return F.cross_entropy(self.class_logits(batch), batch.labels, reduction="sum", ignore_index=-100)
        index = batch.target_index
        targets = batch.targets.reshape(-1) if index is None else batch.targets.reshape(-1)[index]
        if self.plain_head:
            picked = _rows(self.hidden(batch.input_ids, batch.position_ids, batch.documents), index)
            head = self.model.get_output_embeddings()
            trained = _trained_rows(head, picked.device)
            return token_loss_sum(
                picked, head.weight, head.bias, targets, self._softcap(), trained, has_ignored=index is None
            )
        logits = _rows(self.logits(batch.input_ids, batch.position_ids, batch.documents), index)
        return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE)

    def class_logits(self, batch: Batch) -> Tensor:
        """float32 logits (B, num_labels) of a classifier."""
        given: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if not hasattr(self.model, "score"):  # an encoder, which pools as it was made to
            kinds = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
            return self.model(**given, **kinds).logits.float()
        # a decoder is read at its last token; transformers looks for that by the pad id, which may
        # be the end token's, or none
        assert batch.attention_mask is not None, "a batch with labels has a mask"
        hidden = self.model.base_model(**given, use_cache=False).last_hidden_state
        last = batch.attention_mask.sum(1) - 1
        return self.model.score(hidden[torch.arange(len(last), device=last.device), last]).float()

    def hidden(
        self, input_ids: Tensor, position_ids: Tensor | None, documents: Documents | None = None
    ) -> Tensor:
        """Final hidden states (B, T, H).

        Our attention (packed_attention.py) keeps documents apart by where they begin. Elsewhere they are told
        apart by position_ids that restart: transformers sees that only without a mask and without a cache, and
        both are withheld here on purpose.
        """
        given = self._given(documents)
        out = self.model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **given)
        hidden: Tensor = out.last_hidden_state
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """float32 logits (..., V) of hidden states (..., H); of families with a plain head only."""
        head = self.model.get_output_embeddings()
        trained = _trained_rows(head, hidden.device)
        return head_logits(hidden, head.weight, head.bias, self._softcap(), trained)

    def logits(
        self, input_ids: Tensor, position_ids: Tensor | None, documents: Documents | None = None
    ) -> Tensor:
        """float32 logits (B, T, V)."""
        if self.plain_head:
            return self.head(self.hidden(input_ids, position_ids, documents))
        given = self._given(documents)
        out = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **given)
        return out.logits.float()

    def _given(self, documents: Documents | None) -> dict[str, Any]:
        """What tells attention of documents, besides positions."""
        if documents is None or self.config._attn_implementation != packed_attention.NAME:
            return {"attention_mask": None}
        # what has four dimensions is taken for a mask that is made already: transformers makes none, and does not
        # ask the device whether positions restart
        return {"attention_mask": documents.starts.view(1, 1, 1, -1), "documents": documents}

    def _softcap(self) -> float | None:
        return getattr(self.config, "final_logit_softcapping", None)


def _rows(values: Tensor, index: Tensor | None) -> Tensor:
    """(B, T, n) -> the rows (num, n) at these places of (B, T); None for all of them."""
    flat = values.reshape(-1, values.shape[-1])
    return flat if index is None else flat[index]


def _trained_rows(head: nn.Module, device: torch.device) -> TrainedRows | None:
    if not isinstance(head, TokenHead):
        return None
    return TrainedRows(rows=head.rows, ids=head.sorted_ids(device), num_new=head.num_new)
