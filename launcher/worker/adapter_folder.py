"""Which folder does ADAPTER on the command line mean?"""

from __future__ import annotations

from pathlib import Path

from decompft.launcher.checkpoints import newest_valid
from decompft.launcher.errors import AdapterError
from decompft.launcher.runs import find_run


def adapter_folder(adapter: str) -> Path:
    """The folder with adapter.json that ADAPTER means; runs are also looked for by name under ./runs.

    Raises:
        AdapterError: there is none.
    """
    path = find_run(adapter)
    for folder in (path, path / "adapter"):
        if (folder / "adapter.json").is_file():
            return folder
    if not path.is_dir():
        raise AdapterError(
            f"{adapter}: no such folder", "name an adapter folder, a run directory or a checkpoint"
        )
    newest, _ = newest_valid(path / "checkpoints")
    if newest is not None:
        raise AdapterError(
            f"{adapter}: this run has not finished, so it has no adapter folder yet",
            f"name a checkpoint of it instead: {newest}",
        )
    hint = "name a folder that a run of decompft wrote: RUN, RUN/adapter or a checkpoint"
    if (path / "config.json").is_file():
        hint = "this is a model's folder; to ask it without an adapter, leave ADAPTER out and give --base"
    raise AdapterError(f"{adapter}: holds no adapter.json", hint)
