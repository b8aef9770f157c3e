"""What of a block is computed again in the backward pass: the modes, and the pieces of each family's block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# fastest and largest first
Recompute = Literal["none", "norms", "selective", "full", "offloaded"]
MODES: tuple[Recompute, ...] = ("none", "norms", "selective", "full", "offloaded")
# these run parts of a block again, and must know them by name
BY_PIECES: tuple[Recompute, ...] = ("norms", "selective")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pieces:
    """The modules of a block that are run again, by their names in the block, and those of its MLP by theirs in it."""

    norms: tuple[str, ...]  # only their inputs are kept; some are absent from some configs
    last: str  # the linear that ends the MLP: all before it is run again, it is not
    inner: tuple[str, ...] = ("gate_proj", "up_proj")  # the linears before the MLP's activation
    mlp: str = "mlp"
    adds_output: bool = (
        True  # the MLP's output goes to the residual sum, dropped out or not, and is not saved
    )


_LLAMA = Pieces(norms=("input_layernorm", "post_attention_layernorm"), last="down_proj")
_FOUR_NORMS = (*_LLAMA.norms, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_PIECES: dict[str, Pieces] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": Pieces(norms=(*_LLAMA.norms, *_QK_NORMS), last="down_proj"),
    "gemma": _LLAMA,
    "gemma2": Pieces(norms=_FOUR_NORMS, last="down_proj", adds_output=False),
    "gemma3_text": Pieces(norms=(*_FOUR_NORMS, *_QK_NORMS), last="down_proj", adds_output=False),
    "phi": Pieces(
        norms=("input_layernorm", "self_attn.q_layernorm", "self_attn.k_layernorm"),
        last="fc2",
        inner=("fc1",),
    ),
    "phi3": Pieces(norms=_LLAMA.norms, last="down_proj", inner=("gate_up_proj",)),
    "gpt2": Pieces(norms=("ln_1", "ln_2"), last="c_proj", inner=("c_fc",)),
}


def pieces_of(model_type: str) -> Pieces | None:
    """The pieces of a family's block; None where `norms` and `selective` do not know it."""
    return _PIECES.get(model_type)


def is_left_out(linear: str, pieces: Pieces | None) -> bool:
    """Whether `full` computes a linear's product once: the MLP's last, where only the block's output has it."""
    if pieces is None or not pieces.adds_output:
        return False
    above, _, name = linear.rpartition(".")
    return above.rpartition(".")[2] == pieces.mlp and name == pieces.last


def runs_again(linear: str, pieces: Pieces) -> bool:
    """Whether `selective` computes a linear's product twice: those of the MLP but its last."""
    above, _, name = linear.rpartition(".")
    return above.rpartition(".")[2] == pieces.mlp and name != pieces.last
