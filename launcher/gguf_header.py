"""What a GGUF file says of its model: the config that transformers would derive, from its header alone.

The gguf package's reader builds an array object for each of the hundred thousand tokens and merges
(5 s of CPU time for a 135M model), which `check` and `plan` cannot afford; only scalars are read here.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from decompft.launcher.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_LLAMA = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "rope.freq_base": "rope_theta",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
_GPT2 = {
    "context_length": "n_positions",
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_GEMMA = _LLAMA | {"attention.key_length": "head_dim", "attention.sliding_window": "sliding_window"}
# GGUF architecture -> (model_type, GGUF key -> config key), as transformers' GGUF_CONFIG_MAPPING
_ARCHITECTURES: dict[str, tuple[str, dict[str, str]]] = {
    "llama": ("llama", _LLAMA | {"rope.dimension_count": "head_dim"}),
    "qwen2": ("qwen2", _LLAMA),
    # key_length is not in transformers' mapping; its Qwen3 default, 128, is what all released ones have
    "qwen3": ("qwen3", _LLAMA | {"attention.key_length": "head_dim"}),
    "phi3": ("phi3", _LLAMA),
    "gpt2": ("gpt2", _GPT2),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", _GEMMA),
}


def read_config(path: Path) -> dict[str, Any]:
    """The transformers config of the model in a GGUF file.

    Raises:
        ModelError: not a GGUF file, cut short, or of an architecture that is not known.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            fields, tensors = _parse(data)
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise ModelError(
            f"model.id: cannot read {path} as a GGUF file: {error}",
            "the file may be cut short; copy it again and compare its size",
        ) from error
    architecture = fields.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ModelError(
            f"model.id: {path} holds a model of GGUF architecture {architecture!r}",
            f"known: {', '.join(sorted(_ARCHITECTURES))}",
        )
    model_type, keys = _ARCHITECTURES[architecture]
    if architecture == "llama" and "mistral" in str(fields.get("general.name", "")).lower():
        model_type = "mistral"  # llama.cpp writes both as llama
    config: dict[str, Any] = {"model_type": model_type, "tie_word_embeddings": "output.weight" not in tensors}
    for gguf_key, key in keys.items():
        value = fields.get(f"{architecture}.{gguf_key}")
        if value is not None:
            config[key] = value
    # newer files leave the size out of their metadata: the embedding's rows are the truth
    if "token_embd.weight" in tensors:
        config["vocab_size"] = tensors["token_embd.weight"][-1]
    return config


def _parse(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Scalar fields by key (arrays are skipped), and tensor name -> dimensions, fastest first."""
    if data[:4] != b"GGUF":
        raise ValueError("it does not start with GGUF")
    version, num_tensors, num_fields = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version} is not 2 or 3")
    at = 24
    fields: dict[str, Any] = {}
    for _ in range(num_fields):
        key, at = _string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        at += 4
        if kind == _ARRAY:
            at = _skip_array(data, at)
        elif kind == _STRING:
            fields[key], at = _string(data, at)
        else:
            code = "<" + _SCALARS[kind]
            (fields[key],) = struct.unpack_from(code, data, at)
            at += struct.calcsize(code)
    tensors: dict[str, tuple[int, ...]] = {}
    for _ in range(num_tensors):
        name, at = _string(data, at)
        (num_dims,) = struct.unpack_from("<I", data, at)
        tensors[name] = struct.unpack_from(f"<{num_dims}Q", data, at + 4)
        at += 4 + 8 * num_dims + 4 + 8  # then the type and the offset
    return fields, tensors


def _string(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    end = at + 8 + length
    if end > len(data):
        raise ValueError("its header runs past its end")
    return data[at + 8 : end].decode(), end


def _skip_array(data: mmap.mmap, at: int) -> int:
    kind, length = struct.unpack_from("<IQ", data, at)
    at += 12
    if kind == _STRING:
        size = struct.Struct("<Q").unpack_from
        for _ in range(length):
            at += 8 + size(data, at)[0]
    elif kind == _ARRAY:
        for _ in range(length):
            at = _skip_array(data, at)
    else:
        at += length * struct.calcsize("<" + _SCALARS[kind])
    return int(at)
