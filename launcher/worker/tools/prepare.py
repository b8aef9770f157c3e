"""Everything that needs no process group: find or convert the model, tokenize the data.

Runs as a child of `launch`, before any rank exists: `python -m ...prepare RUN_DIR`.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from decompft.launcher import fetched
from decompft.launcher.outcome import write_atomic
from decompft.launcher.plan import Plan
from decompft.launcher.runs import RunDir
from decompft.launcher.worker.prepared import Prepared
from decompft.launcher.worker.tools.main import run_tool


def main(argv: list[str]) -> None:
    run = RunDir.open(Path(argv[0]))
    plan = run.read_plan()
    if fetched.read(run.path) is not None:
        os.environ |= fetched.OFFLINE  # first: the hub's library reads them when it is imported
        fetched.verify(run.path)
    # transformers takes seconds to import: only here, after the plan was read
    gc.disable()  # what an import makes stays: looking for garbage in it takes a fifth of the time
    from decompft.launcher.worker.data.cache import data_cache_root
    from decompft.launcher.worker.data.prepare import prepare_data
    from decompft.launcher.worker.data.rows import open_rows
    from decompft.launcher.worker.modelfiles import resolve
    from decompft.launcher.worker.tokenizers import load_tokenizer, pad_id
    from decompft.launcher.worker.tokens import add_tokens
    from decompft.launcher.worker.tools.progress import say

    importlib.import_module("transformers.tokenization_utils_tokenizers")
    gc.freeze()
    gc.enable()
    model_dir = resolve(plan) or _known_config(plan, run.path / "model")
    tokenizer = load_tokenizer(plan.recipe.model, model_dir)
    tokens = add_tokens(tokenizer, plan.recipe.adapter.train_tokens)
    for token in tokens:
        say(token.line())
    tokenizer_dir = run.path / "tokenizer"
    tokenizer.save_pretrained(tokenizer_dir)
    sets = prepare_data(plan.recipe, tokenizer, cache_root=data_cache_root(plan.recipe), show_progress=True)
    if tokens and sets["train"] is not None:  # a stream is not read before
        seen = open_rows(sets["train"]).seen([token.id for token in tokens])
        for token in tokens:
            if token.id not in seen:
                say(f"warning: adapter.train_tokens: {token.text!r} does not stand in the training data")
    Prepared(
        model_dir=model_dir,
        tokenizer_dir=tokenizer_dir.resolve(),
        identity=base_identity(plan, model_dir),
        pad_id=pad_id(tokenizer),
        train=sets["train"],
        eval=sets["eval"],
        tokens=tokens,
    ).write(run.path)


def _known_config(plan: Plan, folder: Path) -> Path | None:
    """For random weights of a hub id that lies nowhere here: a folder with the config that was planned with."""
    if plan.recipe.model.id is None:
        return None
    folder.mkdir(exist_ok=True)
    write_atomic(folder / "config.json", json.dumps(plan.base_config, indent=2, sort_keys=True) + "\n")
    return folder.resolve()


def base_identity(plan: Plan, model_dir: Path | None) -> dict[str, Any]:
    """Which frozen base this is: a checkpoint or adapter of another one is refused."""
    from decompft.launcher.worker.modelfiles import identity

    recipe = plan.recipe
    if model_dir is None:
        config = json.dumps(recipe.model.config, sort_keys=True)
        source: dict[str, Any] = {
            "config": recipe.model.config,
            "seed": recipe.train.seed,
            "sha256": hashlib.sha256(f"{config}:{recipe.train.seed}".encode()).hexdigest(),
        }
    else:
        source = {**identity(model_dir), "id": recipe.model.id, "revision": recipe.model.revision}
        if recipe.model.weights == "random":
            source |= {"weights": "random", "seed": recipe.train.seed}
    # a cache changes no number: with or without it, it is the same base
    quantization = recipe.quantization.model_dump(mode="json", exclude={"cache"})
    if not recipe.quantization.fp8_skip:
        del quantization["fp8_skip"]  # checkpoints from before this key have none
    return source | {"task": recipe.model.task, "quantization": quantization}


if __name__ == "__main__":
    run_tool(main, sys.argv[1:])
