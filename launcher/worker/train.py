"""The training loop, read top to bottom."""

from __future__ import annotations

import gc
import hashlib
import math
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields

import torch

from decompft.adapters.copies import round_factors
from decompft.adapters.inject import adapters
from decompft.launcher.checkpoints import SUSPECT_REASON
from decompft.launcher.errors import CheckpointError, RunFailed
from decompft.launcher.outcome import Outcome
from decompft.launcher.plan import Plan
from decompft.launcher.runs import RunDir
from decompft.launcher.worker.adamw import QuickAdamW
from decompft.launcher.worker.build import DTYPES, Built
from decompft.launcher.worker.checkpoint import Checkpoint
from decompft.launcher.worker.data.ahead import Ahead
from decompft.launcher.worker.data.batches import collate
from decompft.launcher.worker.data.feed import EvalData, TrainData
from decompft.launcher.worker.emergency import Emergency
from decompft.launcher.worker.engines.base import Engine
from decompft.launcher.worker.metrics import Metrics, StepRow
from decompft.launcher.worker.model import LossModel
from decompft.launcher.worker.optimizer import clip_gradients, make_optimizer, schedule, set_learning_rate
from decompft.launcher.worker.phases import Phases
from decompft.launcher.worker.proofs import prove_gradients, steps_to_prove
from decompft.launcher.worker.pulse import Pulse
from decompft.launcher.worker.recorded import make_passes
from decompft.launcher.worker.report import peak_bytes
from decompft.launcher.worker.retention import Retention
from decompft.launcher.worker.saver import Held, Saver
from decompft.launcher.worker.schedule import jump, position
from decompft.launcher.worker.startup import Startup
from decompft.launcher.worker.state import restore, slices


@dataclass(kw_only=True)
class Progress:
    """Where a run stands; all of it is in a checkpoint."""

    step: int = 0  # optimizer steps done
    trained_tokens: int = 0
    best_eval: float | None = None
    evals_without_gain: int = 0
    start_eval: float | None = None  # of the untouched base
    last_eval: float | None = None
    eval_step: int | None = None  # that of last_eval
    eval_due: bool = False  # a stop came first, or in the middle

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Progress:
        """
        Raises:
            CheckpointError: another version of decompft wrote it.
        """
        written = checkpoint.state["progress"]
        odd = sorted(written.keys() - {f.name for f in fields(cls)})
        if odd:
            raise CheckpointError(
                f"{checkpoint.path}: its state has {odd[0]!r}, which this version of decompft does not know",
                "resume with the version that wrote it",
            )
        return cls(**written)


def train(
    plan: Plan,
    built: Built,
    engine: Engine,
    data: TrainData,
    held_out: EvalData | None,
    run: RunDir,
    *,
    incarnation: int,
    resume: Checkpoint | None,
    metrics: Metrics,
    adapter_json: dict[str, object],
    data_key: str | None,
    pulse: Pulse,
    emergency: Emergency,
    startup: Startup,
) -> Outcome:
    """Train to the last step, or to an orderly stop.

    Raises:
        RunFailed: the loss is not finite, a trained tensor has no gradient, or the disk refuses.
    """
    recipe, batch_law = plan.recipe, plan.batch
    total = data.total_steps
    model, layers = built.model, list(adapters(built.model.model))
    optimizer = make_optimizer(built.model.model, built.trained, recipe.train, engine)
    factor = schedule(optimizer, recipe.train, total)
    parameters = list(built.trained.values())
    for _, adapter in layers:
        adapter.penalty_share = 1 / (batch_law.accumulation * engine.world_size)
    optimizer = engine.prepare_training(model, optimizer, parameters)
    rounded = round_factors(model.model, DTYPES[recipe.quantization.activations])
    phases = Phases(built, optimizer, engine, total_steps=total, seed=recipe.train.seed, say=metrics.message)
    to_prove = steps_to_prove(built)
    at = Progress()
    if resume is not None:
        requantized = restore(resume, built, optimizer, engine, phases.averages())
        if engine.any_rank(requantized > 0):
            metrics.message(
                "the 8-bit moments were saved with their rows cut otherwise: quantized again, so that the run goes on "
                "within their rounding, not bit for bit"
            )
        phases.resume(resume.step)
        at = Progress.of(resume)
        if jumps := jump(resume.state.get("schedule"), recipe.train, total, at.step):
            metrics.message(jumps)
    first = at.step
    passes = make_passes(plan, model, engine, parameters, pulse=pulse, say=metrics.message)

    row: StepRow | None = None  # of the last step, where that is logged

    def held(stands_in: bool) -> Held:
        return Held(
            step=at.step, slices=slices(built, optimizer, engine, phases.averages(), stands_in=stands_in),
            state={
                "progress": dict(vars(at)), "base": adapter_json["base"], "data": data_key, "strategy": plan.strategy,
                "schedule": position(recipe.train, data.total_steps, at.step),
                # rank 0 died with it, perhaps before it was written down
                **({"row": asdict(row)} if stands_in and row is not None else {}),
            },
            eval_loss=at.last_eval if at.eval_step == at.step else None,
        )  # fmt: skip

    keeping = recipe.checkpoint
    saver = Saver(
        run, engine, held, pulse, incarnation=incarnation, adapter_json=adapter_json,
        # a fork's checkpoint lies in another run: this one has none yet
        saved_step=at.step if resume is not None and resume.path.is_relative_to(run.path) else None,
        retention=Retention(newest=keeping.keep, best=keeping.keep_best, every_hours=keeping.keep_every_hours),
    )  # fmt: skip

    def tell() -> None:
        """What was saved in the background meanwhile."""
        for done in saver.news():
            emergency.note_save(done.save_s)
            path = str(done.path.relative_to(run.path))
            metrics.event(
                "save", step=done.step, path=path, save_s=done.save_s, stall_s=done.stall_s, bytes=done.bytes,
                reason=done.reason,
            )  # fmt: skip
            metrics.message(f"checkpoint at step {done.step}: {done.path}")

    stop_after = recipe.train.stop_after_steps
    stopped = stop_after is not None and at.step >= stop_after

    def asked() -> bool:
        return run.stop_file(incarnation).exists()

    def evaluation() -> bool:
        """Evaluate; True when training should stop early. A stop interrupts it: the resumed run does it first."""
        nonlocal stopped
        if held_out is None:
            return False
        at.eval_due = True
        pulse.at("evaluating", at.step)
        loss = evaluate(model, held_out, engine, pulse, asked)
        if loss is None:
            stopped = True
            return False
        metrics.evaluation(at.step, loss, num_tokens=held_out.num_targets)
        gained = at.best_eval is None or loss < at.best_eval
        at.best_eval = loss if gained else at.best_eval
        at.evals_without_gain = 0 if gained else at.evals_without_gain + 1
        at.start_eval = loss if at.step == 0 else at.start_eval
        at.last_eval, at.eval_step, at.eval_due = loss, at.step, False
        if gained and keeping.keep_best and at.step:
            saver.begin(at.step, "best")
        patience = recipe.train.early_stop_evals
        return patience is not None and at.evals_without_gain >= patience

    startup.done("optimizer")
    pulse.at("data", at.step)
    emergency.arm(saver)
    if (at.step == 0 or at.eval_due) and evaluation() and at.step < total:
        total = at.step  # the early stop that the interrupted evaluation would have been
    ahead = Ahead(
        data, first=at.step, last=total, world_size=engine.world_size, rank=engine.rank,
        micro=batch_law.micro_size, accumulation=batch_law.accumulation, pad_multiple=passes.pad_multiple,
        moved=lambda: pulse.at("data"),
    )  # fmt: skip
    startup.done("evaluation")
    model.train()
    gc.collect()
    gc.freeze()  # what was built stays: no collection during training need look at it again
    while at.step < total and not stopped:
        began = time.perf_counter()
        pulse.at("data", at.step)
        step = ahead.step(at.step)
        startup.done("first data")
        for _, adapter in layers:
            adapter.on_step(at.step)
        set_learning_rate(optimizer, factor(at.step))
        rounded.refresh()  # nothing writes to trained tensors from here to the last micro batch's end
        passes.begin_step()
        loss_sum = torch.zeros((), device=engine.device)
        num_tokens = 0
        if engine.device.type == "cpu":  # where a pass has ended when it returns
            ahead.read_on()
        for index, batch in enumerate(step.micro_batches):
            num_tokens += batch.num_tokens
            seed_step(recipe.train.seed, at.step, index, engine.rank)
            with engine.accumulate(last=index == len(step.micro_batches) - 1):
                loss_sum += passes.run(batch, max(step.num_targets_global, 1))
            ahead.read_on()
        rounded.drop()
        pulse.at("reducing")
        engine.reduce_gradients()
        if at.step in to_prove:
            prove_gradients(built, engine, at.step)
        norm = clip_gradients(layers, built.trained, engine, recipe.train.max_grad_norm)
        # the device is still busy: what the host does after this wait, the device waits for
        is_asked = asked()
        if isinstance(optimizer, QuickAdamW):
            optimizer.gather()
        loss_here, grad_norm = torch.stack([loss_sum.double(), norm]).tolist()
        # the one agreement of a step: loss, tokens, who was asked to stop, whose save failed or is not done
        loss_value, tokens, stops, writing, failed = engine.sum_ranks(
            [loss_here, num_tokens, float(is_asked), float(saver.writing), float(saver.failed)]
        )
        saver.check(failed > 0, writing > 0)
        tell()
        if not (math.isfinite(loss_value) and math.isfinite(grad_norm)):
            if at.step:
                saver.begin(at.step, SUSPECT_REASON)
                saver.finish()
                tell()
            raise not_finite(at.step + 1, loss_value, grad_norm, step.sample_ids, saver.begun)
        pulse.at("optimizer")
        with emergency.changing():
            phases.observe(at.step)
            optimizer.step()
            engine.zero_gradients(parameters)
            phases.advance(at.step)
            saver.settle()
            at.step += 1
            at.trained_tokens += step.num_targets_global
            is_logged = at.step % recipe.logging.every_steps == 0 or at.step == total
            step_s = time.perf_counter() - began
            row = StepRow(
                step=at.step, epoch=data.epoch_at(at.step), loss=loss_value,
                learning_rate=recipe.train.learning_rate * factor(at.step - 1), grad_norm=grad_norm,
                tokens_per_s=tokens / step_s, trained_tokens=step.num_targets_global,
                peak_mem_bytes=peak_bytes(engine.device), step_s=step_s,
                samples=zlib.crc32(repr(step.sample_ids).encode()),
            ) if is_logged else None  # fmt: skip
            pulse.at("logging", at.step)
        startup.done("first step")
        startup.tell(metrics, run, incarnation=incarnation, step=at.step)
        if row is not None:
            metrics.step(row)
        stopped = stops > 0 or at.step == stop_after
        every = recipe.train.eval_every_steps
        is_due = at.step == total or bool(every and at.step % every == 0)
        if is_due and stops > 0:
            at.eval_due = held_out is not None
        elif is_due:
            finish_early = evaluation()
            model.train()
            if finish_early and at.step < total:
                metrics.message(
                    f"stopping early: the evaluation loss has not improved {at.evals_without_gain} times"
                )
                total = at.step
        if not stopped and at.step < total and keeping.every_steps and at.step % keeping.every_steps == 0:
            saver.begin(at.step, "interval")
    ahead.close()
    # also where nothing was left to train: a run ends with a checkpoint of its own
    saver.begin(at.step, "end" if at.step == total else "stop")
    saver.finish()
    tell()
    emergency.disarm()
    if at.step < total or at.eval_due:
        message = f"stopped in order after step {at.step} of {total}"
        message += ", before its evaluation" if at.eval_due else ""
        return Outcome(result="checkpointed", step=at.step, message=message)
    if resume is None or at.step > first:
        done = f"finished after step {at.step}, {at.trained_tokens:,} trained tokens"
    else:
        end = f"the checkpoint is of step {at.step}, the run ends at step {data.total_steps}"
        done = f"nothing was left to train: {end}"
    return Outcome(result="finished", step=at.step, message=done + held_out_change(at))


def evaluate(
    model: LossModel, held_out: EvalData, engine: Engine, pulse: Pulse, asked: Callable[[], bool]
) -> float | None:
    """Mean loss per trained token of the held-out rows, over all ranks; None when some rank was asked to stop."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    with torch.no_grad():
        for rows in held_out.micro_batches(engine.world_size, engine.rank):
            pulse.at("evaluating")
            if engine.any_rank(asked()):
                return None
            total += engine.forward(model, collate(rows, held_out.pad_id).to(engine.device)).double()
    return engine.sum_ranks([total.item()])[0] / held_out.num_targets


def seed_step(seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Fix every random draw of one micro batch (dropout): a resumed run draws the same."""
    digest = hashlib.sha256(f"{seed}:{step}:{micro_batch}:{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def not_finite(step: int, loss: float, grad_norm: float, ids: Sequence[int], saved: int | None) -> RunFailed:
    """Stop before the optimizer sees it; parameters that were finite may have diverged all the same."""
    kept = "there is no checkpoint"
    if saved:
        kept = (
            f"the checkpoint of step {saved} has the state before it, marked as suspect: it may have diverged"
        )
    return RunFailed(
        f"step {step}: the loss is {loss} and the gradient norm {grad_norm}; "
        f"the optimizer step was not taken and {kept}"
        f" (samples {', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''})",
        "lower train.learning_rate, raise train.warmup_steps or lower train.max_grad_norm, which a fork may change "
        "(--resume CHECKPOINT --run-dir NEW); or look at those samples with: decompft inspect data",
    )


def held_out_change(at: Progress) -> str:
    """Only where this very step was evaluated."""
    if not at.start_eval or at.last_eval is None or not at.step or at.eval_step != at.step:
        return ""
    change = 100 * (at.last_eval / at.start_eval - 1)
    return f"; held-out loss {at.start_eval:.4f} -> {at.last_eval:.4f} ({change:+.1f} %)"
