"""A trained adapter over its base, ready to be asked: built from adapter.json alone, or the bare base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from decompft.adapters.inject import adapters
from decompft.launcher.errors import AdapterError, CheckpointError, UserError
from decompft.launcher.quantized_checkpoint import read_config_json, stored_format
from decompft.launcher.recipe import AdapterSection, DType, ModelSection, QuantizationSection
from decompft.launcher.worker.adapter_json import Base, read_adapter_json
from decompft.launcher.worker.build import build, trained_targets
from decompft.launcher.worker.engines.base import Engine
from decompft.launcher.worker.load import Progress
from decompft.launcher.worker.model import LossModel
from decompft.launcher.worker.modelfiles import identity, resolve_model
from decompft.launcher.worker.restore import load_adapter
from decompft.launcher.worker.state import place_adapter
from decompft.launcher.worker.tokenizers import load_tokenizer
from decompft.launcher.worker.tokens import TrainedToken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter folder as it was read, and where its base lies here."""

    folder: Path
    tensors: dict[str, Tensor]
    model: ModelSection
    quantization: QuantizationSection
    adapter: AdapterSection
    seed: int
    formats: tuple[str, ...]  # of the data it was trained on
    step: int | None  # optimizer steps it was trained for
    model_dir: Path | None
    base_hash: str  # as in the base's identity
    tokens: tuple[TrainedToken, ...] = ()  # whose rows were trained

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The run's tokenizer, which lies beside the adapter or in the run of its checkpoint."""
        for place in (self.folder / "tokenizer", self.folder.parent.parent / "tokenizer"):
            if place.is_dir():
                return load_tokenizer(self.model.model_copy(update={"tokenizer": None}), place)
        return load_tokenizer(self.model, self.model_dir)

    def tensor(self, name: str) -> Tensor:
        """One of its tensors.

        Raises:
            CheckpointError: it has none of this name.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.folder}: the adapter does not fit this model: it holds no {name}",
                "name its own base with --base",
            )
        return self.tensors[name]

    def settle(self, model: torch.nn.Module) -> None:
        """Bring what depends on the step (a magnitude's warm-up) to where training left it."""
        for _, layer in adapters(model):
            if self.step:
                layer.on_step(self.step - 1)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model in evaluation mode on one device, and its tokenizer."""

    model: LossModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    model_dir: Path | None
    formats: tuple[str, ...]  # that the adapter was trained on; empty for a bare base


def load(
    folder: Path | None,
    *,
    base: str | None,
    use_adapter: bool = True,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None],
) -> Loaded:
    """Build an adapter over its base, on a GPU if there is one.

    Args:
        folder: with adapter.json, as `adapter_folder` finds it; None for `base` alone.
        base: another place of the model that adapter.json names; without an adapter, any model.
        use_adapter: False gives the base as the adapter was trained on, quantized and without it.
        say: takes a line for the user before work that lasts.

    Raises:
        UserError: neither is given, or something is missing, damaged, or does not fit.
    """
    engine = Engine(torch.device("cuda" if torch.cuda.is_available() else "cpu"), timeout_s=60)
    if folder is None:
        return _bare(base, engine, progress, say)
    found = open_adapter(folder, base=base, say=say)
    built = build(
        found.model, _unrounded(found.quantization, say), found.adapter if use_adapter else None, engine,
        seed=found.seed, model_dir=found.model_dir, recompute="none", base_hash=found.base_hash,
        known=found.tensor, progress=progress, tokens=found.tokens if use_adapter else (),
    )  # fmt: skip
    if use_adapter:
        place_adapter(trained_targets(built.model.model), found.tensors, engine)
        found.settle(built.model)
    tokenizer = found.tokenizer()
    if found.tokens and not use_adapter:  # the bare base has no rows for tokens that were added
        tokenizer = load_tokenizer(found.model, found.model_dir)
    return Loaded(
        model=built.model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        device=engine.device,
        model_dir=found.model_dir,
        formats=found.formats,
    )


def _unrounded(quantization: QuantizationSection, say: Callable[[str], None]) -> QuantizationSection:
    """Compute in the dtype of the activations: fp8 rounds for speed in training, and no other program would."""
    if quantization.compute == "fp8":
        say(f"compute: {quantization.activations}; the adapter was trained with fp8 products")
        quantization = quantization.model_copy(update={"compute": quantization.activations, "fp8_skip": []})
    return quantization


def open_adapter(folder: Path, *, base: str | None, say: Callable[[str], None]) -> Adapter:
    """Read an adapter's folder and find its base; the base's weights are not read yet.

    Raises:
        AdapterError: no adapter there, damaged, or `base` is not what it was trained on.
        ModelError: the base is not here.
    """
    tensors, description = load_adapter(folder)
    told = read_adapter_json(folder, description)
    model = told.model
    if model.attention == "varlen":  # what training could run need not run here; nothing is packed either
        model = model.model_copy(update={"attention": "auto"})
    if base is not None:
        kept = model.revision if base == model.id else "main"
        weights = "checkpoint" if model.config is not None else model.weights
        model = model.model_copy(update={"id": base, "config": None, "revision": kept, "weights": weights})
    model_dir = resolve_model(model, say=say)
    _check_base(told.base, model_dir, folder)
    return Adapter(
        folder=folder,
        tensors=tensors,
        model=model,
        quantization=told.quantization,
        adapter=told.adapter,
        seed=told.seed,
        formats=tuple(told.data_formats),
        step=told.step,
        model_dir=model_dir,
        base_hash=told.base.sha256,
        tokens=tuple(told.tokens),
    )


def _bare(base: str | None, engine: Engine, progress: Progress, say: Callable[[str], None]) -> Loaded:
    if base is None:
        raise UserError(
            "neither an adapter nor --base is given", "name an adapter folder, a run, or --base MODEL"
        )
    model = ModelSection(id=base)
    model_dir = resolve_model(model, say=say)
    compute: DType = "bfloat16" if engine.device.type == "cuda" else "float32"
    whole = QuantizationSection(format="none", compute=compute)
    if model_dir is not None and (stored := stored_format(read_config_json(model_dir))):
        whole = whole.model_copy(update={"format": stored})
    built = build(
        model, whole, None, engine, seed=0, model_dir=model_dir, recompute="none", progress=progress
    )
    return Loaded(
        model=built.model.eval(),
        tokenizer=load_tokenizer(model, model_dir),
        device=engine.device,
        model_dir=model_dir,
        formats=(),
    )


def _check_base(trained_on: Base, model_dir: Path | None, folder: Path) -> None:
    if model_dir is None:  # made from the config and seed that adapter.json itself carries
        return
    if identity(model_dir)["sha256"] != trained_on.sha256:
        raise AdapterError(
            f"{folder}: was trained over another base ({trained_on.name}) than {model_dir}",
            "an adapter works over the very weights it was trained on; name their folder with --base",
        )
