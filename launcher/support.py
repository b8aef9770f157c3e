"""What combines with what: tables made by asking the planner, so that no page can be wrong.

A cell is planned for a tiny model; the reason of a refusal is what a user would read. Which cells
ran on GPUs is read from a benchmark's rows, {"format", "strategy", "ranks", "ok"}.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from decompft.adapters.formats import FORMAT_SPECS
from decompft.adapters.spec import ADAPTER_SPECS
from decompft.launcher.errors import UserError
from decompft.launcher.machine import Machine
from decompft.launcher.planner import make
from decompft.launcher.recipe import Recipe
from decompft.launcher.strategies import STRATEGIES

MODEL = {
    "model_type": "llama", "vocab_size": 260, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
# enough for any format; four of them are two nodes of two for hsdp
GPUS = Machine(num_gpus=4, gpu_memory_bytes=80 << 30, gpu_name="GPU", compute_capability=(9, 0))

Gpu = Mapping[tuple[str, str], Mapping[str, Any]]  # (format, strategy) -> the newest row


def cell(strategy: str, **sections: Mapping[str, Any]) -> str | None:
    """None where a recipe with these sections is planned under a strategy, else why not."""
    ranks = {"single": 1, "hsdp": 4}.get(strategy, 2)
    parallel: dict[str, Any] = {"strategy": strategy, "gpus_per_node": ranks}
    if strategy == "hsdp":
        parallel["shard_size"] = 2
    given: dict[str, Any] = {
        "model": {"config": MODEL, "weights": "random"},
        "data": {"train": [{"path": "/data/train.jsonl"}], "sequence_length": 64},
        "train": {"max_steps": 1, "global_batch_size": 4, **sections.get("train", {})},
        "parallel": {**parallel, **sections.get("parallel", {})},
        "quantization": sections.get("quantization", {}),
        "adapter": sections.get("adapter", {}),
    }
    try:
        make(Recipe.model_validate(given), machine=GPUS)
    except UserError as error:
        return f"{error.message}; {error.hint}"
    except ValidationError as error:  # a combination that no recipe may have
        return str(error.errors()[0]["ctx"]["error"])
    return None


def gpu_rows(path: Path) -> Gpu:
    """The cells that ran on GPUs, by (format, strategy); none where there is no such file."""
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return {(row["format"], row["strategy"]): row for row in rows}


def support_table() -> str:
    """For the README: a row a format, one for the adapters that run under the same strategies; a column a strategy."""
    rows = []
    for name in FORMAT_SPECS:
        rows.append([f"base `{name}`", *_words(name, "quantization", "format")])
    alike: dict[tuple[str, ...], list[str]] = {}
    for name in ADAPTER_SPECS:
        alike.setdefault(tuple(_words(name, "adapter", "method")), []).append(f"`{name}`")
    rows += [[f"adapters {', '.join(names)}", *words] for words, names in alike.items()]
    return _markdown(["", *STRATEGIES], rows)


def support_page(gpu: Gpu) -> str:
    """docs/support.md: every cell, the reason of each refusal, and which cells ran on GPUs."""
    refused: list[str] = []

    def table(corner: str, entries: Iterable[tuple[str, dict[str, Any]]], *, has_gpu: bool = False) -> str:
        rows = []
        for name, sections in entries:
            row = [f"`{name}`"]
            for strategy in STRATEGIES:
                why = cell(strategy, **sections)
                if why:
                    refused.append(f"- `{name}` under `{strategy}`: {why}.")
                row.append(
                    "refused" if why else f"yes{_gpu(gpu.get((name, strategy)))}" if has_gpu else "yes"
                )
            rows.append(row)
        return _markdown([corner, *STRATEGIES], rows)

    formats = table("base", ((n, {"quantization": {"format": n}}) for n in FORMAT_SPECS), has_gpu=True)
    adapters = table("adapter", ((n, {"adapter": {"method": n}}) for n in ADAPTER_SPECS))
    options = table("option", _OPTIONS.items())
    reasons = "\n".join(refused) if refused else "None."
    titles = [(s.name, s.title) for s in FORMAT_SPECS.values()]
    titles += [(s.name, s.title) for s in STRATEGIES.values()]
    return _PAGE.format(
        formats=formats, adapters=adapters, options=options, reasons=reasons,
        titles="\n".join(f"- `{name}`: {title}" for name, title in titles),
        capability=_capabilities(),
    )  # fmt: skip


# what some engines cannot do, as a recipe would ask for it
_OPTIONS: dict[str, dict[str, Any]] = {
    "train.optimizer: adamw8bit": {"train": {"optimizer": "adamw8bit"}},
    "parallel.cpu_offload: true": {"parallel": {"cpu_offload": True}},
    "parallel.deepspeed": {"parallel": {"deepspeed": {"wall_clock_breakdown": True}}},
}

_PAGE = """# What combines with what

Made from the code by `tests/test_support.py` (`--update-golden` rewrites it): each cell is what the planner says.
Each "yes" of the first table is run on a CPU by `tests/test_matrix.py`: two processes, hsdp on four as 2 x 2, and the
losses are those of `single`. "GPU: n" says that it also ran on n GPUs (`benchmarks/results/matrix.json`).

## Base format x strategy

{formats}
{capability}

## Adapter x strategy

An adapter sees its base through one protocol, so that every adapter works over every base format:
`tests/test_adapter_contract.py` holds each pair to its formula. Each "yes" below is run on a CPU by
`tests/test_every_method.py`, in one model whose layers each carry another method; on GPUs ran `lora` and `map`.

{adapters}
## Other keys x strategy

{options}
## Refused, and why

{reasons}

Several nodes are never started from one machine: `decompft launch` refuses them, `decompft sbatch` prints a job script.

## The names

{titles}
"""


def _words(name: str, section: str, key: str) -> list[str]:
    return ["no" if cell(strategy, **{section: {key: name}}) else "yes" for strategy in STRATEGIES]


def _gpu(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ", GPU: not run"
    return f", GPU: {row['ranks']}" if row["ok"] else ", GPU: failed"


def _capabilities() -> str:
    lines = [
        f"`{s.name}` needs a GPU of compute capability {s.min_capability[0]}.{s.min_capability[1]} or higher."
        for s in FORMAT_SPECS.values()
        if s.min_capability
    ]
    return "\n".join(lines)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
