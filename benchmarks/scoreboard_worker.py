"""A process that runs cells of the scoreboard one after the other, as the driver hands them over.

Reads one order (JSON) a line, writes the cell's row (JSON) a line. One process for many cells, because importing
torch and transformers and tokenizing the test files cost more than a short cell does.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shutil
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    # libraries print where they like: only rows go to the driver
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    scorer = Scorer()
    for line in sys.stdin:
        order = json.loads(line)
        row = run(order, scorer)
        answers.write(json.dumps(row) + "\n")
        answers.flush()
        if row["ended"] == "error":
            sys.exit(1)  # whatever it was, the next cell starts in a process that knows nothing of it


def run(order: dict[str, Any], scorer: Scorer) -> Row:
    """The cell's row; it never raises."""
    import torch

    from decompft.launcher.errors import DecompftError

    began = time.perf_counter()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    row: Row = {**order["row"], "device": device}
    try:
        found = measure_base(order, scorer) if row["kind"] == "base" else measure(order, scorer)
        row |= {"ended": "ok", **found}
    except DecompftError as error:  # refused, or it diverged: that is a result
        row |= {"ended": "failed", "message": str(error)}
    except Exception:
        row |= {"ended": "error", "message": traceback.format_exc()[-3000:]}
    shutil.rmtree(order["run"], ignore_errors=True)
    _forget()
    return row | {"seconds": round(time.perf_counter() - began, 2)}


def measure(order: dict[str, Any], scorer: Scorer) -> Row:
    """Train as `decompft launch` does, from the plan on, in this process; then score the adapter's own file."""
    import torch

    from decompft.launcher.planner import make
    from decompft.launcher.runs import RunDir
    from decompft.launcher.source import load
    from decompft.launcher.worker.inference import load as load_adapter
    from decompft.launcher.worker.main import Rank, run_rank
    from decompft.launcher.worker.tools import prepare

    shutil.rmtree(order["run"], ignore_errors=True)
    plan = make(load(Path(order["recipe"]), order["overrides"]))
    run = RunDir.create(Path(order["run"]), recipe_text="", plan=plan)
    prepare.main([str(run.path)])
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with (run.path / "screen").open("w") as screen:
        run_rank(Rank(run=run, incarnation=run.next_incarnation(), resume=None, rank=0, stream=screen))
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    rows = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    steady = rows[-max(1, len(rows) // 3) :]  # after warm-up, and after the switches of phased methods
    found: Row = {
        "steps": len(rows), "loss_first": rows[0]["loss"],
        "loss_last_tenth": statistics.fmean(r["loss"] for r in rows[-max(1, len(rows) // 10) :]),
        "step_s": statistics.median(r["step_s"] for r in steady), "train_s": round(sum(r["step_s"] for r in rows), 2),
        "peak_bytes": peak, "num_params": plan.num_adapter_params + plan.num_module_params,
        "file_bytes": (run.path / "adapter" / "adapter.safetensors").stat().st_size,
    }  # fmt: skip
    if order["score"]:
        _forget()  # the trained model, before its adapter is loaded over another copy of the base
        loaded = load_adapter(run.path / "adapter", base=None, say=lambda line: None)
        found |= scorer.score(loaded, order)
    return found


def prepare_data(order: dict[str, Any]) -> None:
    """Convert the model and tokenize the training records, as the cell would: whoever comes next finds it done."""
    from decompft.launcher.planner import make
    from decompft.launcher.runs import RunDir
    from decompft.launcher.source import load
    from decompft.launcher.worker.tools import prepare

    shutil.rmtree(order["run"], ignore_errors=True)
    plan = make(load(Path(order["recipe"]), order["overrides"]))
    run = RunDir.create(Path(order["run"]), recipe_text="", plan=plan)
    prepare.main([str(run.path)])
    shutil.rmtree(order["run"])


def measure_base(order: dict[str, Any], scorer: Scorer) -> Row:
    """The untouched model in the recipe's format."""
    import torch

    from decompft.launcher.planner import make
    from decompft.launcher.source import load
    from decompft.launcher.worker.build import build
    from decompft.launcher.worker.engines.base import Engine
    from decompft.launcher.worker.inference import Loaded
    from decompft.launcher.worker.modelfiles import resolve
    from decompft.launcher.worker.tokenizers import load_tokenizer

    plan = make(load(Path(order["recipe"]), order["overrides"]))
    recipe, model_dir = plan.recipe, resolve(plan)
    engine = Engine(torch.device("cuda" if plan.world.device == "cuda" else "cpu"), timeout_s=60)
    built = build(
        recipe.model,
        recipe.quantization,
        None,
        engine,
        seed=recipe.train.seed,
        model_dir=model_dir,
        recompute="none",
    )
    loaded = Loaded(
        model=built.model.eval(), tokenizer=load_tokenizer(recipe.model, model_dir), device=engine.device,
        model_dir=model_dir, formats=(),
    )  # fmt: skip
    return scorer.score(loaded, order) | {"most_frequent": scorer.most_frequent(order)}


class Scorer:
    """Scores files by label likelihood, as `decompft eval` does; tokenizes a file once a process."""

    def __init__(self) -> None:
        self._questions: dict[tuple[str, int | None], list[Any]] = {}
        self._rows: dict[tuple[str, int | None], tuple[list[Any], list[int]]] = {}

    def score(self, loaded: Any, order: dict[str, Any]) -> Row:
        """Accuracy and label loss by file and their means.

        The label loss is the mean of -log p(answer) with p normalised over the record's labels: what a
        held-out loss is where only labels count, and less coarse than accuracy.
        """
        from decompft.launcher.worker.scoring import best_label

        accuracy: dict[str, float] = {}
        loss: dict[str, float] = {}
        for path in order["score"]:
            questions = self._read(path, order["limit"])
            scores = self._likelihoods(loaded, path, order["limit"])
            name = Path(path).stem.rpartition("_")[0]
            pairs = list(zip(questions, scores, strict=True))
            accuracy[name] = statistics.fmean(best_label(q, s) == q.answer for q, s in pairs)
            loss[name] = statistics.fmean(_label_loss(s, q.labels.index(q.answer)) for q, s in pairs)
        mean_loss = statistics.fmean(loss.values())
        if order["row"]["kind"] == "search":
            return {"held_out_accuracy": statistics.fmean(accuracy.values()), "held_out_loss": mean_loss}
        return {
            "accuracy": accuracy | {"mean": statistics.fmean(accuracy.values())},
            "label_loss": loss | {"mean": mean_loss},
        }

    def most_frequent(self, order: dict[str, Any]) -> dict[str, float]:
        """What always saying each file's most frequent answer would score: the bar that learning must pass."""
        found = {}
        for path in order["score"]:
            answers = [q.answer for q in self._read(path, order["limit"])]
            found[Path(path).stem.rpartition("_")[0]] = max(map(answers.count, set(answers))) / len(answers)
        return found | {"mean": statistics.fmean(found.values())}

    def _read(self, path: str, limit: int | None) -> list[Any]:
        from decompft.launcher.worker.scoring import read_questions

        if (path, limit) not in self._questions:
            self._questions[path, limit] = read_questions(path, limit)[0]
        return self._questions[path, limit]

    def _likelihoods(self, loaded: Any, path: str, limit: int | None) -> list[list[float]]:
        # scoring.likelihoods with its first line remembered: tokenizing the four files takes 8 s of a cell
        import torch

        from decompft.launcher.worker import scoring

        if (path, limit) not in self._rows:
            self._rows[path, limit] = scoring._rows(loaded, self._read(path, limit))
        rows, starts = self._rows[path, limit]
        totals = torch.zeros(starts[-1], dtype=torch.float64)
        with torch.inference_mode():
            for batch in scoring._batches(rows, lambda row: len(row.tokens), loaded, None):
                values, labels = scoring._read(loaded, batch)
                totals.index_add_(0, labels, values.double().cpu())
        return [totals[first:last].tolist() for first, last in zip(starts, starts[1:], strict=False)]


def _label_loss(scores: list[float], answer: int) -> float:
    top = max(scores)
    return top + math.log(sum(math.exp(s - top) for s in scores)) - scores[answer]


def _forget() -> None:
    """Free what the last model held; the training loop has frozen it out of the collector's sight."""
    import torch

    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
