"""What do a method's options in a recipe mean? Checked and typed, those of a method under it as well."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import InitErrorDetails

from decompft.adapters.spec import ADAPTER_SPECS
from decompft.adapters.specs.base import WrapperOptions


def options_of(method: str, options: Mapping[str, Any]) -> Any:
    """The options as the method's own dataclass, defaults filled in.

    Raises:
        ValidationError: a key or a value that the method does not have.
    """
    kind = ADAPTER_SPECS[method].options
    inner = options.get("inner", {})
    if not (issubclass(kind, WrapperOptions) and isinstance(inner, dict)):
        return _validated(method, options)
    made = _validated(method, {key: value for key, value in options.items() if key != "inner"})
    try:
        return replace(made, inner=asdict(options_of(made.over, inner)))
    except ValidationError as error:
        raise below(error, "inner") from None


def below(error: ValidationError, *steps: str | int) -> ValidationError:
    """The same errors, as many steps further down in the recipe."""
    found = [
        InitErrorDetails(type=d["type"], loc=(*steps, *d["loc"]), input=d["input"], ctx=d.get("ctx", {}))
        for d in error.errors()
    ]
    return ValidationError.from_exception_data(error.title, found)


def _validated(method: str, options: Mapping[str, Any]) -> Any:
    # through JSON, where strict validation accepts a mapping for a dataclass
    return _checker(method).validate_json(json.dumps(options))


@cache
def _checker(method: str) -> TypeAdapter[Any]:
    return TypeAdapter(ADAPTER_SPECS[method].options)
