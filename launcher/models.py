"""What shape is the model of a recipe: every layer's size and the exact number of parameters.

Only `config.json` is needed, never the weights. `families.py` knows how each model type turns a
config into layers, `model_source.py` where configs are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from decompft.adapters.spec import AdapterConfig
from decompft.adapters.targets import TargetMismatch, select
from decompft.launcher.errors import AdapterError
from decompft.launcher.layers import layer_configs
from decompft.launcher.recipe import AdapterSection

LAYER = "{i}"  # stands for the layer's number in a name


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearShape:
    """A linear layer, or the same one in every decoder layer. The weight is (out, in_)."""

    name: str  # full module name, with {i} for the layer's number when per_layer
    out: int
    in_: int
    bias: bool = False
    per_layer: bool = True

    @property
    def num_weights(self) -> int:
        """Of one of them, without the bias."""
        return self.out * self.in_

    @property
    def num_biases(self) -> int:
        return self.out if self.bias else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherShape:
    """An embedding or a norm, or the same one in every layer."""

    name: str
    num_params: int
    per_layer: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """What one layer keeps for the backward pass, besides the inputs of its linears."""

    norm_inputs: int = 2  # norms over the hidden size
    qk_norm: bool = False  # norms over queries and keys
    block_inputs: int = 2  # distinct hidden-wide inputs of linears: attention's and the MLP's
    mlp_eager: int = 4  # intermediate-wide tensors without fused kernels, down's input included
    mlp_fused: int = 3  # and with them
    mlp_copies: bool = False  # gate and up are halves of one output, of which fused kernels save copies
    has_liger: bool = True  # Liger has kernels for this model type


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of a model, as transformers would build it for the recipe's task."""

    model_type: str
    task: Literal["causal-lm", "sequence-classification"]
    hidden: int
    num_layers: int
    vocab: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    max_positions: int
    tied: bool  # the head is the embedding, counted once
    has_softcap: bool  # final logits pass through softcap * tanh(logits / softcap)
    linears: tuple[LinearShape, ...]  # all but the head, in the model's order
    head: LinearShape
    others: tuple[OtherShape, ...]  # embeddings, norms
    saved: Saved = field(default_factory=Saved)

    def count(self, part: LinearShape | OtherShape) -> int:
        """How many of a part the model has."""
        return self.num_layers if part.per_layer else 1

    @property
    def num_params(self) -> int:
        linears = sum(self.count(x) * (x.num_weights + x.num_biases) for x in self.linears)
        others = sum(self.count(x) * x.num_params for x in self.others)
        return linears + others + self.num_head_params

    @property
    def num_head_params(self) -> int:
        """Of the output head; a tied head's weight counts with the embedding."""
        return self.head.num_biases + (0 if self.tied else self.head.num_weights)

    def names(self, part: LinearShape | OtherShape) -> list[str]:
        """The full module names of a part, one a layer."""
        if not part.per_layer:
            return [part.name]
        return [part.name.replace(LAYER, str(i)) for i in range(self.num_layers)]


def adapted_linears(shape: ModelShape, section: AdapterSection) -> list[tuple[str, int, int, AdapterConfig]]:
    """(name, out, in, adapter) of every linear layer that is adapted.

    Raises:
        AdapterError: a target matches nothing.
    """
    sizes = {name: (part.out, part.in_) for part in shape.linears for name in shape.names(part)}
    known = ", ".join(dict.fromkeys(x.name.rpartition(".")[2] for x in shape.linears))
    hint = f"use all-linear, a pattern, or names of this model's linear layers: {known}"
    chosen = layer_configs(section, list(sizes), [shape.head.name], hint=hint)
    return [(name, *sizes[name], config) for name, config in chosen.items()]


def trained_modules(shape: ModelShape, patterns: Sequence[str]) -> list[tuple[str, int]]:
    """(name, parameters) of every module that `adapter.train_modules` selects: embeddings, norms, the head.

    Raises:
        AdapterError: a pattern matches nothing.
    """
    if not patterns:
        return []
    sizes = {name: x.num_params for x in shape.others for name in shape.names(x)}
    sizes[shape.head.name] = shape.head.num_weights + shape.head.num_biases
    try:
        return [(name, sizes[name]) for name in select(list(sizes), patterns, ())]
    except TargetMismatch as error:
        raise AdapterError(
            f"adapter.train_modules: {error}",
            "name a module by its last component, e.g. norm, or by a pattern",
        ) from error


def trained_rows(shape: ModelShape, tokens: Sequence[str], whole: Sequence[str]) -> int:
    """Numbers in the rows of `adapter.train_tokens`: the embedding's, and the head's unless it is tied.

    Args:
        whole: names of modules that train whole.

    Raises:
        AdapterError: the embedding or the head is one of them.
    """
    is_lm = shape.task == "causal-lm"
    table = shape.vocab * shape.hidden
    with_rows = [x.name for x in shape.others if not x.per_layer and x.num_params == table]
    for name in with_rows + [shape.head.name] * is_lm if tokens else ():
        if name in whole:
            raise AdapterError(
                f"adapter.train_tokens: adapter.train_modules names {name}, which then trains whole, these rows "
                "included",
                "leave one of the two out",
            )
    return len(tokens) * shape.hidden * (2 if is_lm and not shape.tied else 1)
