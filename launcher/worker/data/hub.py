"""Data sets that the `datasets` library finds: on the hub, in its cache, or in a local folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from decompft.launcher.errors import DataError
from decompft.launcher.recipe import Source


def iter_hub(source: Source, streaming: bool) -> Iterator[tuple[str, Any]]:
    """(place, record) of each row of a hub data set or of a folder that `datasets` can load."""
    for number, row in enumerate(load_hub(source, streaming), start=1):
        yield f"{source.hub}[{source.split}]: record {number}", dict(row)


def hub_fingerprint(source: Source) -> str:
    """Identity of a data set's contents, as `datasets` computes it."""
    return str(load_hub(source)._fingerprint)


def load_hub(source: Source, streaming: bool = False) -> Any:
    """The data set as a `datasets.Dataset` (memory-mapped), or an `IterableDataset` that reads as it goes.

    Raises:
        DataError: no network and not in the cache, no such configuration or split, or nothing readable.
    """
    import datasets

    assert source.hub is not None, "a source with a path has no hub set"
    folder = Path(source.hub).expanduser()
    saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    datasets.disable_progress_bars()
    try:
        if saved:
            loaded = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(
                str(folder) if folder.is_dir() else source.hub,
                source.name,
                split=source.split,
                streaming=streaming,
            )
    except Exception as error:  # network, parsing and naming errors come in a dozen types
        raise DataError(
            f"{source.hub}: the data set could not be loaded: {_first_line(error)}",
            "without a network, download it where there is one and give its files as path: "
            "(or the folder as hub:)",
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if source.split not in loaded:
            raise DataError(
                f"{source.hub}: no split {source.split!r}", f"its splits are {', '.join(map(str, loaded))}"
            )
        loaded = loaded[source.split]
    return loaded


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
