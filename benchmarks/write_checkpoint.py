"""Write a Llama-shaped checkpoint of random weights as safetensors shards with an index, fast.

    python benchmarks/write_checkpoint.py OUT                                  # Llama-2-7B's shape, 13.5 GB
    python benchmarks/write_checkpoint.py OUT --layers 2 --hidden 8192 --intermediate 28672 --heads 64 \
        --kv-heads 8                                                           # two layers of a 70B

Needs the standard library and numpy alone. Values are normal with deviation 0.02, in bfloat16: a few MiB
are drawn once and repeated, from another place for each tensor. No tokenizer: recipes that use it name
another with model.tokenizer. Shards are written by threads, and synced: what is measured on them later
is not the writing of them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

POOL_NUMBERS = 4 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--shard-gb", type=float, default=2.0)
    args = parser.parse_args()
    began = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "vocab_size": args.vocab, "hidden_size": args.hidden, "intermediate_size": args.intermediate,
        "num_hidden_layers": args.layers, "num_attention_heads": args.heads, "num_key_value_heads": args.kv_heads,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shards = split(shapes(args), int(args.shard_gb * 1e9))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    pool = bfloat16(np.random.default_rng(0).standard_normal(POOL_NUMBERS, dtype=np.float32) * 0.02)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        sizes = list(
            threads.map(
                lambda pair: write(args.out / pair[0], pair[1], pool), zip(names, shards, strict=True)
            )
        )
    places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor, _ in shard}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
    (args.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    took = time.perf_counter() - began
    print(f"{args.out}: {sum(sizes) / 1e9:.2f} GB in {len(shards)} shards, {took:.1f} s")


def shapes(args: argparse.Namespace) -> list[tuple[str, tuple[int, ...]]]:
    hidden, inner = args.hidden, args.intermediate
    kv = hidden // args.heads * args.kv_heads
    tensors: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (args.vocab, hidden))]
    for i in range(args.layers):
        layer = f"model.layers.{i}"
        tensors += [
            (f"{layer}.input_layernorm.weight", (hidden,)),
            (f"{layer}.self_attn.q_proj.weight", (hidden, hidden)),
            (f"{layer}.self_attn.k_proj.weight", (kv, hidden)),
            (f"{layer}.self_attn.v_proj.weight", (kv, hidden)),
            (f"{layer}.self_attn.o_proj.weight", (hidden, hidden)),
            (f"{layer}.post_attention_layernorm.weight", (hidden,)),
            (f"{layer}.mlp.gate_proj.weight", (inner, hidden)),
            (f"{layer}.mlp.up_proj.weight", (inner, hidden)),
            (f"{layer}.mlp.down_proj.weight", (hidden, inner)),
        ]
    return [*tensors, ("model.norm.weight", (hidden,)), ("lm_head.weight", (args.vocab, hidden))]


def split(tensors: list[tuple[str, tuple[int, ...]]], most: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in tensors:
        size = 2 * int(np.prod(shape))
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += size
    return shards


def write(path: Path, tensors: list[tuple[str, tuple[int, ...]]], pool: np.ndarray) -> int:
    """One file; returns the bytes of its tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors:
            left, at = int(np.prod(shape)), zlib.crc32(name.encode()) % POOL_NUMBERS
            if len(shape) == 1:  # a norm starts at 1
                file.write(bfloat16(np.ones(left, np.float32)).tobytes())
                continue
            while left:
                taken = pool[at : at + left]
                file.write(taken.data)
                left, at = left - len(taken), 0
        file.flush()
        os.fsync(file.fileno())
    return end


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16's bits as uint16, rounded to nearest."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


if __name__ == "__main__":
    main()
