"""What is wrong with the files a recipe names, as far as a machine without a GPU can tell?

Existence, the first record, the headers of the weights, and whether the model's layers can take the recipe. What needs
a full read is found by `launch` before any process group exists.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decompft.adapters.spec import AdapterConfig, has_rank, spec_of
from decompft.adapters.window import window
from decompft.launcher.errors import AdapterError, DataError, DecompftError, ModelError
from decompft.launcher.packaged import is_packaged, packaged_file
from decompft.launcher.recipe import FORMAT_FIELDS, AdapterSection, Recipe, Source

if TYPE_CHECKING:
    from decompft.launcher.models import ModelShape

# what a method lacks to which a key means nothing
_NONE_OF = {
    "rank": "factors of a rank",
    "alpha": "alpha / rank in its formula",
    "dropout": "thin product whose input is dropped out",
}
_NEEDS_ARROW = (".parquet", ".arrow", ".zst")  # not opened: pyarrow takes longer to import than check may


def check(recipe: Recipe, *, strict: bool) -> tuple[str, ...]:
    """Look at the model and the data.

    Args:
        recipe: as `source.load` returns it, paths absolute.
        strict: what is not on this machine is an error (before a launch), not a warning.

    Returns:
        Warnings, each one line.

    Raises:
        ModelError, DataError: something is there and wrong, or absent and `strict`.
        AdapterError, PlanError: the model's layers cannot take what the recipe does to them.
    """
    return (
        *_without_effect(recipe.adapter),
        *_check_phases(recipe.adapter, recipe.train.max_steps),
        *_check_model(recipe, strict=strict),
        *check_data(recipe, strict=strict),
    )


def _without_effect(section: AdapterSection) -> list[str]:
    """Keys that are written and mean nothing to the method; adapter.json writes them all, so no error."""
    config = section.config()
    others = [(n, o, section.config(o)) for n, o in enumerate(section.overrides) if not o.skip]
    # what an override takes over from the section has its effect there
    used = {key for _, o, c in others for key in _NONE_OF if getattr(o, key) is None and key not in _idle(c)}
    found = [
        (f"adapter.{key}", config, key)
        for key in _idle(config)
        if key in section.model_fields_set and key not in used
    ]
    found += [
        (f"adapter.overrides[{n}].{key}", c, key)
        for n, o, c in others
        for key in _idle(c)
        if getattr(o, key) is not None
    ]
    return [f"{where}: {c.method} has no {_NONE_OF[key]}, it changes nothing" for where, c, key in found]


def _check_phases(section: AdapterSection, max_steps: int | None) -> list[str]:
    """Whether the run is long enough for what its methods do at a step; with `train.epochs` the ranks look.

    Raises:
        AdapterError: no step is left between two warm-ups.
    """
    if max_steps is None:
        return []
    warnings = []
    for where, override in [
        ("adapter", None),
        *((f"adapter.overrides[{n}]", o) for n, o in enumerate(section.overrides)),
    ]:
        if override is not None and override.skip:
            continue
        config = section.config(override)
        if hasattr(config.options, "final_warmup"):
            try:
                window(
                    config.options.init_warmup,
                    config.options.final_warmup,
                    config.options.interval,
                    max_steps,
                )
            except ValueError as error:
                raise AdapterError(
                    f"{where}.options: {error}", "lower them, or raise train.max_steps"
                ) from error
        if getattr(config.options, "start_step", 0) >= max_steps:
            warnings.append(
                f"{where}.options.start_step: the run's {max_steps} steps end before the second phase of "
                f"{config.method} begins: until then it is LoRA"
            )
    return warnings


def _idle(config: AdapterConfig) -> list[str]:
    """Keys that mean nothing to a method."""
    spec = spec_of(config)
    is_ranked, is_thin = has_rank(config), spec.num_columns(101, 103, config) > 0
    means = {"rank": is_ranked, "alpha": spec.has_alpha(config), "dropout": is_ranked or is_thin}
    return [key for key, is_meant in means.items() if not is_meant]


def check_data(recipe: Recipe, *, strict: bool) -> tuple[str, ...]:
    """Look at the data alone, as `check`."""
    warnings = []
    for part, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for i, source in enumerate(sources):
            warnings += _check_source(source, f"data.{part}[{i}]", strict=strict)
    return tuple(warnings)


def check_weights(model_dir: Path) -> None:
    """Compare what the safetensors headers and the index of a checkpoint promise with the files.

    Raises:
        ModelError: no weights, a missing shard, a broken header, or a file that is cut short.
    """
    from decompft.launcher.safetensors_header import read_headers

    read_headers(model_dir)


def check_tensors(model_dir: Path, shape: ModelShape) -> None:
    """Compare the sizes and the number of a checkpoint's linear layers with a model's.

    What is missing is told by the ranks, which know every tensor of the model; what is quantized already has
    shapes of its own.

    Args:
        shape: of the model that config.json describes.

    Raises:
        ModelError: as `check_weights`; another shape, or more layers.
    """
    from decompft.launcher.quantized_checkpoint import is_quantized
    from decompft.launcher.safetensors_header import read_headers
    from decompft.launcher.tensor_names import find_key, refuse_surplus_layers

    stored = read_headers(model_dir)
    if is_quantized(model_dir):
        return
    prefix = shape.linears[0].name.partition(".")[0]
    claimed = set()
    for part in (*shape.linears, shape.head):
        # GPT-2's Conv1D layers lie transposed
        is_transposed = shape.model_type == "gpt2" and part is not shape.head
        expected = (part.in_, part.out) if is_transposed else (part.out, part.in_)
        for name in shape.names(part):
            key = find_key(f"{name}.weight", stored, prefix)
            if key is None:
                continue
            claimed.add(key)
            if stored[key].shape == expected:
                continue
            hint = "config.json and weights belong to different models; copy or fetch both from one place"
            if part is shape.head and shape.task == "sequence-classification":
                hint = f"it already classifies; model.num_labels: {stored[key].shape[0]} keeps its head"
            raise ModelError(
                f"{stored[key].path}: {key} has shape {list(stored[key].shape)}, "
                f"the model's config says {list(expected)}",
                hint,
            )
    refuse_surplus_layers(f"{model_dir}: ", stored, claimed)


def _check_model(recipe: Recipe, *, strict: bool) -> list[str]:
    from decompft.launcher.fitting import fit_to_model

    fitted = fit_to_model(recipe)
    model, shape = recipe.model, fitted.work.shape
    where, model_dir = fitted.found.source, fitted.found.model_dir
    if model.weights == "random" or model.id is None:
        return []
    if is_packaged(model.id):
        try:
            packaged_file(model.id)
        except ModelError as error:
            if strict:
                raise
            return [f"{error.message} (shape: {where})"]
    if model.id.endswith(".gguf"):
        return []
    if model_dir is not None:
        try:
            check_weights(model_dir)
        except ModelError as error:
            if strict or any(model_dir.glob("*.safetensors*")) or any(model_dir.glob("*.bin")):
                raise
            return [error.message]
        check_tensors(model_dir, shape)
        return []
    absent = f"model.id: the weights of {model.id} are not on this machine (shape: {where})"
    if not strict:
        return [absent]
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ModelError(
            absent + ", and HF_HUB_OFFLINE forbids fetching them", "set model.id to a local folder"
        )
    return [f"model.id: the weights of {model.id} will be fetched from the hub"]


def _check_source(source: Source, key: str, *, strict: bool) -> list[str]:
    if source.path is None:
        return _check_hub(source, key)
    if not Path(source.path).exists() and not glob.glob(source.path, recursive=True):
        absent = f"{key}.path: {source.path}: no such file"
        if strict:
            raise DataError(absent, f"point it at your data: {key}.path=FILE, or edit the recipe")
        return [absent]
    # records.py is worker code that imports the standard library only: one reader, one set of messages
    from decompft.launcher.worker.data.records import iter_records, raw_field, source_files, text_field

    try:
        if source_files(source)[0].name.endswith(_NEEDS_ARROW):
            return []
        record = next(iter_records(source))
        for name in FORMAT_FIELDS[source.format][0]:
            if name == "messages":
                _check_messages(raw_field(record, name, source.fields), record.where)
            elif name == "label":
                raw_field(record, name, source.fields)
            else:
                text_field(record, name, source.fields)
    except DecompftError as error:
        raise DataError(f"{key}: {error.message}", error.hint) from error
    return []


def _check_messages(messages: Any, where: str) -> None:
    is_list = isinstance(messages, list) and messages
    if is_list and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
        return
    raise DataError(
        f"{where}: messages is not a list of turns",
        'a turn looks like {"role": "user", "content": "..."}',
    )


def _check_hub(source: Source, key: str) -> list[str]:
    if Path(source.hub or "").is_dir():
        return []
    return [f"{key}.hub: {source.hub} is looked up when the run starts"]
