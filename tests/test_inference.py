"""A trained adapter is found, built from adapter.json alone, and asked."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny import make_run, run_ranks

from decompft.adapters.inject import adapters
from decompft.launcher.errors import AdapterError, UserError
from decompft.launcher.worker import generation
from decompft.launcher.worker.adapter_folder import adapter_folder
from decompft.launcher.worker.data.batches import collate
from decompft.launcher.worker.data.feed import open_train
from decompft.launcher.worker.inference import load
from decompft.launcher.worker.prepared import Prepared
from decompft.launcher.worker.tokenizers import byte_tokenizer
from decompft.launcher.worker.tools.generate import main

pytestmark = pytest.mark.dist


def quiet(*args):
    pass


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Forty steps on one sentence: enough to say it."""
    folder = tmp_path_factory.mktemp("inference")
    rows = [{"instruction": "Greet.", "output": "ok"}] * 8
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = make_run(
        folder,
        adapter={"rank": 16, "alpha": 32.0, "train_modules": ["norm"], "options": {"b_warmup_steps": 100}},
        data={"train": [{"path": str(folder / "data.jsonl"), "format": "instruction"}], "packing": False},
        train={"max_steps": 40, "learning_rate": 0.03, "global_batch_size": 4, "micro_batch_size": 4},
        checkpoint={"every_steps": 20},
    )
    run_ranks(run)
    return run


def answer(capsys, *argv):
    main(list(argv))
    return capsys.readouterr().out


def test_the_adapter_says_what_it_learned_and_the_bare_base_does_not(run, capsys):
    assert answer(capsys, str(run.path), "--prompt", "Greet.") == "ok\n"
    base = answer(capsys, str(run.path), "--prompt", "Greet.", "--no-adapter", "--max-new-tokens", "4")
    assert base != "ok\n"


def test_the_loaded_model_has_the_loss_that_training_had(run):
    """The quantized base, the whole modules and the step's warm-up are all back."""
    prepared = Prepared.read(run.path)
    rows = open_train(run.read_plan().recipe, prepared).step(20, 1, 0, 4, 1).micro_batches[0]
    batch = collate(rows, prepared.pad_id)
    loaded = load(run.path / "checkpoints/step-00000020", base=None, say=quiet)
    layers = [layer for _, layer in adapters(loaded.model)]
    assert {layer.warmup for layer in layers} == {0.2}
    for layer in layers:
        layer.on_step(20)  # as the loop does before step 21, whose loss is that of the weights after 20
    with torch.inference_mode():
        loss = float(loaded.model(batch)) / batch.num_targets
    by_step = {row["step"]: row["loss"] for row in map(json.loads, run.metrics_path.read_text().splitlines())}
    assert loss == pytest.approx(by_step[21], rel=1e-6)
    assert {
        layer.warmup for _, layer in adapters(load(run.path / "adapter", base=None, say=quiet).model)
    } == {0.4}


def test_places_that_mean_an_adapter(run, tmp_path, monkeypatch):
    tensors = []
    monkeypatch.chdir(run.path.parent)
    (tmp_path / "runs").mkdir()
    for place in (run.path.name, str(run.path / "adapter"), str(run.path / "checkpoints/step-00000040")):
        loaded = load(adapter_folder(place), base=None, say=quiet)
        tensors.append(loaded.model.model.model.layers[0].mlp.up_proj.B)
        assert loaded.tokenizer("Hi")["input_ids"] == [72, 105]
    assert all(torch.equal(tensors[0], other) for other in tensors[1:])
    shutil.copytree(run.path, tmp_path / "runs/mine", ignore=shutil.ignore_patterns("checkpoints"))
    monkeypatch.chdir(tmp_path)
    assert load(adapter_folder("mine"), base=None, say=quiet).formats == ("instruction",)


def test_the_adapter_folder_is_enough(run, tmp_path, capsys):
    shutil.copytree(run.path / "adapter", tmp_path / "moved")
    assert (tmp_path / "moved/tokenizer").is_dir()
    assert answer(capsys, str(tmp_path / "moved"), "--prompt", "Greet.") == "ok\n"


def test_what_is_no_adapter_is_refused_in_words(run, tmp_path):
    with pytest.raises(AdapterError, match="no such folder"):
        adapter_folder(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="neither an adapter nor --base"):
        load(None, base=None, say=quiet)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run.path, unfinished, ignore=shutil.ignore_patterns("adapter"))
    with pytest.raises(AdapterError, match="has not finished") as error:
        adapter_folder(str(unfinished))
    assert "checkpoints/step-00000040" in error.value.hint
    damaged = tmp_path / "damaged"
    shutil.copytree(run.path / "adapter", damaged)
    (damaged / "adapter.safetensors").write_bytes((damaged / "adapter.safetensors").read_bytes()[:-1])
    with pytest.raises(AdapterError, match="damaged"):
        load(damaged, base=None, say=quiet)


def test_the_attention_that_training_could_run_is_not_asked_for_elsewhere(run, tmp_path):
    """Trained packed on a GPU whose kernel took it; asked on a machine that has none."""
    from decompft.launcher.worker.inference import open_adapter

    elsewhere = tmp_path / "adapter"
    shutil.copytree(run.path / "adapter", elsewhere)
    described = json.loads((elsewhere / "adapter.json").read_text())
    for wanted, found in (("varlen", "auto"), ("eager", "eager")):
        described["model"]["attention"] = wanted
        (elsewhere / "adapter.json").write_text(json.dumps(described))
        assert open_adapter(elsewhere, base=None, say=quiet).model.attention == found


def test_another_base_is_refused_and_a_bare_one_can_be_asked(run, tmp_path, capsys):
    from decompft.launcher.worker.inference import open_adapter
    from decompft.launcher.worker.merging import merge

    merge(
        open_adapter(run.path / "adapter", base=None, say=quiet), "dense", tmp_path / "model", progress=quiet
    )
    with pytest.raises(AdapterError, match="trained over another base"):
        load(run.path / "adapter", base=str(tmp_path / "model"), say=quiet)
    prompt = ("--prompt", "Greet.", "--format", "instruction", "--max-new-tokens", "4")
    assert answer(capsys, "--base", str(tmp_path / "model"), *prompt) == "ok\n"


def test_prompts_are_written_as_in_training():
    tokenizer = byte_tokenizer()
    plain = bytes(i for i in generation.prompt_ids("Hi", "plain", tokenizer) if i < 256)
    instruction = bytes(generation.prompt_ids("Hi", "instruction", tokenizer)).decode()
    chat = tokenizer.decode(generation.prompt_ids("Hi", "chat", tokenizer))
    assert plain == b"Hi"
    assert instruction.endswith("### Instruction:\nHi\n\n### Response:\n")
    assert chat == "<s>user\nHi</s>\n<s>assistant\n"
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        generation.prompt_ids("Hi", "chat", tokenizer)


def test_a_batch_of_prompts_is_answered_as_each_alone(run):
    loaded = load(run.path / "adapter", base=None, use_adapter=False, say=quiet)
    prompts = [[72, 105], [72, 101, 108, 108, 111, 33], [65]]
    together = generation.generate(loaded, prompts, max_new_tokens=6)
    assert together == [generation.generate(loaded, [p], max_new_tokens=6)[0] for p in prompts]
    assert together == [without_cache(loaded, p, 6) for p in prompts]
    with pytest.raises(UserError, match="256 positions"):
        generation.generate(loaded, [[65] * 256], max_new_tokens=6)


def without_cache(loaded, ids, num_new):
    """Greedy decoding that computes everything anew for each token."""
    ids, stops = list(ids), generation.stop_ids(loaded)
    assert stops == [257]
    start = len(ids)
    for _ in range(num_new):
        with torch.inference_mode():
            token = int(loaded.model.logits(torch.tensor([ids]), None)[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[start:]
