"""Training steps on short documents: packed without a mask, packed under a mask, and padded, by turns in one process.

python benchmarks/packed_attention.py [--length 1024] [--mean 100] [--rows 2] [--steps 5] [--out FILE]

The same documents each time, lengths drawn from an exponential law. `padded` has one document a row: in random order,
as data.packing: false trains, and sorted by length, which no training should; a batch is about as many padded tokens as
a packed one. Tokens a second are those of documents. On a CPU a model of SmolLM2-135M's widths with 4 layers, on a GPU
the shape of Llama-2-7B; a step is forward and backward, without an optimizer. Seconds on a CPU are those that this
process computed, on however busy a machine; on a GPU those of the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from decompft.launcher.recipe import AdapterSection, ModelSection, QuantizationSection
from decompft.launcher.worker.build import Built, build
from decompft.launcher.worker.data.batches import Batch, collate
from decompft.launcher.worker.data.packing import pack
from decompft.launcher.worker.data.rows import Row
from decompft.launcher.worker.engines.base import Engine

SMALL = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 8192, "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 8192,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=1024, help="tokens in a row")
    parser.add_argument("--mean", type=int, default=100, help="mean tokens of a document")
    parser.add_argument("--rows", type=int, default=2, help="packed rows in a batch")
    parser.add_argument("--steps", type=int, default=5, help="timed, after one")
    parser.add_argument("--layers", type=int, help="of the model")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    engine = Engine(torch.device("cuda" if torch.cuda.is_available() else "cpu"), timeout_s=60)
    config: dict[str, Any] = dict(LLAMA_7B if engine.device.type == "cuda" else SMALL)
    if args.layers is not None:
        config["num_hidden_layers"] = args.layers
    made = batches(args.length, args.mean, args.rows, config["vocab_size"])
    cases = [
        Case(name, model(config, attention, engine), [b.to(engine.device) for b in made[rows]])
        for name, attention, rows in (
            ("packed", "auto", "packed"),
            ("packed, under a mask", "sdpa", "packed"),
            ("padded", "auto", "padded"),
            ("padded, sorted", "auto", "sorted"),
        )
    ]
    for _ in range(args.steps + 1):
        for case in cases:
            case.step(engine.device)
    results = [case.result(cases[0]) for case in cases]
    for result in results:
        print(json.dumps(result))
    if args.out is not None:
        described = {"device": device_name(engine.device), "torch": torch.__version__, "config": config}
        described |= {k: v for k, v in vars(args).items() if k != "out"}
        args.out.write_text(json.dumps({**described, "results": results}, indent=2) + "\n", encoding="utf-8")


@dataclass
class Case:
    """A model and all its batches; `step` passes through them once."""

    name: str
    built: Built
    batches: list[Batch]
    seconds: list[float] = field(default_factory=list)
    loss: float = 0.0
    peak_gib: float = 0.0

    def step(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.built.model.train()
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        began, loss = clock(), torch.zeros((), device=device)
        for batch in self.batches:
            part = self.built.model(batch)
            part.backward()
            loss += part.detach()
        self.loss = float(loss) / sum(b.num_targets for b in self.batches)
        self.seconds.append(clock() - began)
        self.built.model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            self.peak_gib = round(torch.cuda.max_memory_allocated(device) / (1 << 30), 2)

    def rate(self) -> float:
        """Tokens of documents a second, the median without the first pass."""
        return sum(b.num_tokens for b in self.batches) / statistics.median(self.seconds[1:])

    def result(self, first: Case) -> dict[str, Any]:
        padded = sum(b.input_ids.numel() for b in self.batches)
        return {
            "case": self.name,
            "attention": self.built.kernels.partition("attention: ")[2],
            "batches": len(self.batches),
            "padding": round(1 - sum(b.num_tokens for b in self.batches) / padded, 3),
            "tokens_per_s": round(self.rate(), 1),
            "packed_over_this": round(first.rate() / self.rate(), 2),
            "loss_per_token": self.loss,
            "peak_gib": self.peak_gib or None,  # of all the models here and this one's pass
        }


def batches(length: int, mean: int, rows: int, vocab: int) -> dict[str, list[Batch]]:
    """The same documents in packed rows, one a row in random order, and one a row sorted by length."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.exponential(mean, 4 * rows * length // mean), 8, length).astype(int).tolist()
    single = [
        Row(
            id=i,
            tokens=draw.integers(3, vocab, n).astype(np.int32),
            trained=np.ones(n, bool),
            doc_lengths=(n,),
        )
        for i, n in enumerate(lengths)
    ]
    together = [_joined([single[i] for i in members]) for members in pack(lengths, length)]
    in_order = sorted(single, key=lambda row: len(row.tokens), reverse=True)
    return {
        "packed": [collate(together[i : i + rows], 0) for i in range(0, len(together), rows)],
        "padded": _filled(single, rows * length),
        "sorted": _filled(in_order, rows * length),
    }


def _filled(single: Sequence[Row], budget: int) -> list[Batch]:
    """Rows in the order given, as many in a batch as `budget` padded tokens take."""
    made: list[list[Row]] = [[]]
    for row in single:
        if made[-1] and max(len(r.tokens) for r in (*made[-1], row)) * (len(made[-1]) + 1) > budget:
            made.append([])
        made[-1].append(row)
    return [collate(rows, 0) for rows in made]


def _joined(members: Sequence[Row]) -> Row:
    return Row(
        id=members[0].id,
        tokens=np.concatenate([row.tokens for row in members]),
        trained=np.concatenate([row.trained for row in members]),
        doc_lengths=tuple(len(row.tokens) for row in members),
    )


def model(config: dict[str, Any], attention: str, engine: Engine) -> Built:
    is_gpu = engine.device.type == "cuda"
    section = ModelSection.model_validate({"config": config, "weights": "random", "attention": attention})
    base = QuantizationSection(
        format="nf4" if is_gpu else "none", compute="bfloat16" if is_gpu else "float32"
    )
    adapter = AdapterSection(method="lora", rank=16, alpha=32.0)
    return build(section, base, adapter, engine, seed=0, model_dir=None, recompute="none")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
