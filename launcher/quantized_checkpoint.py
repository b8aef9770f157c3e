"""Is a checkpoint quantized already, in which format, and what does that make of the recipe's wish?

Files of bitsandbytes (as transformers saves them) are read as they are: their codes become the base's,
their scales float32. Any other kind is refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast

from decompft.launcher.errors import ModelError
from decompft.launcher.recipe import ModelSection, QuantizationSection
from decompft.launcher.safetensors_header import Stored, read_headers

StoredFormat = Literal["nf4", "fp4", "int8"]
STATE = ".quant_state.bitsandbytes__"  # of a 4-bit weight: JSON, behind the name of its format
BLOCK_SIZES = (64, 128)
_DEFAULT_BLOCK = 64  # of transformers, which stores it in the files alone


def stored_format(config: dict[str, Any]) -> StoredFormat | None:
    """What `quantization_config` of a config.json says; None for a checkpoint of plain floats.

    Raises:
        ModelError: quantized by something else than bitsandbytes.
    """
    found = config.get("quantization_config")
    if not found:
        return None
    is_8bit, is_4bit = found.get("load_in_8bit", False), found.get("load_in_4bit", False)
    method = found.get("quant_method") or ("bitsandbytes" if is_8bit or is_4bit else "an unnamed method")
    kind = found.get("bnb_4bit_quant_type", "fp4")
    if method.startswith("bitsandbytes") and is_8bit:
        return "int8"
    if method.startswith("bitsandbytes") and is_4bit and kind in ("nf4", "fp4"):
        return cast(StoredFormat, kind)
    raise ModelError(
        f"model.id: this checkpoint is quantized by {method}, which decompft does not read",
        "name the original checkpoint, which decompft quantizes while loading, or one that bitsandbytes "
        "quantized (nf4, fp4 or int8)",
    )


def as_stored(
    model: ModelSection, quantization: QuantizationSection, config: dict[str, Any], model_dir: Path | None
) -> tuple[QuantizationSection, tuple[str, ...]]:
    """The settings that a model's checkpoint leaves possible, and warnings; unchanged for plain floats.

    Args:
        config: config.json of the model.
        model_dir: the folder, where it is on this machine: the block size stands in the files alone.

    Raises:
        ModelError: the checkpoint is quantized, and not in the recipe's format, or in none we have.
    """
    stored = stored_format(config) if model.weights == "checkpoint" else None
    if stored is None:
        return quantization, ()
    name = model.id or "the model"
    if quantization.format != stored:
        raise ModelError(
            f"model.id: {name} is quantized already: bitsandbytes {stored}; "
            f"quantization.format is {quantization.format}",
            f"set quantization.format: {stored}, or name the original checkpoint",
        )
    if stored == "int8":
        return quantization, (
            f"{name} is quantized already (bitsandbytes int8): its codes are used as they are",
        )
    block = _block_size(name, model_dir)
    effective = quantization.model_copy(update={"block_size": block, "double_quant": False})
    return effective, (
        f"{name} is quantized already (bitsandbytes {stored}, blocks of {block}): its codes are used as they are, "
        "its scales in float32; quantization.block_size and double_quant do not apply",
    )


def stored_in(
    model: ModelSection, quantization: QuantizationSection, model_dir: Path
) -> tuple[QuantizationSection, set[str]]:
    """`as_stored` from a folder, and the checkpoint's names of the weights that are packed."""
    if model.weights == "random" or not is_quantized(model_dir):
        return quantization, set()
    effective, _ = as_stored(model, quantization, read_config_json(model_dir), model_dir)
    names = read_headers(model_dir)
    packed = {n.partition(STATE)[0] for n in names if STATE in n}
    return effective, packed | {n.removesuffix("SCB") + "weight" for n in names if n.endswith(".SCB")}


def is_quantized(model_dir: Path) -> bool:
    """Raises ModelError as `stored_format`."""
    return stored_format(read_config_json(model_dir)) is not None


def quant_state(stored: Stored) -> dict[str, Any]:
    """The JSON that bitsandbytes leaves beside a 4-bit weight: blocksize, shape, dtype, nested_...

    Raises:
        ModelError: it is none.
    """
    try:
        with stored.path.open("rb") as file:
            file.seek(stored.start)
            state: dict[str, Any] = json.loads(file.read(stored.num_bytes))
            assert {"blocksize", "shape", "dtype", "quant_type"} <= state.keys()
        return state
    except (OSError, ValueError, AssertionError, AttributeError) as error:
        raise ModelError(
            f"{stored.path}: a quant_state of bitsandbytes cannot be read: {error}", "fetch the file again"
        ) from error


def read_config_json(model_dir: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    return config


def _block_size(name: str, model_dir: Path | None) -> int:
    if model_dir is None or not any(model_dir.glob("*.safetensors")):
        return _DEFAULT_BLOCK
    states = [s for n, s in read_headers(model_dir).items() if STATE in n]
    block = int(quant_state(states[0])["blocksize"]) if states else _DEFAULT_BLOCK
    if block not in BLOCK_SIZES:
        raise ModelError(
            f"model.id: {name} is quantized in blocks of {block}; decompft has blocks of 64 and 128",
            "name the original checkpoint, which decompft quantizes while loading",
        )
    return block
