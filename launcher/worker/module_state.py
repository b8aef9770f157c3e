"""Has anything changed on a model's modules that a recording of a pass cannot see?

A recording holds Python's numbers as they were, and tensors by their places. Parameters and buffers are taken to stay
where they are: optimizers, phases and checkpoints write to them.
"""

from __future__ import annotations

from collections.abc import Set
from operator import is_
from typing import Any

from torch import Tensor, nn

_NUMBERS = (bool, int, float)
_CONTAINERS = (list, tuple, dict)
# of every module, and nothing of a pass
_HOUSEKEEPING = frozenset(vars(nn.Module())) - {"training"}


def tensors_on(model: nn.Module) -> dict[tuple[nn.Module, str], Tensor]:
    """Tensors that lie on modules beside their parameters and buffers, by module and attribute."""
    return {
        (module, name): value
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }


class ModuleState:
    """Numbers, and places of tensors, as they are now.

    Args:
        but: attributes that a pass writes, and does not read.
    """

    def __init__(self, model: nn.Module, *, but: Set[tuple[nn.Module, str]]) -> None:
        # found once, as looking takes time: a model of 7B has 5,000
        self._places: list[tuple[dict[str, Any], str]] = [
            (vars(module), name)
            for module in model.modules()
            for name, value in vars(module).items()
            if name not in _HOUSEKEEPING and (module, name) not in but and _may_matter(value)
        ]
        self._values = self._read()
        self._found = [_seen(value) for value in self._values]
        # the same object may lie elsewhere, or hold something else
        self._open = [k for k, value in enumerate(self._values) if isinstance(value, (Tensor, *_CONTAINERS))]

    def has_changed(self) -> bool:
        values = self._read()
        if all(map(is_, values, self._values)):
            return any(_seen(values[k]) != self._found[k] for k in self._open)
        return [_seen(value) for value in values] != self._found

    def _read(self) -> list[Any]:
        return [attributes.get(name) for attributes, name in self._places]


def _may_matter(value: object) -> bool:
    """Numbers, tensors, and what holds tensors or nothing yet; shapes and configurations stay as they are."""
    if isinstance(value, _CONTAINERS):
        inside = value.values() if isinstance(value, dict) else value
        return not value or any(isinstance(v, (Tensor, *_CONTAINERS)) and _may_matter(v) for v in inside)
    return value is None or isinstance(value, (*_NUMBERS, Tensor))


def _seen(value: object) -> object:
    """What a recording has of a value: a number, the place of a tensor, or those of what a container holds."""
    if type(value) in _NUMBERS:
        return value
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, _CONTAINERS):
        return [_seen(v) for v in (value.values() if isinstance(value, dict) else value)]
    return None
