"""How a config becomes layers: one function a model family, with transformers' own defaults.

Configs on the hub leave out what equals the default, so the defaults here are part of the shape;
a test compares them, and every layer's name and size, with what transformers builds.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from decompft.launcher.errors import ModelError
from decompft.launcher.models import LinearShape, ModelShape, OtherShape, Saved
from decompft.launcher.recipe import Task

# fmt: off
_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None,
    "max_position_embeddings": 2048, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
}
_QWEN2 = _LLAMA | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
_GEMMA = _LLAMA | {
    "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}
_GEMMA2: dict[str, Any] = _GEMMA | {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {
        "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    },
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": 128},
    "gemma": _GEMMA,
    "gemma2": _GEMMA2 | {"final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA2 | {
        "vocab_size": 262208, "max_position_embeddings": 131072, "final_logit_softcapping": None,
    },
    "phi": _LLAMA | {
        "vocab_size": 51200, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "qk_layernorm": False,
    },
    "phi3": _LLAMA | {
        "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
    },
    "gpt2": {
        "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
        "n_inner": None, "tie_word_embeddings": True,
    },
    "bert": {
        "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2,
    },
}
# names that transformers' GPT2Config takes as well
_GPT2_ALIASES = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
# fmt: on
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "qk_layernorm")


def model_types() -> list[str]:
    """The model types whose shape is known."""
    return sorted(_DEFAULTS)


def shape_keys() -> set[str]:
    """Every config key, of any family, that decides a shape."""
    return {*_GPT2_ALIASES, *(key for defaults in _DEFAULTS.values() for key in defaults)}


def shape_of(config: dict[str, Any], task: Task, num_labels: int) -> ModelShape:
    """The shape of a transformers config.

    Raises:
        ModelError: an unknown model type, a value of the wrong type, sizes that do not divide.
    """
    model_type = config.get("model_type")
    if model_type not in _DEFAULTS:
        near = difflib.get_close_matches(str(model_type), _DEFAULTS, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ModelError(
            f"model: unknown model_type {model_type!r}", f"{meant}known: {', '.join(model_types())}"
        )
    sizes = _sizes(config, model_type)
    parts = _FAMILIES.get(model_type, _llama)(sizes, model_type, task)
    head_in = sizes.hidden
    if task == "causal-lm":
        head = LinearShape(
            name="lm_head", out=sizes.vocab, in_=head_in, bias=model_type == "phi", per_layer=False
        )
    else:
        is_bert = model_type == "bert"
        head = LinearShape(
            name="classifier" if is_bert else "score",
            out=num_labels,
            in_=head_in,
            bias=is_bert,
            per_layer=False,
        )
    return ModelShape(
        model_type=model_type,
        task=task,
        hidden=sizes.hidden,
        num_layers=sizes.layers,
        vocab=sizes.vocab,
        num_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        intermediate=sizes.intermediate,
        max_positions=sizes.positions,
        tied=sizes.tied and task == "causal-lm",
        has_softcap=sizes.has_softcap,
        linears=parts.linears,
        head=head,
        others=parts.others,
        saved=parts.saved,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sizes:
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    type_vocab: int
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    qk_layernorm: bool
    has_softcap: bool

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parts:
    linears: tuple[LinearShape, ...]
    others: tuple[OtherShape, ...]
    saved: Saved


def _sizes(config: dict[str, Any], model_type: str) -> _Sizes:
    values = {**_DEFAULTS[model_type], **_checked(config, model_type)}
    if model_type == "gpt2":
        values |= {name: values[own] for name, own in _GPT2_ALIASES.items()}
        values["intermediate_size"] = values["n_inner"] or 4 * values["n_embd"]
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    head_dim = values.get("head_dim")
    if head_dim is None or model_type in ("llama", "gemma2", "gemma3_text", "gpt2", "bert"):
        if hidden % heads:
            raise ModelError(
                f"model: hidden_size {hidden} is not a multiple of {heads} attention heads",
                "change hidden_size or num_attention_heads",
            )
    return _Sizes(
        vocab=values["vocab_size"],
        hidden=hidden,
        intermediate=values["intermediate_size"],
        layers=values["num_hidden_layers"],
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=head_dim or hidden // heads,
        positions=values["max_position_embeddings"],
        type_vocab=values.get("type_vocab_size", 0),
        tied=values.get("tie_word_embeddings", True),
        attention_bias=values.get("attention_bias", False),
        mlp_bias=values.get("mlp_bias", False),
        qk_layernorm=values.get("qk_layernorm", False),
        has_softcap=values.get("final_logit_softcapping") is not None,
    )


def _checked(config: dict[str, Any], model_type: str) -> dict[str, Any]:
    """The keys of a config that decide the shape, under the family's own names."""
    known = _DEFAULTS[model_type]
    kept: dict[str, Any] = {}
    for written, value in config.items():
        key = _GPT2_ALIASES.get(written, written) if model_type == "gpt2" else written
        if key not in known or (value is None and known[key] is None):
            continue
        # a null that is written out: as many key heads as attention heads; no softcap
        if key == "final_logit_softcapping" or (value is None and key == "num_key_value_heads"):
            kept[key] = value
            continue
        is_right = isinstance(value, bool) if key in _FLAGS else type(value) is int and value > 0
        if not is_right:
            wanted = "true or false" if key in _FLAGS else "a positive whole number"
            raise ModelError(f"model: {written} is {value!r}, not {wanted}", "correct the model's config")
        kept[key] = value
    return kept


def _llama(s: _Sizes, model_type: str, task: Task) -> _Parts:
    """llama, mistral, qwen2, qwen3 and the gemmas: one skeleton, other biases and norms."""
    layer, attn = "model.layers.{i}.", "model.layers.{i}.self_attn."
    qkv_bias = {"llama": s.attention_bias, "mistral": False, "qwen2": True}.get(model_type, s.attention_bias)
    o_bias = qkv_bias and model_type != "qwen2"
    mlp_bias = s.mlp_bias and model_type == "llama"
    linears = (
        LinearShape(name=attn + "q_proj", out=s.q, in_=s.hidden, bias=qkv_bias),
        LinearShape(name=attn + "k_proj", out=s.kv, in_=s.hidden, bias=qkv_bias),
        LinearShape(name=attn + "v_proj", out=s.kv, in_=s.hidden, bias=qkv_bias),
        LinearShape(name=attn + "o_proj", out=s.hidden, in_=s.q, bias=o_bias),
        LinearShape(name=layer + "mlp.gate_proj", out=s.intermediate, in_=s.hidden, bias=mlp_bias),
        LinearShape(name=layer + "mlp.up_proj", out=s.intermediate, in_=s.hidden, bias=mlp_bias),
        LinearShape(name=layer + "mlp.down_proj", out=s.hidden, in_=s.intermediate, bias=mlp_bias),
    )
    norms = ["input_layernorm", "post_attention_layernorm"]
    if model_type in ("gemma2", "gemma3_text"):
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    qk_norm = model_type in ("qwen3", "gemma3_text")
    others = [
        OtherShape(name="model.embed_tokens", num_params=s.vocab * s.hidden),
        *(OtherShape(name=layer + norm, num_params=s.hidden, per_layer=True) for norm in norms),
        OtherShape(name="model.norm", num_params=s.hidden),
    ]
    if qk_norm:
        others += [
            OtherShape(name=attn + norm, num_params=s.head_dim, per_layer=True)
            for norm in ("q_norm", "k_norm")
        ]
    return _Parts(linears=linears, others=tuple(others), saved=Saved(norm_inputs=len(norms), qk_norm=qk_norm))


def _phi3(s: _Sizes, model_type: str, task: Task) -> _Parts:
    layer = "model.layers.{i}."
    return _Parts(
        linears=(
            LinearShape(name=layer + "self_attn.o_proj", out=s.hidden, in_=s.q),
            LinearShape(name=layer + "self_attn.qkv_proj", out=s.q + 2 * s.kv, in_=s.hidden),
            LinearShape(name=layer + "mlp.gate_up_proj", out=2 * s.intermediate, in_=s.hidden),
            LinearShape(name=layer + "mlp.down_proj", out=s.hidden, in_=s.intermediate),
        ),
        others=(
            OtherShape(name="model.embed_tokens", num_params=s.vocab * s.hidden),
            OtherShape(name=layer + "input_layernorm", num_params=s.hidden, per_layer=True),
            OtherShape(name=layer + "post_attention_layernorm", num_params=s.hidden, per_layer=True),
            OtherShape(name="model.norm", num_params=s.hidden),
        ),
        saved=Saved(mlp_copies=True),
    )


def _phi(s: _Sizes, model_type: str, task: Task) -> _Parts:
    """Attention and MLP read the same normed input; every norm and linear has a bias."""
    layer, attn, h, i = "model.layers.{i}.", "model.layers.{i}.self_attn.", s.hidden, s.intermediate
    others = [
        OtherShape(name="model.embed_tokens", num_params=s.vocab * h),
        OtherShape(name=layer + "input_layernorm", num_params=2 * h, per_layer=True),
        OtherShape(name="model.final_layernorm", num_params=2 * h),
    ]
    if s.qk_layernorm:
        size = 2 * (h // s.heads)
        others += [
            OtherShape(name=attn + n, num_params=size, per_layer=True) for n in ("q_layernorm", "k_layernorm")
        ]
    return _Parts(
        linears=(
            LinearShape(name=attn + "q_proj", out=s.q, in_=h, bias=True),
            LinearShape(name=attn + "k_proj", out=s.kv, in_=h, bias=True),
            LinearShape(name=attn + "v_proj", out=s.kv, in_=h, bias=True),
            LinearShape(name=attn + "dense", out=h, in_=s.q, bias=True),
            LinearShape(name=layer + "mlp.fc1", out=i, in_=h, bias=True),
            LinearShape(name=layer + "mlp.fc2", out=h, in_=i, bias=True),
        ),
        others=tuple(others),
        # gelu_new is composed of plain operations: x, tanh, x/2 and 1+tanh are kept, and fc2's input
        saved=Saved(norm_inputs=1, qk_norm=s.qk_layernorm, block_inputs=1, mlp_eager=5, has_liger=False),
    )


def _gpt2(s: _Sizes, model_type: str, task: Task) -> _Parts:
    """Conv1D layers, which store (in, out); the sizes here are (out, in) as everywhere."""
    layer, h, i = "transformer.h.{i}.", s.hidden, s.intermediate
    return _Parts(
        linears=(
            LinearShape(name=layer + "attn.c_attn", out=3 * h, in_=h, bias=True),
            LinearShape(name=layer + "attn.c_proj", out=h, in_=h, bias=True),
            LinearShape(name=layer + "mlp.c_fc", out=i, in_=h, bias=True),
            LinearShape(name=layer + "mlp.c_proj", out=h, in_=i, bias=True),
        ),
        others=(
            OtherShape(name="transformer.wte", num_params=s.vocab * h),
            OtherShape(name="transformer.wpe", num_params=s.positions * h),
            OtherShape(name=layer + "ln_1", num_params=2 * h, per_layer=True),
            OtherShape(name=layer + "ln_2", num_params=2 * h, per_layer=True),
            OtherShape(name="transformer.ln_f", num_params=2 * h),
        ),
        saved=Saved(mlp_eager=5, has_liger=False),
    )


def _bert(s: _Sizes, model_type: str, task: Task) -> _Parts:
    if task != "sequence-classification":
        raise ModelError(
            "model: bert is an encoder and cannot be trained as a causal-lm",
            "set model.task: sequence-classification",
        )
    layer, h, i = "bert.encoder.layer.{i}.", s.hidden, s.intermediate
    attn = layer + "attention."
    return _Parts(
        linears=(
            *(
                LinearShape(name=f"{attn}self.{n}", out=h, in_=h, bias=True)
                for n in ("query", "key", "value")
            ),
            LinearShape(name=attn + "output.dense", out=h, in_=h, bias=True),
            LinearShape(name=layer + "intermediate.dense", out=i, in_=h, bias=True),
            LinearShape(name=layer + "output.dense", out=h, in_=i, bias=True),
            LinearShape(name="bert.pooler.dense", out=h, in_=h, bias=True, per_layer=False),
        ),
        others=(
            OtherShape(name="bert.embeddings.word_embeddings", num_params=s.vocab * h),
            OtherShape(name="bert.embeddings.position_embeddings", num_params=s.positions * h),
            OtherShape(name="bert.embeddings.token_type_embeddings", num_params=s.type_vocab * h),
            OtherShape(name="bert.embeddings.LayerNorm", num_params=2 * h),
            OtherShape(name=attn + "output.LayerNorm", num_params=2 * h, per_layer=True),
            OtherShape(name=layer + "output.LayerNorm", num_params=2 * h, per_layer=True),
        ),
        saved=Saved(mlp_eager=2, has_liger=False),
    )


_FAMILIES: dict[str, Callable[[_Sizes, str, Task], _Parts]] = {
    "phi": _phi,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "bert": _bert,
}
