"""Documents of a packed row never see each other, in the very call that the loop makes."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, PLAIN, built, documents, row, saved, section

from decompft.launcher.recipe import AdapterSection
from decompft.launcher.worker.data.batches import collate

LENGTHS = (9, 1, 13, 2, 7)  # a lone token has position 0 before and after it
LORA = AdapterSection(method="lora", rank=4, alpha=8.0)
MODES = {"eval": (False, False), "train": (True, False), "train-recompute": (True, True)}


@pytest.fixture(scope="module", params=FAMILIES)
def models(request, tmp_path_factory):
    """recompute or not -> the family's model."""
    folder, _ = saved(tmp_path_factory.mktemp(request.param), FAMILIES[request.param])
    return {recompute: built(section(folder), PLAIN, LORA, recompute=recompute).model for recompute in (False, True)}


@pytest.fixture(params=MODES)
def model(request, models):
    train, recompute = MODES[request.param]
    return models[recompute].train(train)


def test_a_packed_rows_loss_is_its_documents_losses(model):
    packed = row(LENGTHS)
    # beside a row of one document, which alone would need no positions
    together = model(collate([packed, row((20,), seed=1)], pad_id=0))
    apart = [model(collate([one], pad_id=0)) for one in (*documents(packed), row((20,), seed=1))]
    # float32 sums over 30 tokens in another order
    torch.testing.assert_close(together, sum(apart), rtol=1e-5, atol=1e-4)


def test_each_documents_loss_is_its_own(model):
    """Not only their sum: all targets but one document's taken away."""
    packed = row(LENGTHS)
    first = 0
    for one in documents(packed):
        last, kept = first + len(one.tokens), packed.trained.copy()
        kept[:first] = kept[last:] = False
        alone = type(packed)(id=0, tokens=packed.tokens, trained=kept, doc_lengths=LENGTHS)
        found, expected = (model(collate([r], pad_id=0)) for r in (alone, one))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        first = last


def test_a_documents_loss_has_no_slope_in_the_others_tokens(model):
    """Exactly 0 and not small: the gradient of its loss with respect to the embeddings of the row."""
    packed = row(LENGTHS)
    kept = packed.trained.copy()
    kept[:10] = kept[23:] = False  # the third document's stay
    alone = type(packed)(id=0, tokens=packed.tokens, trained=kept, doc_lengths=LENGTHS)
    embedded: list[torch.Tensor] = []

    def keep(module, args, out):
        embedded.append(out.requires_grad_(True))
        return out

    handle = model.model.get_input_embeddings().register_forward_hook(keep)
    loss = model(collate([alone], pad_id=0))
    handle.remove()
    (slope,) = torch.autograd.grad(loss, embedded[0])
    sizes = slope[0].abs().sum(-1)
    assert sizes[:10].max() == 0 and sizes[23:].max() == 0
    assert sizes[10:22].min() > 0  # the last token predicts nothing
