"""Recorded passes on a CPU: what is recorded, when all is forgotten, and that no number differs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from planning import CPU, TINY, gpus, make
from recording import FakeRecorder, NoHostReads, Unable, recorded_by
from test_adapter_contract import VARIANTS
from test_classification import CONFIGS, texts
from test_every_method import MODULES, mixed, trained
from tiny import LLAMA, TRAIN, losses, make_run, run_ranks
from tiny_models import FAMILIES, PLAIN, built, row, saved, section, single

from decompft.adapters.inject import adapters
from decompft.launcher.checkpoints import newest_valid
from decompft.launcher.errors import PlanError, UserError
from decompft.launcher.recipe import AdapterSection, ModelSection, QuantizationSection
from decompft.launcher.recompute import Recompute
from decompft.launcher.worker.build import Built
from decompft.launcher.worker.data.batches import Batch, collate
from decompft.launcher.worker.pulse import Pulse
from decompft.launcher.worker.recorded import MAX_FORGOTTEN, MAX_SHAPES, PlainPasses, RecordedPasses
from decompft.launcher.worker.static_masks import static_masks

LORA = AdapterSection(method="lora", rank=4, alpha=8.0)
PACKED = [row((9, 1, 13), vocab=260), row((23,), seed=1, vocab=260)]


def every_method(compute: str = "float32", base: str = "nf4", *, recompute: Recompute = "none") -> Built:
    """A model in which the n-th linear layer carries the n-th variant."""
    num_layers = -(-len(VARIANTS) // len(MODULES))
    places = [f"model.layers.{i}.{module}" for i in range(num_layers) for module in MODULES]
    overrides = [
        {
            "targets": place,
            "method": method,
            "options": {"b_warmup_steps": 5} | options if method == "map" else options,
        }
        for place, (method, options) in zip(places, VARIANTS.values(), strict=False)
    ]
    adapter = AdapterSection.model_validate(
        {"method": "lora", "rank": 4, "alpha": 8.0, "overrides": overrides}
    )
    model = ModelSection.model_validate(
        {"config": {**LLAMA, "num_hidden_layers": num_layers}, "weights": "random"}
    )
    quantization = QuantizationSection.model_validate({"format": base, "compute": compute})
    return built(model, quantization, adapter, recompute=recompute)


def static(batch: Batch) -> Batch:
    return replace(batch, target_index=None, documents=None)


def masks_for(batch: Batch) -> AbstractContextManager[None]:
    return static_masks(is_packed=batch.position_ids is not None)


# -- what a pass may not do ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "recompute"),
    [("nf4", "none"), ("nf4", "norms"), ("nf4", "full"), ("int8", "none"), ("fp8", "none"), ("none", "none")],
)
def test_a_training_pass_of_every_method_makes_no_data_dependent_host_read(
    base: str, recompute: Recompute
) -> None:
    model = every_method("bfloat16", base, recompute=recompute).model.train()
    for _, adapter in adapters(model.model):
        adapter.on_step(0)
    for rows in (PACKED, PACKED[1:]):  # with positions and without
        batch = static(collate(rows, pad_id=0))
        with NoHostReads(), masks_for(batch):
            model(batch).backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_of_every_family_makes_no_data_dependent_host_read(tmp_path: Any, family: str) -> None:
    folder, _ = saved(tmp_path, FAMILIES[family])
    model = built(section(folder), PLAIN, LORA).model.train()
    for rows in ([row((9, 1, 13)), row((20,), seed=1)], [row((20,))]):
        batch = collate(rows, pad_id=0)
        by_mask = replace(batch, documents=None)
        with masks_for(batch):
            expected = model(by_mask).detach()
            with NoHostReads():
                found = model(static(batch))
        found.backward()
        # sums of the same float32 terms, with zeros among them
        torch.testing.assert_close(found.detach(), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(model(by_mask).detach(), expected, rtol=0, atol=0)  # masks are the same


@pytest.mark.parametrize("name", ["bert", "llama", "gemma2", "gpt2"])
def test_a_pass_of_a_classifier_makes_no_data_dependent_host_read(tmp_path: Any, name: str) -> None:
    """Its padding mask is always applied, where transformers leaves one out that hides nothing."""
    folder, _ = saved(tmp_path, CONFIGS[name], task="sequence-classification", num_labels=3)
    model = built(section(folder, task="sequence-classification", num_labels=3), PLAIN, LORA).model.train()
    for lengths in ((9, 20, 14), (16, 16)):
        batch = collate(texts(*lengths), pad_id=0)
        expected = model(batch).detach()
        with NoHostReads(), masks_for(batch):
            found = model(static(batch))
            found.backward()
        # float32 sums of attention in another order
        torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=0)


def test_the_guard_finds_what_it_is_for() -> None:
    with NoHostReads():
        for read in (
            lambda x: x.sum().item(),
            lambda x: x[x > 0],
            lambda x: bool(x.all()),
            lambda x: x.nonzero(),
        ):
            with pytest.raises(RuntimeError, match="the host reads a tensor"):
                read(torch.ones(3))
    with NoHostReads(), pytest.raises(RuntimeError, match="the host reads a tensor"):
        batch = collate(PACKED, pad_id=0)  # transformers looks whether positions are those of one document
        built(ModelSection(config=LLAMA, weights="random"), PLAIN, LORA).model(static(batch))


# -- the bookkeeping ----------------------------------------------------------------------------


def passes_of(
    found: Built, recorder: type[FakeRecorder] = FakeRecorder, **kwargs: Any
) -> tuple[RecordedPasses, FakeRecorder, list[str]]:
    fake, said = recorder(found.model), list[str]()
    found.model.train()
    passes = RecordedPasses(
        found.model, single(), list(found.trained.values()), fake,
        pulse=Pulse(), say=said.append, pad_multiple=8, **{"is_demanded": False, **kwargs},
    )  # fmt: skip
    return passes, fake, said


def tiny(method: str = "map", **options: Any) -> Built:
    adapter = AdapterSection(method=method, rank=4, alpha=8.0, options=options)
    return built(ModelSection(config=LLAMA, weights="random"), PLAIN, adapter)


def gradients(found: Built) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in found.trained.items() if p.grad is not None}


def test_gradients_of_several_micro_batches_add_up_as_they_do_plainly() -> None:
    batches = [collate([row((n,), seed=n, vocab=260)], pad_id=0) for n in (9, 12, 30)]
    found, plain = tiny(), tiny()
    passes, fake, _ = passes_of(found)
    plainly = PlainPasses(plain.model.train(), single(), Pulse())
    for batch in (*batches, *batches):
        passes.begin_step()
        loss, expected = passes.run(batch, 17), plainly.run(batch, 17)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert (fake.recorded, fake.replayed) == (2, 6)  # of 16 and of 32 places
    for name, grad in gradients(plain).items():
        # float32 products of other heights
        torch.testing.assert_close(
            gradients(found)[name], grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max())
        )


def test_every_length_beyond_the_first_few_runs_plainly_and_that_is_said_once() -> None:
    passes, fake, said = passes_of(tiny())
    for length in range(8, 8 * (MAX_SHAPES + 4), 8):
        passes.run(collate([row((length,), vocab=260)], pad_id=0), 3)
    assert fake.recorded == MAX_SHAPES and fake.plain_runs == 3
    assert [line for line in said if "others run plainly" in line] == said[-1:]


def test_a_language_batch_of_dummies_is_no_other_shape() -> None:
    passes, fake, _ = passes_of(tiny())
    passes.run(collate([row((16,), vocab=260), None], pad_id=0, pad_multiple=16), 3)
    loss = passes.run(collate([None, None], pad_id=0, pad_multiple=16), 3)
    assert fake.recorded == 1 and loss.item() == 0


def test_recording_leaves_gradients_and_random_numbers_alone() -> None:
    found = tiny("lora")
    passes, _, _ = passes_of(found)
    batch = collate([row((16,), vocab=260)], pad_id=0)
    torch.manual_seed(3)
    passes.run(batch, 3)
    drawn, first = torch.rand(1), gradients(found)
    torch.manual_seed(3)
    assert drawn == torch.rand(1)
    passes.run(batch, 3)
    assert all(torch.equal(g, 2 * first[n]) for n, g in gradients(found).items())


def test_gradients_of_a_lone_micro_batch_are_each_recordings_own() -> None:
    """Neither cleared nor added to; what another shape wrote stays what it was."""
    found, plain = tiny(), tiny()
    passes, fake, _ = passes_of(found, adds=False)
    plainly = PlainPasses(plain.model.train(), single(), Pulse())
    batches = [collate([row((n,), seed=n, vocab=260)], pad_id=0) for n in (16, 32, 16, 32)]
    places: dict[int, list[int]] = {}
    for index, batch in enumerate(batches):
        for parameter in (*found.trained.values(), *plain.trained.values()):
            parameter.grad = None
        passes.begin_step()
        passes.run(batch, 17)
        plainly.run(batch, 17)
        for name, grad in gradients(plain).items():
            torch.testing.assert_close(
                gradients(found)[name], grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max())
            )
        here = [p.grad.data_ptr() for p in found.trained.values() if p.grad is not None]
        assert here == places.setdefault(index % 2, here)
    assert (fake.recorded, fake.replayed) == (2, 4)
    assert not set(places[0]) & set(places[1])


def test_a_rising_b_is_recorded_once_and_once_more_when_it_has_risen() -> None:
    found = tiny(b_warmup_steps=4)
    passes, fake, _ = passes_of(found)
    batch = collate([row((16,), vocab=260)], pad_id=0)
    for step in range(8):
        for _, adapter in adapters(found.model.model):
            adapter.on_step(step)
        passes.begin_step()
        passes.run(batch, 3)
    assert (fake.recorded, fake.forgotten, fake.replayed) == (2, 1, 8)


def test_a_number_that_changes_with_every_step_ends_recording_in_words() -> None:
    found = tiny("lora")
    passes, fake, said = passes_of(found)
    batch = collate([row((16,), vocab=260)], pad_id=0)
    for step in range(MAX_FORGOTTEN + 3):
        next(adapters(found.model.model))[1].penalty_share = float(step)
        passes.begin_step()
        passes.run(batch, 3)
    assert fake.recorded == MAX_FORGOTTEN + 1 and fake.plain_runs == 2
    assert "has changed between steps too often" in said[-1]


def test_a_tensor_that_moves_is_recorded_again_and_one_that_changes_is_not() -> None:
    """Wherever it lies: a copy that is made once a step may not be made anew, but written to."""
    found = tiny("lora")
    base = next(adapters(found.model.model))[1].base
    base.copies = {"A": [torch.zeros(3)]}
    base.later = None
    passes, fake, _ = passes_of(found)
    batch, counts = collate([row((16,), vocab=260)], pad_id=0), []
    for change in ("nothing", "value", "place", "appears", "nothing"):
        if change == "value":
            base.copies["A"][0].fill_(1)
        elif change == "place":
            base.copies["A"] = [torch.zeros(3), base.copies["A"][0]]
        elif change == "appears":
            base.later = torch.zeros(1)
        passes.begin_step()
        passes.run(batch, 3)
        counts.append(fake.recorded)
    assert counts == [1, 1, 2, 3, 3]


def test_what_cannot_be_recorded_runs_plainly_and_says_why() -> None:
    found, plain = tiny(), tiny()
    passes, fake, said = passes_of(found, Unable)
    plainly = PlainPasses(plain.model.train(), single(), Pulse())
    batch = collate([row((16,), vocab=260)], pad_id=0)
    for _ in range(2):
        torch.testing.assert_close(passes.run(batch, 3), plainly.run(batch, 3), rtol=1e-6, atol=0)
    assert fake.plain_runs == 2
    assert said == [
        "train.cuda_graph: passes run plainly from here on, as one cannot be recorded: "
        "operation not permitted when stream is capturing"
    ]


def test_what_cannot_be_recorded_ends_a_run_that_demands_it() -> None:
    passes, _, _ = passes_of(tiny(), Unable, is_demanded=True)
    with pytest.raises(
        UserError, match="train.cuda_graph: true, but a pass cannot be recorded: operation not"
    ):
        passes.run(collate([row((16,), vocab=260)], pad_id=0), 3)


# -- what is decided beforehand -----------------------------------------------------------------


def test_nobody_asks_by_default() -> None:
    plan = make(gpus(1, 80))
    assert not plan.cuda_graph and plan.cuda_graph_reason == ""


@pytest.mark.parametrize(
    ("machine", "sections", "why"),
    [
        (CPU, {}, "on a CPU"),
        (gpus(2, 80), {"parallel": {"strategy": "fsdp"}}, "fsdp gathers or reduces within a pass"),
        (gpus(2, 80), {"parallel": {"strategy": "zero2"}}, "zero2 gathers or reduces within a pass"),
        (gpus(1, 80), {"quantization": {"format": "int8", "outlier_threshold": 6.0}}, "outliers are looked for"),
        (gpus(1, 80), {"adapter": {"dropout": 0.1}, "train": {"recompute": "full"}}, "random numbers"),
    ],
)  # fmt: skip
def test_what_no_graph_can_hold_is_an_error_or_off_in_words(machine: Any, sections: Any, why: str) -> None:
    model = {} if machine is not CPU else {"model": TINY}
    train = sections.get("train", {})
    with pytest.raises(PlanError, match=f"train.cuda_graph: true, but .*{why}") as error:
        make(machine, **model, **{**sections, "train": {**train, "cuda_graph": True}})
    assert "cuda_graph: auto" in error.value.hint
    plan = make(machine, **model, **{**sections, "train": {**train, "cuda_graph": "auto"}})
    assert (
        not plan.cuda_graph and plan.cuda_graph_reason.startswith("off: ") and why in plan.cuda_graph_reason
    )


def test_norms_draw_nothing_when_they_run_again() -> None:
    assert make(
        gpus(1, 80), adapter={"dropout": 0.1}, train={"recompute": "norms", "cuda_graph": True}
    ).cuda_graph


def test_auto_wants_rows_of_one_shape_and_true_does_not() -> None:
    unpacked = {"data": {"packing": False}}
    assert make(gpus(2, 80), train={"cuda_graph": "auto"}).cuda_graph
    assert "many shapes" in make(gpus(1, 80), **unpacked, train={"cuda_graph": "auto"}).cuda_graph_reason
    assert make(gpus(1, 80), **unpacked, train={"cuda_graph": True}).cuda_graph


# -- whole runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unable(tmp_path_factory: Any) -> Any:
    run = mixed(tmp_path_factory.mktemp("unable"), "run", "single")
    run_ranks(run, patch=recorded_by(Unable))
    return run


@pytest.mark.dist
@pytest.mark.parametrize("world", ["single", "ddp"])
def test_every_method_trains_to_the_same_bits(tmp_path: Any, unable: Any, world: str) -> None:
    """Six steps of four micro batches, across the switches of those methods that have some."""
    run = mixed(tmp_path, "run", world)
    run_ranks(run, patch=recorded_by(FakeRecorder))
    assert "recorded a micro batch of 1 x 256 as a CUDA graph" in run.rank_log(1, 0).read_text()
    if world != "single":
        unable = mixed(tmp_path, "unable", world)
        run_ranks(unable, patch=recorded_by(Unable))
    assert losses(run) == losses(unable)
    expected = trained(unable)
    assert all(torch.equal(t, expected[n]) for n, t in trained(run).items())


@pytest.mark.dist
def test_the_form_for_recording_changes_no_loss_beyond_rounding(tmp_path: Any, unable: Any) -> None:
    run = mixed(tmp_path, "run", "single")
    run_ranks(run)
    assert losses(unable) == pytest.approx(losses(run), rel=1e-4)


@pytest.mark.dist
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_stopped_and_resumed_equals_unbroken(tmp_path: Any, recompute: str) -> None:
    """Under dropout, with b rising, over more than an epoch."""
    sections = {
        "adapter": {"method": "map", "rank": 4, "alpha": 8.0, "options": {"b_warmup_steps": 4},
                    "dropout": 0.1 if recompute == "none" else 0.0},
    }  # fmt: skip
    train = {**TRAIN, "max_steps": 16, "recompute": recompute}
    whole = make_run(tmp_path, "whole", train=train, **sections)
    run_ranks(whole, patch=recorded_by(Unable))
    first = make_run(tmp_path, "first", train={**train, "stop_after_steps": 3}, **sections)
    run_ranks(first, patch=recorded_by(FakeRecorder))
    rest = make_run(tmp_path, "rest", train=train, **sections)
    run_ranks(rest, resume=newest_valid(first.checkpoints_dir)[0], patch=recorded_by(FakeRecorder))
    assert losses(first) + losses(rest) == losses(whole)
    expected = trained(whole)
    assert all(torch.equal(t, expected[n]) for n, t in trained(rest).items())
