"""One rank of a run: plan.json -> process group -> build -> train -> outcome."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from decompft.launcher.errors import CheckpointError, DecompftError, UserError
from decompft.launcher.outcome import Outcome, Result, write_outcome, write_rank
from decompft.launcher.runs import RunDir
from decompft.launcher.worker.emergency import Emergency
from decompft.launcher.worker.loaded import Loaded, size_text
from decompft.launcher.worker.pulse import Pulse
from decompft.launcher.worker.quiet import quiet_imports
from decompft.launcher.worker.startup import Startup, imported, without_collecting
from decompft.launcher.worker.watchdog import Watchdog

if TYPE_CHECKING:
    from decompft.launcher.hangs import Hang
    from decompft.launcher.plan import Plan
    from decompft.launcher.worker.metrics import Metrics
    from decompft.launcher.worker.prepared import Prepared
    from decompft.launcher.worker.restore import Checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Who this process is."""

    run: RunDir
    incarnation: int
    resume: Path | None
    rank: int
    stream: TextIO  # what a person sees of this rank
    pulse: Pulse = field(default_factory=Pulse)
    startup: Startup = field(default_factory=Startup)
    emergency: Emergency | None = None  # where nobody asks this process to stop: a benchmark


def main() -> None:
    """Entry of every rank, started by torchrun or, when alone, directly."""
    parser = argparse.ArgumentParser(prog="decompft.launcher.worker.main")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--incarnation", type=int, required=True)
    parser.add_argument("--resume", type=Path)
    args = parser.parse_args()
    run, rank = RunDir.open(args.run_dir), int(os.environ.get("RANK", "0"))
    stream = _redirect(run.rank_log(args.incarnation, rank), show=rank == 0)
    pulse = Pulse()
    emergency = Emergency(
        run, args.incarnation, rank=rank, world_size=int(os.environ.get("WORLD_SIZE", "1")), pulse=pulse,
        resumed_from=args.resume,
    )  # fmt: skip
    this = Rank(
        run=run, incarnation=args.incarnation, resume=args.resume, rank=rank, stream=stream, pulse=pulse,
        emergency=emergency,
    )  # fmt: skip
    folder = run.incarnation_dir(args.incarnation)
    emergency.start()
    _stop_in_order_on_sigterm(run.stop_file(args.incarnation), emergency)
    try:
        outcome = run_rank(this)
        if rank == 0:
            write_outcome(folder, outcome)
            _show(outcome.message, stream)
    except Exception as error:  # the one place that records a failure; the launcher puts it into words
        emergency.stand_aside()
        hint = error.hint if isinstance(error, DecompftError) else ""
        message = error.message if isinstance(error, DecompftError) else f"{type(error).__name__}: {error}"
        result: Result = "user_error" if isinstance(error, UserError) else "failed"
        outcome = Outcome(
            result=result, step=pulse.beat.step, message=message, hint=hint, rank=rank, time_s=time.time(),
            node=platform.node(), traceback=traceback.format_exc(),
        )  # fmt: skip
        try:
            write_rank(folder, rank, outcome)
        except OSError as full:  # the log may still take what the folder does not
            logger.error("rank %d could not leave word: %s", rank, full)
        # a foreseen error is said in words; its traceback is in rank-K.json
        logger.error("rank %d failed: %s", rank, error, exc_info=not isinstance(error, DecompftError))
        emergency.call("failed", f"rank {rank}: {message}")
        # without unwinding: a collective that other ranks still wait in must not hang this exit
        os._exit(error.exit_code if isinstance(error, DecompftError) else 3)


def run_rank(this: Rank) -> Outcome:
    """Build and train on this rank."""
    plan = this.run.read_plan()
    # torch and transformers: seconds of import, and only now is it known that the plan can be read
    without_collecting()
    import torch

    from decompft.adapters.inject import remarks
    from decompft.launcher.worker.build import build, count_trained
    from decompft.launcher.worker.checkpoint import open_checkpoint, save_adapter
    from decompft.launcher.worker.data.feed import open_eval, open_train
    from decompft.launcher.worker.description import describe
    from decompft.launcher.worker.engines.choose import make_engine
    from decompft.launcher.worker.metrics import Metrics
    from decompft.launcher.worker.prepared import Prepared
    from decompft.launcher.worker.report import peak_memory
    from decompft.launcher.worker.state import whole_tensors
    from decompft.launcher.worker.train import train
    from decompft.launcher.worker.warmup import warm_up

    imported()
    this.startup.done("imports")
    began = time.perf_counter()
    recipe = plan.recipe
    prepared = Prepared.read(this.run.path)
    emergency = this.emergency or Emergency(
        this.run, this.incarnation, rank=this.rank, world_size=1, pulse=this.pulse, resumed_from=this.resume
    )
    emergency.grace_s = recipe.checkpoint.grace_s
    watchdog = _watchdog(this, plan, emergency)
    watchdog.start()
    engine = make_engine(plan)
    if engine.world_size != plan.world.size:
        raise UserError(
            f"the plan is for {plan.world.size} ranks, {engine.world_size} were started", "launch again"
        )
    engine.start()
    this.startup.done("group")
    if recipe.train.deterministic:
        torch.use_deterministic_algorithms(True)
        # a help in search of bugs, at the price of writing all new memory
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    data = open_train(recipe, prepared)
    held_out = open_eval(recipe, prepared, plan.batch.micro_size)
    resume = None if this.resume is None else open_checkpoint(this.resume)
    adapter_json = describe(plan, prepared)
    if resume is not None:
        _same_base(resume.state["base"], prepared.identity, this.resume)
        _same_data(resume, prepared, this)
    this.startup.done("data")
    warm_up(engine)
    this.startup.done("warm-up")
    this.pulse.at("loading")
    built = build(
        recipe.model, recipe.quantization, recipe.adapter, engine, seed=recipe.train.seed,
        model_dir=prepared.model_dir, recompute=plan.recompute, recompute_blocks=plan.recompute_blocks,
        tokens=prepared.tokens,
        base_hash=prepared.identity["sha256"], progress=_loading(this),
        known=None if resume is None else lambda name: resume.read(name, "param"),
        factor_progress=_loading(this, "factors of weights"),
    )  # fmt: skip
    this.startup.done("base")
    with Metrics(
        this.run.path, rank=engine.rank, incarnation=this.incarnation, logging=recipe.logging,
        start_step=0 if resume is None else resume.step,
        start_row=None if resume is None else resume.state.get("row"),
        total_steps=data.total_steps, stream=this.stream,
    ) as metrics:  # fmt: skip
        _report_loading(built.loaded, metrics, step=0 if resume is None else resume.step)
        metrics.message(
            f"{plan.strategy} on {engine.world_size} x {engine.device.type}; {len(built.adapted)} layers adapted, "
            f"{count_trained(built.trained):,} trained numbers; kernels: {built.kernels}; "
            f"ready after {time.perf_counter() - began:.1f} s"
        )
        for remark in remarks(built.model.model):
            metrics.message(remark)
        outcome = train(
            plan, built, engine, data, held_out, this.run, incarnation=this.incarnation,
            resume=resume, metrics=metrics, adapter_json=adapter_json, data_key=prepared.data_key,
            pulse=this.pulse, emergency=emergency, startup=this.startup,
        )  # fmt: skip
        peak = peak_memory(plan, engine)
        metrics.message(peak.line())
        metrics.event("memory", step=outcome.step, **asdict(peak))
        if outcome.result == "finished" and engine.rank == 0:
            newest = open_checkpoint(this.run.checkpoints_dir / f"step-{outcome.step:08d}")
            save_adapter(
                this.run.path / "adapter", whole_tensors(newest), adapter_json | {"step": newest.step},
                tokenizer=prepared.tokenizer_dir,
            )  # fmt: skip
            metrics.message(f"adapter: {this.run.path / 'adapter'}")
    engine.barrier()
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    # only in order: after a failure, leaving the group may wait for ranks that wait for this one
    engine.stop()
    watchdog.stop()
    return outcome


def _watchdog(this: Rank, plan: Plan, emergency: Emergency) -> Watchdog:
    """Ends this process when the run hangs, after saving what can be; find_failure reads who was behind."""

    def end(hang: Hang) -> None:
        emergency.call("hang", hang.words)
        os._exit(3)

    return Watchdog(
        this.pulse, this.run.incarnation_dir(this.incarnation), rank=this.rank, world_size=plan.world.size,
        hang_s=plan.recipe.parallel.hang_s, timeout_s=plan.recipe.parallel.timeout_s, on_hang=end,
        say=lambda line: _show(line, this.stream),
    )  # fmt: skip


def _report_loading(loaded: Loaded, metrics: Metrics, *, step: int) -> None:
    """A line and an event; nothing to say of random weights, which no file holds."""
    if loaded.warning:
        logger.warning(loaded.warning)
        metrics.message(f"warning: {loaded.warning}")
    if loaded.line():
        metrics.message(loaded.line())
    metrics.event("load", step=step, **loaded.fields())


def _same_base(saved: dict[str, Any], now: dict[str, Any], path: Path | None) -> None:
    """Refuse a checkpoint that was trained over another frozen base; the hash decides, not the place."""
    keys = (saved.keys() | now.keys()) - {"source", "revision", "id"}
    differing = sorted(k for k in keys if saved.get(k) != now.get(k))
    if differing:
        key = differing[0]
        raise CheckpointError(
            f"{path}: was trained over another base: {key} was {saved.get(key)!r}, now {now.get(key)!r}",
            "give the model and quantization that it was trained with, or start a new run with --run-dir DIR",
        )


def _same_data(resume: Checkpoint, prepared: Prepared, this: Rank) -> None:
    """Refuse to go on with other rows: some would be seen twice, others never. A fork may."""
    before, now = resume.state.get("data"), prepared.data_key
    if before is None or before == now:
        return
    words = "the training or evaluation data, the tokenizer, or decompft's way to cut rows has changed since"
    if not resume.path.is_relative_to(this.run.path):
        logger.warning("%s: %s", resume.path, words)
        return
    raise CheckpointError(
        f"{resume.path}: {words}",
        "put the data back as they were; or fork: --resume RUN --run-dir NEW goes on from there with these",
    )


def _loading(this: Rank, what: str = "") -> Any:
    """Progress on rank 0: a line every tenth, and nothing for what takes no time.

    Args:
        what: that is counted, one by one; default the bytes of the base.
    """
    began, shown = time.monotonic(), [0]

    def progress(done: int, total: int) -> None:
        this.pulse.at("loading")
        tenth = 10 * done // max(total, 1)
        if this.rank == 0 and tenth > shown[0] and time.monotonic() - began > 2:
            shown[0] = tenth
            line = (
                f"{what}: {done} of {total}"
                if what
                else f"loading the base: {10 * tenth} % of {size_text(total)}"
            )
            _show(line, this.stream)

    return progress


def _stop_in_order_on_sigterm(stop_file: Path, emergency: Emergency) -> None:
    """Let SIGTERM ask every rank to save and stop, as the launcher does; no rank can save alone.

    A scheduler sends it to some or all ranks. torchrun sends it to the survivors of a dead rank, which must
    go: once what can be saved is saved, at once if the dead one left word and nothing is being saved, else when
    the next collective fails or torchrun loses patience.
    """

    def on_sigterm(number: int, _frame: FrameType | None) -> None:
        try:
            if emergency.outlasts_sigterm():
                return
            has_failed_peer = any(stop_file.parent.glob("rank-*.json"))
            if not has_failed_peer:
                stop_file.touch()
                return
        except OSError:
            pass  # a full disk: nothing can be saved either
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, on_sigterm)


def _show(line: str, stream: TextIO) -> None:
    try:
        print(line, file=stream, flush=True)
    except OSError:
        pass  # the terminal is gone; the log has what matters


def _redirect(log: Path, *, show: bool) -> TextIO:
    """Send what this process prints into its log; returns the stream that a person sees."""
    log.parent.mkdir(parents=True, exist_ok=True)
    seen = os.fdopen(os.dup(1), "w", encoding="utf-8") if show else open(os.devnull, "w")
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    quiet_imports()
    return seen


if __name__ == "__main__":
    main()
