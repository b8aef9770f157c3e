"""A tiny random model of each family, saved by plain transformers and built by ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  its operators, before any fork
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from decompft.launcher.recipe import AdapterSection, ModelSection, QuantizationSection
from decompft.launcher.recompute import Recompute
from decompft.launcher.worker.build import Built, build
from decompft.launcher.worker.data.rows import Row
from decompft.launcher.worker.engines.base import Engine

_COMMON = {
    "vocab_size": 120, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    # the families' own ids lie outside a vocabulary of 120
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
# a window narrower than a row, wherever a family has one
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_COMMON},
    "llama-llama3-rope": {"model_type": "llama", **_COMMON, "attention_bias": True, "rope_parameters": _LLAMA3},
    "mistral": {"model_type": "mistral", **_COMMON, "sliding_window": 6, "head_dim": 32},
    "qwen2": {
        "model_type": "qwen2", **_COMMON, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {"model_type": "qwen3", **_COMMON, "head_dim": 32},
    "gemma": {"model_type": "gemma", **_COMMON, "head_dim": 16},
    # caps small enough to bend logits of this size
    "gemma2": {
        "model_type": "gemma2", **_COMMON, "head_dim": 16, "sliding_window": 6, "final_logit_softcapping": 1.0,
        "attn_logit_softcapping": 0.5,
    },
    "gemma3_text": {
        "model_type": "gemma3_text", **_COMMON, "head_dim": 16, "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi": {"model_type": "phi", **_COMMON, "qk_layernorm": True},
    "phi3": {"model_type": "phi3", **_COMMON, "sliding_window": 6},
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 120, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip
PLAIN = QuantizationSection(format="none", compute="float32")
NF4 = QuantizationSection(format="nf4", compute="float32")


def plain_model(fields: dict[str, Any], *, task: str = "causal-lm", num_labels: int = 2) -> Any:
    """transformers' own model in evaluation mode; every tensor random, norms and biases too."""
    fields = dict(fields)
    config = AutoConfig.for_model(fields.pop("model_type"), num_labels=num_labels, **fields)
    auto = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    # eager computes a config's every word; sdpa leaves out what its kernel has no argument for
    moved = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = auto.from_config(config, attn_implementation="eager").eval()
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=moved)
    return model


def saved(folder: Path, fields: dict[str, Any], **kwargs: Any) -> tuple[Path, Any]:
    """A checkpoint in `folder`, and the model that was saved."""
    model = plain_model(fields, **kwargs)
    model.save_pretrained(folder)
    return folder, model


def section(folder: Path, **fields: Any) -> ModelSection:
    return ModelSection(id=str(folder), **fields)


def single() -> Engine:
    return Engine(torch.device("cpu"), timeout_s=60)


def built(
    model: ModelSection,
    quantization: QuantizationSection = PLAIN,
    adapter: AdapterSection | None = None,
    *,
    engine: Engine | None = None,
    recompute: Recompute = "none",
    recompute_blocks: int | None = None,
    seed: int = 0,
) -> Built:
    """Our build of a checkpoint, or of random weights."""
    return build(
        model, quantization, adapter, engine or single(), seed=seed,
        model_dir=None if model.id is None else Path(model.id), recompute=recompute,
        recompute_blocks=recompute_blocks,
    )  # fmt: skip


def row(lengths: tuple[int, ...], *, seed: int = 0, vocab: int = 120) -> Row:
    """Random documents, from the third token on trained."""
    tokens = np.random.default_rng(seed).integers(3, vocab, sum(lengths)).astype(np.int32)
    trained = np.concatenate([np.arange(n) >= min(2, n - 1) for n in lengths])
    return Row(id=0, tokens=tokens, trained=trained, doc_lengths=lengths)


def documents(packed: Row) -> list[Row]:
    """Each document of a row as a row of its own."""
    cuts = np.cumsum((0, *packed.doc_lengths))
    return [
        Row(id=i, tokens=packed.tokens[a:b], trained=packed.trained[a:b], doc_lengths=(int(b - a),))
        for i, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False))
    ]
