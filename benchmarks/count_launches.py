"""What one block of a Llama asks of autograd and of torch in a training step: counted, not timed.

    python benchmarks/count_launches.py [--methods lora map] [--recompute full]

Autograd nodes, and torch operators that do something (views do not launch), of one block's forward and backward pass in
bfloat16 on a CPU: every linear alone, joined, and joined with the thin factors rounded once a step. Of a block: a model
of two blocks less a model of one, so that embedding and loss do not count. What a GPU launches is more (attention,
NF4) or less (Liger's kernels) by the same number in each row.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from trial import random_batch

from decompft.adapters.copies import round_factors
from decompft.adapters.joint import part
from decompft.launcher.recipe import AdapterSection, ModelSection, QuantizationSection
from decompft.launcher.worker.build import Built, build
from decompft.launcher.worker.engines.base import Engine

MODEL = {
    "model_type": "llama", "vocab_size": 260, "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
ROWS = ("alone", "joined", "joined, rounded once")
# they make an array's head, not its numbers
VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "split", "split_with_sizes", "unsqueeze",
    "squeeze", "select", "alias", "detach", "as_strided", "reshape", "empty", "empty_like", "empty_strided",
    "new_empty",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="*", default=["lora", "map"])
    parser.add_argument("--recompute", choices=["none", "full"], default="none")
    args = parser.parse_args(argv)
    for method in args.methods:
        for row in ROWS:
            print(json.dumps({"method": method, "linears": row, **count(method, row, args.recompute)}))


def count(method: str, row: str, recompute: str = "none") -> dict[str, int]:
    """Autograd nodes (all, and of frozen linears) and operators of a block."""
    one, two = (_count(method, row, recompute, blocks) for blocks in (1, 2))
    return {name: two[name] - one[name] for name in two}


def _count(method: str, row: str, recompute: str, num_blocks: int) -> dict[str, int]:
    built = _built(method, recompute, num_blocks)
    rounded = round_factors(built.model.model, torch.bfloat16)
    if row == "alone":
        part(built.model)
    if row == "joined, rounded once":
        rounded.refresh()
    batch = random_batch(2, 32)
    with _Operators() as operators:
        loss = built.model(batch)
        names = _nodes(loss)
        loss.backward()
    linears = sum(count for name, count in names.items() if name.startswith("_FrozenLinears"))
    found = operators.found
    return {
        "autograd_nodes": sum(names.values()), "frozen_nodes": linears, "operators": sum(found.values()),
        "products": sum(found[n] for n in ("mm", "addmm", "addmm_", "bmm")), "casts": found["_to_copy"],
    }  # fmt: skip


def _built(method: str, recompute: Any, num_blocks: int) -> Built:
    torch.manual_seed(0)
    built = build(
        ModelSection(config={**MODEL, "num_hidden_layers": num_blocks}, weights="random"),
        QuantizationSection(format="none", compute="bfloat16"),
        AdapterSection(method=method, rank=16, alpha=32.0),
        Engine(torch.device("cpu"), timeout_s=60), seed=0, model_dir=None, recompute=recompute,
    )  # fmt: skip
    built.model.train()
    return built


def _nodes(loss: Tensor) -> Counter[str]:
    seen: set[Any] = set()
    todo = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return Counter(type(node).__name__ for node in seen)


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


if __name__ == "__main__":
    main()
