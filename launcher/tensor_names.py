"""Under what name does a checkpoint hold a tensor, and does it hold layers that the model lacks?"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from decompft.launcher.errors import ModelError

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole component of a name: a layer's number


def find_key(name: str, keys: Collection[str], prefix: str) -> str | None:
    """The checkpoint's name of a tensor that transformers calls `name`, with or without the model's prefix."""
    bare = name.removeprefix(f"{prefix}.")
    names = [name, bare, f"{prefix}.{name}"]
    # LayerNorm's parameters in checkpoints converted from TensorFlow
    old = [
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        for n in names
    ]
    return next((n for n in (*names, *old) if n in keys), None)


def refuse_surplus_layers(where: str, names: Iterable[str], claimed: Collection[str]) -> None:
    """Refuse tensors that differ from those of the model in a layer's number alone.

    What is called otherwise (buffers, heads of other tasks) is no layer that training would leave out.

    Args:
        where: what the message starts with: "FOLDER: ", or "".
        names: all of the checkpoint.
        claimed: those that the model takes.

    Raises:
        ModelError: the checkpoint has more layers than the model.
    """
    known = {_NUMBER.sub("{i}", name) for name in claimed}
    surplus = [n for n in names if n not in claimed and _NUMBER.search(n) and _NUMBER.sub("{i}", n) in known]
    if surplus:
        first = min(surplus, key=lambda n: ([int(i) for i in _NUMBER.findall(n)], n))
        raise ModelError(
            f"{where}the checkpoint holds {len(surplus)} tensors of layers that the model's config does not "
            f"have, first {first}",
            "config.json and weights belong to different models; num_hidden_layers says how many layers there are",
        )
