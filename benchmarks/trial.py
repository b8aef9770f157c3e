"""A model of a benchmark's recipe, ready to train in this process on one batch of random tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decompft.adapters.copies import round_factors
from decompft.adapters.frozen.rounded import Rounded
from decompft.launcher.plan import Plan
from decompft.launcher.worker.build import DTYPES, Built, build
from decompft.launcher.worker.data.batches import Batch, collate
from decompft.launcher.worker.data.rows import Row
from decompft.launcher.worker.engines.base import Engine
from decompft.launcher.worker.optimizer import make_optimizer


@dataclass(frozen=True, kw_only=True)
class Trial:
    engine: Engine
    built: Built
    optimizer: torch.optim.Optimizer
    batch: Batch
    rounded: Rounded

    @property
    def parameters(self) -> list[Any]:
        return list(self.built.trained.values())

    def forward(self) -> Tensor:
        """The batch's mean loss a token, over the ranks: their sum is the step's. A step is one such pass."""
        self.rounded.refresh()
        loss = self.engine.forward(self.built.model, self.batch)
        return loss / self.batch.num_targets / self.engine.world_size


def prepare(plan: Plan, engine: Engine) -> Trial:
    """Build on an engine that has been started."""
    recipe, length = plan.recipe, plan.recipe.data.sequence_length
    built = build(
        recipe.model, recipe.quantization, recipe.adapter, engine,
        seed=0, model_dir=None, recompute=plan.recompute, recompute_blocks=plan.recompute_blocks,
    )  # fmt: skip
    optimizer = make_optimizer(built.model.model, built.trained, recipe.train, engine)
    optimizer = engine.prepare_training(built.model, optimizer, list(built.trained.values()))
    batch = random_batch(plan.batch.micro_size, length).to(engine.device)
    built.model.train()
    rounded = round_factors(built.model.model, DTYPES[recipe.quantization.activations])
    return Trial(engine=engine, built=built, optimizer=optimizer, batch=batch, rounded=rounded)


def random_batch(rows: int, length: int) -> Batch:
    """`rows` x `length` tokens, one document a row, all trained."""
    draw, made = torch.Generator().manual_seed(0), []
    for _ in range(rows):
        tokens = torch.randint(0, 256, (length,), generator=draw, dtype=torch.int32).numpy()
        made.append(Row(id=0, tokens=tokens, trained=tokens >= 0, doc_lengths=(length,)))
    return collate(made, 0)
