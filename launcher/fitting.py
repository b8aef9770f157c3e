"""What does a recipe come to over its model's layers, and can they take it? Needs no weights."""

from __future__ import annotations

from dataclasses import dataclass

from decompft.launcher.families import shape_of
from decompft.launcher.fp8_layers import check_fp8
from decompft.launcher.model_source import FoundConfig, find_config
from decompft.launcher.quantized_checkpoint import as_stored, stored_in
from decompft.launcher.recipe import Recipe
from decompft.launcher.refusals import refuse_over_codes, refuse_shape
from decompft.launcher.workload import Workload, workload


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A recipe whose model is known."""

    recipe: Recipe  # with the quantization that the checkpoint leaves possible
    found: FoundConfig
    work: Workload
    warnings: tuple[str, ...]


def fit_to_model(recipe: Recipe) -> Fitted:
    """Find the model's layers and what the recipe does to each.

    Raises:
        ModelError: the model's shape cannot be read, or its checkpoint is quantized in another format.
        AdapterError: a target, or a pattern of fp8_skip, matches nothing.
        PlanError: a rank, option, block or sequence that the layers cannot take.
    """
    found = find_config(recipe)
    stored, warnings = as_stored(recipe.model, recipe.quantization, found.config, found.model_dir)
    recipe = recipe.model_copy(update={"quantization": stored})
    work = workload(shape_of(found.config, recipe.model.task, recipe.model.num_labels), recipe)
    check_fp8(recipe, work.shape)
    refuse_shape(work)
    if found.model_dir is not None and any(found.model_dir.glob("*.safetensors")):
        refuse_over_codes(work, stored_in(recipe.model, stored, found.model_dir)[1])
    return Fitted(recipe=recipe, found=found, work=work, warnings=warnings)
