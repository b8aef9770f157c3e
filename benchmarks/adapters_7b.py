"""What a training step of each method costs beside LoRA's: Llama-2-7B's shape, nf4, rank 16, one GPU, one process.

    python benchmarks/adapters_7b.py --out .bench/adapters-0.jsonl [--part 0/4]
    python benchmarks/adapters_7b.py --join .bench/adapters-*.jsonl --out benchmarks/results/adapters_7b.json

The base is built once; each method's adapters are put over the same frozen layers and timed on the same batch: hooks,
forward, backward, clipping and AdamW, until the loss is on the host; with --recorded likewise with passes recorded, as
under train.cuda_graph: true. LoRA runs first and last of each part. No
method starts as it would: trained tensors and what they need of the base (singular vectors, norms) are random, as a
step's time does not depend on their values, and 224 decompositions would take longer than all steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# as the launcher sets it; before torch is imported
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch  # noqa: E402
from dense_tensors import dense_tensors  # noqa: E402
from scoreboard_cases import ALPHA, RANK, REFERENCE, Case, cases  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from trial import Trial, prepare, random_batch  # noqa: E402

from decompft.adapters.copies import round_factors  # noqa: E402
from decompft.adapters.inject import adapters, make_adapter  # noqa: E402
from decompft.adapters.spec import ADAPTER_SPECS, AdapterConfig  # noqa: E402
from decompft.launcher.planner import make  # noqa: E402
from decompft.launcher.recipe import AdapterSection  # noqa: E402
from decompft.launcher.source import load  # noqa: E402
from decompft.launcher.worker.build import DTYPES  # noqa: E402
from decompft.launcher.worker.engines.choose import make_engine  # noqa: E402
from decompft.launcher.worker.graph_recorder import CudaRecorder, Recorder  # noqa: E402
from decompft.launcher.worker.joining import join_linears  # noqa: E402
from decompft.launcher.worker.liger import keep_outputs  # noqa: E402
from decompft.launcher.worker.optimizer import clip_gradients, make_optimizer  # noqa: E402
from decompft.launcher.worker.pulse import Pulse  # noqa: E402
from decompft.launcher.worker.recorded import Passes, PlainPasses, RecordedPasses  # noqa: E402

RECIPE = Path(__file__).resolve().parent / "llama7b_shape.yaml"
LATE = 1_000_000  # a step after every phase switch
NOTE = (
    "trained tensors and factors of the base are random (unit columns): a step's time does not depend on their "
    f"values; rank {RANK} for every method; methods with phases are timed after their last switch"
)


def main(
    argv: Sequence[str] | None = None, *, recorder: Callable[[nn.Module], Recorder] | None = None
) -> None:
    """`recorder`: instead of CUDA's, in a test."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", default="0/1", help="k/n: every n-th case from the k-th on")
    parser.add_argument("--micro", nargs="*", type=int, default=[4, 8])
    parser.add_argument("--steps", type=int, default=5, help="measured, after two")
    parser.add_argument("--recorded", action="store_true", help="passes recorded, too")
    parser.add_argument("--cases", nargs="*", help="names; default all")
    parser.add_argument("--override", nargs="*", default=[], help="KEY=VALUE of the recipe, for trials")
    parser.add_argument(
        "--join", nargs="*", type=Path, help="parts to make one table of; nothing is measured"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.join is not None:
        args.out.write_text(json.dumps(join(args.join), indent=1, sort_keys=True) + "\n")
        return
    part, parts = map(int, args.part.split("/"))
    named = {case.name: case for case in cases()}
    others = [c for n, c in named.items() if n != REFERENCE and (not args.cases or n in args.cases)][
        part::parts
    ]
    bench = Bench(args.override, recorder)
    with args.out.open("w") as file:
        for place, case in enumerate((named[REFERENCE], *others, named[REFERENCE])):
            for row in bench.measure(case, args.micro, args.steps, recorded=args.recorded):
                row |= {"part": part, "place": place}
                print(json.dumps(row), flush=True)
                file.write(json.dumps(row) + "\n")
                file.flush()


class Bench:
    """A model whose adapters are exchanged."""

    def __init__(self, overrides: list[str], recorder: Callable[[nn.Module], Recorder] | None = None) -> None:
        fixed = [
            "adapter.method=lora",
            "train.recompute=none",
            "parallel.strategy=single",
            "parallel.gpus_per_node=1",
        ]
        self.plan = make(load(RECIPE, [*fixed, *overrides]))
        engine = make_engine(self.plan)
        engine.start()
        self.trial: Trial = prepare(self.plan, engine)
        self.engine, self.model = engine, self.trial.built.model
        self.on_gpu = engine.device.type == "cuda"
        self._recorder = recorder or (lambda model: CudaRecorder(engine.device))

    def measure(
        self, case: Case, micros: Sequence[int], steps: int, *, recorded: bool = False
    ) -> list[dict[str, Any]]:
        """A row a micro batch, and one more with passes recorded; one with `error` when the method does not run."""
        began = time.perf_counter()
        row: dict[str, Any] = {"case": case.name, "method": case.method, "options": case.options}
        rows: list[dict[str, Any]] = []
        try:
            self.swap(case)
            facts = {
                "device": torch.cuda.get_device_name() if self.on_gpu else "cpu", "rank": RANK,
                "num_params": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
                **{f"dense_{k}": v for k, v in asdict(self.count()).items()},
            }  # fmt: skip
            for micro in micros:
                start = {
                    n: p.detach().to("cpu", copy=True)
                    for n, p in self.model.named_parameters()
                    if p.requires_grad
                }
                for is_recorded in (False, True) if recorded else (False,):
                    self.model.load_state_dict(start, strict=False)
                    found = self.time(micro, steps, is_recorded=is_recorded)
                    rows.append({**row, **facts, "micro_batch": micro, "is_recorded": is_recorded, **found})
        except (Exception, torch.OutOfMemoryError) as error:
            rows.append({**row, "error": f"{type(error).__name__}: {error}"[:2000]})
        self.trial.engine.zero_gradients(list(self.model.parameters()))
        return [r | {"seconds": round(time.perf_counter() - began, 1)} for r in rows]

    def swap(self, case: Case) -> None:
        """The case's adapters over the frozen layers that are there."""
        section = AdapterSection(method=case.method, rank=RANK, alpha=ALPHA, options=case.options)
        config = AdapterConfig(
            method=case.method, rank=RANK, alpha=ALPHA, dropout=0.0, options=section.typed_options()
        )
        layers = list(adapters(self.model))
        for name, old in layers:
            for tensor in (*old.parameters(recurse=False), *old.buffers(recurse=False)):
                tensor.data = torch.empty(0)  # before the next method's are made
            with self.engine.device:
                new = make_adapter(old.base, config)
            new.num_siblings = len(layers)
            new.penalty_share = 1.0
            fill(new)
            self.model.set_submodule(name, new)
        join_linears(self.model.model, self.engine)
        keep_outputs(ADAPTER_SPECS[case.method].keeps_output(config))
        self.model.train()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def count(self) -> Any:
        """On the widest layer."""
        layer = max(
            (a for _, a in adapters(self.model)), key=lambda a: a.base.out_features * a.base.in_features
        )
        layer.on_step(LATE)
        return dense_tensors(layer, torch.bfloat16 if self.on_gpu else torch.float32)

    def passes(self, trained: Sequence[nn.Parameter], *, is_recorded: bool) -> Passes:
        if not is_recorded:
            return PlainPasses(self.model, self.engine, Pulse())
        return RecordedPasses(
            self.model, self.engine, trained, self._recorder(self.model),
            pulse=Pulse(), say=print, is_demanded=True, pad_multiple=PlainPasses.pad_multiple, adds=False,
        )  # fmt: skip

    def time(self, micro: int, steps: int, *, is_recorded: bool) -> dict[str, Any]:
        recipe, layers = self.plan.recipe, list(adapters(self.model))
        length = recipe.data.sequence_length
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        optimizer = make_optimizer(self.model, trained, recipe.train, self.engine)
        batch = random_batch(micro, length).to(self.engine.device)
        passes = self.passes(list(trained.values()), is_recorded=is_recorded)
        rounded = round_factors(self.model.model, DTYPES[recipe.quantization.activations])

        def step(number: int) -> float:
            for _, adapter in layers:
                adapter.on_step(LATE + number)
            rounded.refresh()
            passes.begin_step()
            loss = passes.run(batch, batch.num_targets)
            rounded.drop()
            clip_gradients(layers, trained, self.engine, recipe.train.max_grad_norm)
            optimizer.step()
            self.engine.zero_gradients(list(trained.values()))
            return loss.item()

        seconds = []
        for number in range(2 + steps):
            if number == 2 and self.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            value = step(number)
            if self.on_gpu:  # the step's last launches too
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        found = {
            "step_s": statistics.median(seconds[2:]), "steps_s": [round(s, 5) for s in seconds], "loss": value,
            "tokens_per_s": round(micro * length / statistics.median(seconds[2:])),
            "peak_bytes": torch.cuda.max_memory_allocated() if self.on_gpu else None,
        }  # fmt: skip
        # a replay's kernels are those of the plain pass
        return found | (kernels(lambda: step(2 + steps)) if self.on_gpu and not is_recorded else {})


def kernels(step: Callable[[], float]) -> dict[str, Any]:
    """What the GPU does in one more step: seconds busy, launches, and the ten kernels that take longest."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    found = [e for e in trace.key_averages() if e.self_device_time_total > 0]  # not the runtime's own calls
    every = sorted(found, key=lambda e: -e.self_device_time_total)
    return {
        "gpu_busy_s": round(sum(e.self_device_time_total for e in every) / 1e6, 5),
        "launches": sum(e.count for e in every),
        "kernels": [[e.key[:90], round(e.self_device_time_total / 1e3, 2), e.count] for e in every[:10]],
    }


def fill(adapter: nn.Module) -> None:
    """Matrices with columns (of a wide one: rows) of length 1, a hundredth of it if they train; vectors of ones."""
    draw = torch.Generator(next(adapter.parameters()).device).manual_seed(0)
    with torch.no_grad():
        for tensor in (*adapter.parameters(recurse=False), *adapter.buffers(recurse=False)):
            if tensor.dim() < 2:
                tensor.fill_(1.0)
                continue
            values: Tensor = tensor.normal_(generator=draw)
            values /= max(values.shape) ** 0.5 * (100 if tensor.requires_grad else 1)


def join(paths: Sequence[Path]) -> dict[str, Any]:
    """One table: each row beside LoRA's of its own part, micro batch and kind, the median of before and after."""
    rows = [json.loads(line) for path in sorted(paths) for line in path.read_text().splitlines()]
    table = []
    for row in rows:
        if "error" not in row:
            mine = [
                r for r in rows
                if r["case"] == REFERENCE
                and all(r.get(k) == row.get(k) for k in ("micro_batch", "is_recorded", "part"))
            ]  # fmt: skip
            reference = statistics.median(r["step_s"] for r in mine)
            row["step_over_lora"] = round(row["step_s"] / reference, 4)
            if row["peak_bytes"]:
                row["peak_over_lora"] = round(row["peak_bytes"] / min(r["peak_bytes"] for r in mine), 4)
        row["is_reading"] = ADAPTER_SPECS[row["method"]].is_reading
        table.append(row)
    table.sort(key=lambda r: (r.get("micro_batch", 0), r["case"], r["part"], r["place"]))
    return {"note": NOTE, "rows": table}


if __name__ == "__main__":
    main()
