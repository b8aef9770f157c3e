"""DeepSpeed's config is the plan's: what a recipe adds takes effect, what would spoil it is refused."""

from __future__ import annotations

import pytest
from tiny import CPU, fork, make_run, recipe_data

from decompft.launcher.errors import DecompftError
from decompft.launcher.planner import make
from decompft.launcher.source import parse

REFUSED = {
    "another precision": ({"bf16": {"enabled": True}}, "bf16: it would cast"),
    "another precision, old name": ({"bfloat16": {"enabled": True}}, "bfloat16: it would cast"),
    "autocast": ({"torch_autocast": {"enabled": True}}, "torch_autocast: it would cast"),
    "an optimizer": ({"optimizer": {"type": "Adam"}}, "train.optimizer"),
    "a misspelt key": ({"wall_clock_brekdown": True}, "did you mean wall_clock_breakdown"),
    "a misspelt nested key": ({"zero_optimization": {"stage3_max_live_parameter": 3}}, "stage3_max_live_parameters"),
    "a clash": ({"gradient_clipping": 1.0}, "is 1.0 in the recipe, but the plan sets it to 0.0"),
    "a nested clash": ({"zero_optimization": {"stage": 1}}, "the plan sets it to 3"),
    "a wrong type": ({"zero_optimization": {"stage3_max_reuse_distance": "abc"}}, "'abc' is a str"),
    "another world for shards": ({"zero_optimization": {"zero_hpz_partition_size": 2}}, "not a key that may be added"),
    "offload by the back door": ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "parallel.cpu_offload"),
    "no mapping": ({"zero_optimization": 3}, "no mapping"),
}  # fmt: skip


def plan(folder, extra, **parallel):
    section = {"strategy": "zero3", "gpus_per_node": 2, "deepspeed": extra, **parallel}
    import json

    text = json.dumps(recipe_data(folder, parallel=section))
    return make(parse(text, where="test", base_dir=folder, overrides=()), machine=CPU)


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_spoil_a_run_is_refused_in_words(tmp_path, case):
    extra, words = REFUSED[case]
    with pytest.raises(DecompftError) as caught:
        plan(tmp_path, extra)
    assert words in f"{caught.value.message} {caught.value.hint}"
    assert caught.value.exit_code == 2


def test_a_value_that_is_the_plans_own_is_no_clash(tmp_path):
    assert (
        plan(tmp_path, {"gradient_clipping": 0.0, "train_batch_size": 4}).deepspeed["train_batch_size"] == 4
    )


def test_pinning_may_be_added_to_an_offload(tmp_path):
    extra = {"zero_optimization": {"offload_param": {"pin_memory": True}}}
    made = plan(tmp_path, extra, cpu_offload=True).deepspeed
    assert made["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}


@pytest.mark.dist
def test_what_is_added_reaches_deepspeed(tmp_path):
    """All kinds of additions at once: DeepSpeed takes the config, and its engine has the values."""
    extra = {
        "wall_clock_breakdown": True,
        "zero_optimization": {"stage3_max_reuse_distance": 7, "sub_group_size": 99},
    }
    run = make_run(tmp_path, parallel={"strategy": "zero3", "gpus_per_node": 2, "deepspeed": extra})
    made = run.read_plan()

    def rank_main(rank):
        from decompft.launcher.worker.build import build
        from decompft.launcher.worker.engines.choose import make_engine
        from decompft.launcher.worker.optimizer import make_optimizer

        engine = make_engine(made)
        engine.start()
        recipe = made.recipe
        built = build(
            recipe.model,
            recipe.quantization,
            recipe.adapter,
            engine,
            seed=0,
            model_dir=None,
            recompute="none",
        )
        optimizer = make_optimizer(built.model.model, built.trained, recipe.train, engine)
        engine.prepare_training(built.model, optimizer, list(built.trained.values()))
        assert engine._engine.wall_clock_breakdown()
        assert engine._engine.zero_max_reuse_distance() == 7
        assert engine._engine.zero_sub_group_size() == 99
        engine.stop()

    fork(rank_main, 2)
