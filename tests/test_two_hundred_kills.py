"""A run of two ranks is killed at 200 random points and loses nothing that was saved."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tiny import CPU
from victim import IN_SAVE, PLACES, ROTATION, Aim, Victim, rows
from workers import run_worker

from decompft.launcher import planner, source
from decompft.launcher.checkpoints import find_problem, list_checkpoints, newest_valid, put_back, step_of
from decompft.launcher.plan import Plan
from decompft.launcher.resume import choose_start
from decompft.launcher.runs import RunDir
from decompft.launcher.worker.restore import load_adapter
from decompft.launcher.worker.tools import prepare

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny_map.yaml"
SEED = 5
KILLS, MOST_KILLS = 200, 300  # a kill that misses its window counts where it fell, and another is aimed
IN_A_SAVE, IN_ROTATION = 100, 30
NOTE = "damaged by the test"
DAMAGED = 10  # newest checkpoints that a disk which lied about fsync would have left
EVERY = 1  # steps between saves
# a step more may be lost while its save is being written beside training
MOST_LOST = 2 * EVERY
OVERRIDES = (
    "parallel.strategy=fsdp", "parallel.gpus_per_node=2",  # each rank writes slices of its own
    f"checkpoint.every_steps={EVERY}",
    "model.config.num_hidden_layers=1", "train.micro_batch_size=2", "logging.tensorboard=false",
    # the number of steps is known only when all kills are done
    "train.schedule=constant_with_warmup",
)  # fmt: skip
FOREVER = 100_000  # steps


@dataclass
class Ledger:
    """What the disk has promised so far."""

    floor: int = 0  # step of the newest checkpoint that was ever in place
    losses: dict[int, float] = field(default_factory=dict)  # of every step that was ever logged
    fell: Counter[str] = field(default_factory=Counter)
    lost: Counter[int] = field(default_factory=Counter)  # steps to do again
    damaged: Counter[str] = field(default_factory=Counter)


def test_two_hundred_kills_lose_nothing_that_was_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began, chance, ledger = time.monotonic(), random.Random(SEED), Ledger()
    run = RunDir.create(tmp_path / "run", recipe_text=RECIPE.read_text(), plan=plan(tmp_path, keep=1))
    prepare.main([str(run.path)])
    while (kills := sum(ledger.fell.values())) < KILLS or not has_quotas(ledger):
        assert kills < MOST_KILLS, f"quotas not met:\n{histogram(ledger, time.monotonic() - began)}"
        # two of them leave an older checkpoint to fall back to
        checkpoint = resume(run, plan(tmp_path, keep=chance.choice((1, 1, 2))), ledger, chance)
        victim = Victim(run, checkpoint, ignore=[folder.name for folder in sort(run)[1]])
        place = victim.kill_at(draw(chance, ledger, run))
        ledger.fell[place] += 1
        check(victim, ledger, place)
    last = ledger.floor + 5
    checkpoint = resume(run, plan(tmp_path, keep=1, max_steps=last), ledger, chance)
    assert run_worker(run, resume=checkpoint).outcome.result == "finished"
    with capsys.disabled():
        print(f"\n{histogram(ledger, time.monotonic() - began)}")

    unbroken = RunDir.create(
        tmp_path / "unbroken", recipe_text=RECIPE.read_text(), plan=plan(tmp_path, keep=1, max_steps=last)
    )
    prepare.main([str(unbroken.path)])
    assert run_worker(unbroken).outcome.result == "finished"
    expected = {row["step"]: row["loss"] for row in rows(unbroken.metrics_path)}
    assert sorted(expected) == list(range(1, last + 1)) and len(set(expected.values())) > last // 2
    assert {row["step"]: row["loss"] for row in rows(run.metrics_path)} == expected
    # the steps that were lost, too
    assert all(loss == expected[step] for step, loss in ledger.losses.items())
    assert_same_adapter(run, unbroken)
    assert [p.name for p in run.checkpoints_dir.iterdir()] == [f"step-{last:08d}"]


def plan(folder: Path, *, keep: int, max_steps: int = FOREVER) -> Plan:
    changes = (f"checkpoint.keep={keep}", f"train.max_steps={max_steps}", f"data.cache_dir={folder}/cache")
    return planner.make(source.load(RECIPE, (*OVERRIDES, *changes)), machine=CPU)


def resume(run: RunDir, new: Plan, ledger: Ledger, chance: random.Random) -> Path | None:
    """As `launch --resume auto`, whose words must be right; sometimes the newest checkpoint is damaged first."""
    good, spoilt = sort(run)
    if len(good) > 1 and not spoilt and sum(ledger.damaged.values()) < DAMAGED and chance.random() < 0.3:
        ledger.damaged[damage(good[-1], chance)] += 1
        ledger.floor = step_of(good[-2])
    put_back(run.checkpoints_dir)  # a replacement that was cut short is undone, as by a launch
    start = choose_start(new, run_dir=run.path, resume="auto")
    good, spoilt = sort(run)
    assert start.checkpoint == (good[-1] if good else None)
    *skipped, last = start.notes
    if good:
        assert last == f"resuming from {good[-1]}"
        assert_told(skipped, good[-1], spoilt, "skipped checkpoint ")
    run.record(recipe_text=RECIPE.read_text(), plan=new)
    return start.checkpoint


def sort(run: RunDir) -> tuple[list[Path], list[Path]]:
    """The checkpoints that nobody touched, and those that were damaged and are still there."""
    found = list_checkpoints(run.checkpoints_dir)
    spoilt = [folder for folder in found if (folder / NOTE).exists()]
    return [folder for folder in found if folder not in spoilt], spoilt


def assert_told(lines: list[str], newest: Path, spoilt: list[Path], prefix: str = "") -> None:
    """Exactly the damaged ones that are newer than the one to resume from are skipped, newest first."""
    newer = [folder for folder in reversed(spoilt) if step_of(folder) > step_of(newest)]
    told = [f"{prefix}{folder.name}: {(folder / NOTE).read_text()}" for folder in newer]
    assert len(lines) == len(told) and all(a.startswith(b) for a, b in zip(lines, told, strict=True)), lines


def damage(checkpoint: Path, chance: random.Random) -> str:
    """Spoil a checkpoint as a disk can; beside it a note with the first words of the reason to be given."""
    how, words = spoil(checkpoint, chance)
    (checkpoint / NOTE).write_text(words)
    assert (find_problem(checkpoint) or "").startswith(words), (words, find_problem(checkpoint))
    return how


def spoil(checkpoint: Path, chance: random.Random) -> tuple[str, str]:
    how = chance.choice(("emptied", "cut", "flipped", "missing", "unsealed"))
    file = chance.choice(sorted(p for p in checkpoint.rglob("*.*") if p.is_file()))
    name = file.relative_to(checkpoint).as_posix()
    size = file.stat().st_size
    if how == "unsealed":
        (checkpoint / "COMPLETE").unlink()
        return how, "it has no COMPLETE file"
    if how == "missing":
        file.unlink()
        return how, f"{name} is missing"
    if how == "flipped":
        content = bytearray(file.read_bytes())
        content[chance.randrange(size)] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
        return how, f"{name} is damaged"
    left = 0 if how == "emptied" else chance.randrange(size)
    os.truncate(file, left)
    return how, f"{name} is damaged" if name == "manifest.json" else f"{name} has {left} bytes"


def draw(chance: random.Random, ledger: Ledger, run: RunDir) -> Aim:
    """Where to kill next; what a quota lacks comes first once there are enough kills."""
    save, rotation = shortfall(ledger)
    at = chance.choices(("save", "rotation", "any time"), (13, 4, 3))[0]
    if sum(ledger.fell.values()) >= KILLS - save - rotation:
        at = "save" if save else "rotation" if rotation else at
    if at == "save":
        done = [e["save_s"] for e in rows(run.path / "events.jsonl")[-50:] if e["event"] == "save"]
        return Aim(at, chance.choice((0, 0, 1, 2)), chance.uniform(0, statistics.median(done or [0.02])))
    if at == "rotation":
        return Aim(at, chance.choice((0, 1)), chance.uniform(0, 0.0001))
    return Aim(at, 0, chance.uniform(0, 1.0))


def shortfall(ledger: Ledger) -> tuple[int, int]:
    in_save = sum(ledger.fell[place] for place in IN_SAVE)
    return max(0, IN_A_SAVE - in_save), max(0, IN_ROTATION - ledger.fell[ROTATION])


def has_quotas(ledger: Ledger) -> bool:
    return shortfall(ledger) == (0, 0)


def check(victim: Victim, ledger: Ledger, place: str) -> None:
    """What was ever in place is valid, and no step before it is lost."""
    run = victim.run
    saves = [e["step"] for e in rows(run.path / "events.jsonl")
             if e["event"] == "save" and e["incarnation"] == victim.incarnation]  # fmt: skip
    ledger.floor = max(ledger.floor, victim.newest_seen, *saves)
    newest, skipped = newest_valid(run.checkpoints_dir)
    step = 0 if newest is None else step_of(newest)
    assert step >= ledger.floor, (place, newest, skipped, ledger.floor)
    ledger.floor = step
    good, spoilt = sort(run)
    assert all(find_problem(folder) is None for folder in good), (place, good)
    if newest is not None:
        assert_told(skipped, newest, spoilt)
    for row in rows(run.metrics_path):
        assert ledger.losses.setdefault(row["step"], row["loss"]) == row["loss"], (place, row["step"])
    if victim.is_training():
        lost = max(0, victim.last_step() - step)
        ledger.lost[lost] += 1
        assert lost <= MOST_LOST, (place, victim.last_step(), step)


def assert_same_adapter(run: RunDir, other: RunDir) -> None:
    tensors, _ = load_adapter(run.path / "adapter")
    expected, _ = load_adapter(other.path / "adapter")
    assert tensors and tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def histogram(ledger: Ledger, seconds: float) -> str:
    lines = [f"where {sum(ledger.fell.values())} kills of two ranks fell ({seconds:.0f} s):"]
    lines += [f"  {place:55} {n:4} {'#' * n}" for place in PLACES if (n := ledger.fell[place])]
    in_save = sum(ledger.fell[place] for place in IN_SAVE)
    lines.append(
        f"between the first byte of a save and its rename: {in_save}; in rotation: {ledger.fell[ROTATION]}"
    )
    lost = ", ".join(f"{n} times {steps}" for steps, n in sorted(ledger.lost.items()))
    lines.append(f"steps done again: {lost}; damaged besides, and skipped: {dict(ledger.damaged)}")
    return "\n".join(lines)
