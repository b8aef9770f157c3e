"""Under fsdp every matrix of the model, base and adapter, is spread by rows: no rank holds what others hold too."""

from __future__ import annotations

import pytest
import torch
from tiny import fork
from tiny_models import FAMILIES, built, row, saved, section
from torch.distributed.tensor import DTensor, Shard

from decompft.adapters.formats import FORMAT_SPECS
from decompft.adapters.inject import adapters
from decompft.launcher.recipe import AdapterSection, QuantizationSection, TrainSection
from decompft.launcher.worker.data.batches import collate
from decompft.launcher.worker.engines.fsdp import FsdpEngine
from decompft.launcher.worker.optimizer import make_optimizer

pytestmark = pytest.mark.dist

FORMATS = {
    "nf4-double": QuantizationSection(format="nf4", double_quant=True, compute="float32"),
    "nf4": QuantizationSection(format="nf4", double_quant=False, compute="float32"),
    "fp4-double": QuantizationSection(format="fp4", double_quant=True, compute="float32"),
    "int8": QuantizationSection(format="int8", compute="float32"),
    "int8-outliers": QuantizationSection(format="int8", outlier_threshold=6.0, compute="float32"),
    "fp8": QuantizationSection(format="fp8", compute="float32"),
    "none": QuantizationSection(format="none", compute="float32"),
}
MAP = AdapterSection(method="map", rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: saved(tmp_path_factory.mktemp(name), FAMILIES[name])[0] for name in ("llama", "gpt2")}


def num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@pytest.mark.parametrize(
    ("family", "form", "world_size", "offload"),
    [
        *(("llama", form, 2, False) for form in FORMATS),
        ("gpt2", "nf4-double", 2, False),
        ("llama", "nf4-double", 3, False),  # three ranks divide no tensor evenly
        ("llama", "nf4-double", 2, True),
    ],
)
def test_bytes_a_rank_are_the_total_over_the_ranks(folders, family, form, world_size, offload):
    folder = folders[family]

    def rank_main(rank):
        engine = FsdpEngine(torch.device("cpu"), timeout_s=60, cpu_offload=offload)
        engine.start()
        try:
            found = built(section(folder), FORMATS[form], MAP, engine=engine)
            model = found.model.model
            assert_sharded(model, world_size)
            assert_storage(model, form)
            # still so after training steps: gathered blocks were given back, gradients and moments are rows, too
            optimizer = make_optimizer(model, found.trained, TrainSection(max_steps=1), engine)
            optimizer = engine.prepare_training(found.model, optimizer, list(found.trained.values()))
            found.model.train()
            for _ in range(2):
                found.model(collate([row((17,), seed=rank)], pad_id=0)).backward()
                assert_rows(found.trained.items(), [p.grad for p in found.trained.values()], world_size)
                engine.reduce_gradients()
                optimizer.step()
                engine.zero_gradients(list(found.trained.values()))
            assert_sharded(model, world_size)
            for kind in ("exp_avg", "exp_avg_sq"):
                for name, parameter in found.trained.items():
                    state = engine.moments(optimizer, parameter)
                    mine = engine.local(parameter).numel()
                    assert (state[kind].numel() if state else 0) == mine, name
                    assert not state or state[kind].untyped_storage().nbytes() == 4 * mine, name
        finally:
            engine.stop()

    fork(rank_main, world_size)


def assert_sharded(model, world_size):
    assert_rows(model.named_parameters(), [p for _, p in model.named_parameters()], world_size)


def assert_rows(named, tensors, world_size):
    """Each tensor is a DTensor of rows, at most a row more than its share, and memory is held for no more."""
    total = local = slack = 0
    storages = {}
    for (name, parameter), tensor in zip(named, tensors, strict=True):
        if parameter.dim() == 1:  # vectors are whole: it is their number that costs
            assert not isinstance(tensor, DTensor), name
            continue
        assert isinstance(tensor, DTensor) and tensor.placements == (Shard(0),), name
        a_row = num_bytes(tensor) // tensor.shape[0]
        mine = num_bytes(tensor.to_local())
        assert mine <= -(-tensor.shape[0] // world_size) * a_row, name
        total, local, slack = total + num_bytes(tensor), local + mine, slack + a_row
        storage = tensor.to_local().untyped_storage()  # gradients of a block share one
        storages[storage.data_ptr()] = storage.nbytes()
    assert local <= total / world_size + slack
    assert sum(storages.values()) <= total / world_size + slack


def assert_storage(model, form):
    """Packed weights take the bytes that a plan counts, over all ranks together."""
    section = FORMATS[form]
    spec = FORMAT_SPECS[section.format]
    for name, adapter in adapters(model):
        base = adapter.base
        assert f"{type(base).__module__}:{type(base).__name__}" == spec.impl, name
        if not spec.is_quantized:
            continue
        counted = spec.row_bytes(base.in_features, section.block_size, section.double_quant)
        assert [num_bytes(t) for t in base.storage()] == [base.out_features * n for n in counted], name
