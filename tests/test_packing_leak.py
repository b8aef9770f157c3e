"""Documents of a packed row never see each other, in the very call that the loop makes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, PLAIN, built, documents, row, saved, section

from decompft.launcher.recipe import AdapterSection
from decompft.launcher.worker.data.batches import collate
from decompft.launcher.worker.data.rows import Row

LENGTHS = (9, 1, 13, 2, 7)  # a lone token has position 0 before and after it
LORA = AdapterSection(method="lora", rank=4, alpha=8.0)
MODES = {
    "eval": (False, "none"),
    "train": (True, "none"),
    "train-norms": (True, "norms"),
    "train-selective": (True, "selective"),
    "train-full": (True, "full"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def models(request, tmp_path_factory):
    """mode of recomputation -> the family's model."""
    folder, _ = saved(tmp_path_factory.mktemp(request.param), FAMILIES[request.param])
    return {
        recompute: built(section(folder), PLAIN, LORA, recompute=recompute).model
        for recompute in ("none", "norms", "selective", "full")
    }


@pytest.fixture(params=MODES)
def model(request, models):
    train, recompute = MODES[request.param]
    return models[recompute].train(train)


def only(packed: Row, first: int, last: int) -> Row:
    """The row with no trained token outside [first, last)."""
    kept = packed.trained.copy()
    kept[:first] = kept[last:] = False
    return replace(packed, trained=kept)


@torch.no_grad()
def test_a_packed_rows_losses_are_its_documents_losses(model):
    """Of each document alone, and of all together beside a row that needs no positions."""
    packed, other = row(LENGTHS), row((20,), seed=1)
    apart = [model(collate([one], pad_id=0)) for one in documents(packed)]
    ends = np.cumsum((0, *LENGTHS))
    for i, expected in enumerate(apart):
        found = model(collate([only(packed, ends[i], ends[i + 1])], pad_id=0))
        # float32 sums over up to 32 tokens in another order
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    together = model(collate([packed, other], pad_id=0))
    expected = sum(apart) + model(collate([other], pad_id=0))
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-4)


def test_a_documents_loss_has_no_slope_in_the_others_tokens(model):
    """Exactly 0 and not small: the gradient of its loss with respect to the embeddings of the row."""
    third = only(row(LENGTHS), 10, 23)
    embedded: list[torch.Tensor] = []

    def keep(module, args, out):
        embedded.append(out.requires_grad_(True))
        return out

    handle = model.model.get_input_embeddings().register_forward_hook(keep)
    loss = model(collate([third], pad_id=0))
    handle.remove()
    (slope,) = torch.autograd.grad(loss, embedded[0])
    sizes = slope[0].abs().sum(-1)
    assert sizes[:10].max() == 0 and sizes[23:].max() == 0
    assert sizes[10:22].min() > 0  # the last token predicts nothing
