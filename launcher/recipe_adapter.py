"""The recipe's section on what trains: a method, where it sits, its options, and what differs for some layers."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from decompft.adapters.spec import ADAPTER_SPECS, UNSUPPORTED, AdapterConfig
from decompft.launcher.options import below, options_of
from decompft.launcher.recipe_section import Names, Section


class AdapterOverride(Section):
    """What differs for some of the adapted layers."""

    targets: str | Names = Field(
        description="names or patterns, as adapter.targets, of layers that those name"
    )
    skip: bool = Field(False, description="leave these layers without an adapter")
    method: str | None = Field(None, description="another method; its options start from their defaults")
    rank: int | None = Field(None, ge=1, description="another rank")
    alpha: float | None = Field(None, gt=0, description="another scaling numerator")
    dropout: float | None = Field(None, ge=0, lt=1, description="another dropout")
    options: dict[str, Any] = Field({}, description="other options of the method")

    @field_validator("method")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        return value if value is None else _known_method(value)

    @field_validator("options")
    @classmethod
    def _typed(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if info.data.get("method"):  # else it is the section's, which checks it
            options_of(info.data["method"], value)
        return value

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        # null says nothing: that is how a dumped section reads
        named = self.model_fields_set - {"targets", "skip"}
        given = {name for name in named if getattr(self, name) not in (None, {})}
        if self.skip and given:
            raise ValueError(f"skip leaves no adapter for {sorted(given)[0]} to change")
        if not (self.skip or given):
            raise ValueError("changes nothing: give skip, method, rank, alpha, dropout or options")
        return self


class AdapterSection(Section):
    """The trainable part."""

    method: str = Field("map", description="one of: " + ", ".join(ADAPTER_SPECS))
    rank: int = Field(16, ge=1, description="rank of B A")
    alpha: float = Field(32.0, gt=0, description="scaling numerator: s = alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter branch's input")
    targets: str | Names = Field(
        "all-linear",
        description="all-linear (all but the output head), or names or patterns "
        "(fnmatch) of linear layers, e.g. [q_proj, v_proj] or 'layers.*.mlp.*'",
    )
    train_modules: list[str] = Field(
        [], description="further modules trained whole in float32: names or patterns, e.g. [norm]"
    )
    train_tokens: list[str] = Field(
        [],
        description="tokens whose rows of embedding and output head train in float32; a text that the "
        "tokenizer has no token for is added to it, e.g. ['<|im_start|>', '<|im_end|>']",
    )
    options: dict[str, Any] = Field({}, description="the method's own options")
    overrides: list[AdapterOverride] = Field(
        [], description="for some of the layers another method, rank or options, or none; a later one wins"
    )

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        return _known_method(value)

    @field_validator("options")
    @classmethod
    def _typed(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "method" in info.data:  # absent when it is wrong itself
            options_of(info.data["method"], value)
        return value

    @field_validator("train_tokens")
    @classmethod
    def _texts(cls, value: list[str]) -> list[str]:
        for number, text in enumerate(value):
            if not text.strip():
                raise ValueError(f"[{number}] is {text!r}: a token needs a character that is no white space")
            if text in value[:number]:
                raise ValueError(f"{text!r} is named twice")
        return value

    @model_validator(mode="after")
    def _overrides_fit(self) -> Self:
        for number, override in enumerate(self.overrides):
            if override.skip or override.method:  # with a method of its own it has been checked
                continue
            try:
                self.config(override)
            except ValidationError as error:
                raise below(error, "overrides", number, "options") from None
        return self

    def typed_options(self) -> Any:
        """The options as the method's own dataclass, defaults filled in."""
        return options_of(self.method, self.options)

    def config(self, override: AdapterOverride | None = None) -> AdapterConfig:
        """The adapter of a layer, without targets."""
        if override is None:
            override = AdapterOverride.model_construct(targets="all-linear")
        method = override.method or self.method
        kept = self.options if method == self.method else {}
        return AdapterConfig(
            method=method,
            rank=override.rank or self.rank,
            alpha=override.alpha or self.alpha,
            dropout=self.dropout if override.dropout is None else override.dropout,
            options=options_of(method, kept | override.options),
        )


def _known_method(name: str) -> str:
    if name in UNSUPPORTED:
        raise ValueError(f"{name} is not supported: {UNSUPPORTED[name]}")
    if name not in ADAPTER_SPECS:
        raise ValueError(f"unknown method {name!r}")
    return name
