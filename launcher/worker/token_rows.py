"""The rows of `adapter.train_tokens` in a model: put beside its embedding and head, and started."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from decompft.adapters.token_rows import TokenEmbedding, TokenHead, TokenRows, token_rows
from decompft.launcher.errors import AdapterError
from decompft.launcher.recipe import AdapterSection
from decompft.launcher.worker.engines.base import Engine
from decompft.launcher.worker.matching import Want
from decompft.launcher.worker.tensors import TensorSource
from decompft.launcher.worker.tokens import TrainedToken

_CHUNK_ROWS = 4096


def wrap_tokens(
    hf: Any, section: AdapterSection | None, tokens: Sequence[TrainedToken], *, has_head: bool
) -> None:
    """Let the rows of these tokens train, in the embedding of a model on meta and in its output head.

    Args:
        section: whose `train_tokens` they are.
        has_head: the head gives a logit for each token; False for a classifier's.

    Raises:
        AdapterError: the tokens are not those of the section; the embedding or the head trains whole; it has
            no row for a token, or is of a kind whose rows cannot be told apart.
    """
    wanted = [] if section is None else section.train_tokens
    if wanted != [token.text for token in tokens]:
        raise AdapterError(
            f"adapter.train_tokens: {', '.join(map(repr, wanted))}: the ids of these tokens are not known here",
            "adapter.json or prepared.json lists them; launch again, or take the whole adapter folder",
        )
    if not tokens:
        return
    embedding = hf.get_input_embeddings()
    head = hf.get_output_embeddings() if has_head else None
    ids = sorted(token.id for token in tokens)
    _refuse(embedding, head, ids)
    with torch.device("meta"):
        wrapped = TokenEmbedding(embedding, ids, None)
        # a tokenizer may have tokens already that the model has no rows for
        wrapped.added = frozenset(t.id for t in tokens if t.is_added or t.id >= embedding.weight.shape[0])
        hf.set_submodule(_name(hf, embedding), wrapped)
        if head is None:
            return
        tied = wrapped.rows if head.weight is embedding.weight else None
        wrapped_head = TokenHead(head, ids, tied)
        wrapped_head.added = wrapped.added
        hf.set_submodule(_name(hf, head), wrapped_head)


def place_rows(
    model: nn.Module,
    wants: Iterable[Want],
    source: TensorSource,
    engine: Engine,
    known: Callable[[str], Tensor] | None,
) -> None:
    """Fill the trained rows: from `known` by their name, else as they start.

    A token that the tokenizer had starts as the checkpoint's row. One that was added starts as the mean of the
    rows of all tokens that were there before it: its logit is then the mean of their logits, so that by
    Jensen's inequality it takes at most the share of an average token from what the model says, where a
    random row may take all. Rank 0 reads and gives to the others: no start depends on the number of ranks.
    """
    keys = {want.name: want.key for want in wants}
    placed: set[int] = set()
    for name, module in token_rows(model):
        if id(module.rows) in placed:
            continue
        placed.add(id(module.rows))
        if known is not None:
            values = known(f"{name}.rows")
        else:
            made = None
            if engine.rank == 0:
                made = {"rows": _start(source, keys[f"{name}.weight"], module.ids, module.added)}
            values = engine.broadcast(made, 0)["rows"]
        engine.place(module.rows, values)


def by_tensor(hf: Any, trained: Mapping[str, Tensor]) -> dict[str, tuple[TokenRows, Tensor | None]]:
    """Each tensor that the trained rows belong into, by its name: the module, and rows; None for a head's bias.

    Args:
        trained: the tensors of an adapter's file.
    """
    names: dict[int, str] = {}  # of rows: those of a tied head are the embedding's
    found: dict[str, tuple[TokenRows, Tensor | None]] = {}
    for name, module in token_rows(hf):
        first = names.setdefault(id(module.rows), name)
        found[f"{name}.weight"] = module, trained[f"{first}.rows"]
        if isinstance(module, TokenHead) and module.bias is not None:
            found[f"{name}.bias"] = module, None
    return found


def merged_rows(module: TokenRows, frozen: Tensor, trained: Tensor | None) -> Tensor:
    """The frozen rows (V, H), or bias (V,), with the trained ones in place and appended; a new bias is 0."""
    whole = torch.cat([frozen, frozen.new_zeros(module.num_new, *frozen.shape[1:])])
    if trained is not None:
        whole[list(module.ids)] = trained.to(whole)
    return whole


def num_new_rows(hf: Any) -> int:
    """Tokens past the base's vocabulary."""
    return max((module.num_new for _, module in token_rows(hf)), default=0)


def _start(source: TensorSource, key: str, ids: Sequence[int], added: frozenset[int]) -> Tensor:
    """(n, H) float32."""
    size, width = source.shape(key)
    mean = torch.zeros(width)
    if added:
        stop = min(size, *added)  # rows past the old vocabulary are padding
        parts = (source.rows(key, a, min(a + _CHUNK_ROWS, stop)) for a in range(0, stop, _CHUNK_ROWS))
        sums = [part.sum(0, dtype=torch.float64).cpu() for part in parts]
        mean = (torch.stack(sums).sum(0) / stop).float()
    rows = (mean if i in added else source.rows(key, i, i + 1)[0].float().cpu() for i in ids)
    return torch.stack(list(rows))


def _refuse(embedding: nn.Module, head: nn.Module | None, ids: Sequence[int]) -> None:
    if type(embedding).forward is not nn.Embedding.forward and not hasattr(embedding, "embed_scale"):
        raise AdapterError(
            f"adapter.train_tokens: this model's embedding ({type(embedding).__name__}) is no plain table of rows",
            "train it whole with adapter.train_modules",
        )
    size: int = embedding.weight.shape[0]  # type: ignore[index, assignment]
    if head is not None and head.weight.shape[0] != size:  # type: ignore[index]
        raise AdapterError("adapter.train_tokens: embedding and output head have different numbers of rows")
    if any(m.weight.requires_grad for m in (embedding, head) if m is not None):
        raise AdapterError(
            "adapter.train_tokens: adapter.train_modules names the embedding or the output head, which then "
            "trains whole, these rows included",
            "leave one of the two out",
        )
    beyond = [i for i in ids if i >= size]
    if beyond != list(range(size, size + len(beyond))):
        raise AdapterError(
            f"adapter.train_tokens: the model has {size} rows, and the tokenizer more tokens than that already: "
            f"token {beyond[-1]} would leave rows without values between",
            "name the model's own tokenizer with model.tokenizer",
        )


def _name(hf: Any, wanted: nn.Module) -> str:
    return next(name for name, module in hf.named_modules() if module is wanted)
