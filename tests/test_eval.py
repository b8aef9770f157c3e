"""Scores of labels equal those of one sequence at a time; the papers' rule reads what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import LLAMA, make_run, run_ranks

from decompft.launcher.errors import DataError, UserError
from decompft.launcher.worker import scoring
from decompft.launcher.worker.data.templates import instruction_prompt
from decompft.launcher.worker.inference import load
from decompft.launcher.worker.tools.eval import main

pytestmark = pytest.mark.dist


def quiet(*args):
    pass


def record(number, labels=("a", "b", "c"), answer="b"):
    text = f"Is {number} more than {'many ' * (number % 5)}?\n\nAnswer format: {'/'.join(labels)}"
    return {"instruction": text, "output": answer, "answer": answer}


def write(path, records):
    path.write_text("".join(json.dumps(row) + "\n" for row in records))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trained to write b; a sentence would take a model of this size too long."""
    folder = tmp_path_factory.mktemp("eval")
    source = {"path": write(folder / "data.jsonl", [record(i) for i in range(8)]), "format": "instruction"}
    run = make_run(
        folder,
        model={"config": {**LLAMA, "max_position_embeddings": 512}},
        adapter={"rank": 16, "alpha": 32.0, "train_modules": ["norm"]},
        data={"train": [source], "packing": False, "sequence_length": 512},
        train={"max_steps": 40, "learning_rate": 0.03, "global_batch_size": 4, "micro_batch_size": 4},
    )
    run_ranks(run)
    return run


@pytest.fixture(scope="module")
def loaded(run):
    return load(run.path / "adapter", base=None, say=quiet)


def one_by_one(loaded, question, label):
    """log p of the sentence's tokens, from the logits of that one sequence through transformers' own head."""
    prompt = loaded.tokenizer(question.prompt)["input_ids"]
    answer = loaded.tokenizer(f"the correct answer is {label}")["input_ids"]
    with torch.inference_mode():
        logits = loaded.model.model(torch.tensor([prompt + answer])).logits[0].double()
    steps = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return float(steps.gather(1, torch.tensor(answer)[:, None]).sum())


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_likelihoods_equal_those_of_one_sequence_at_a_time(loaded, tmp_path, batch_size):
    sets = [
        ("yes", "no", "maybe"),
        ("a1", "a2", "a3", "a4", "a5"),
        ("true", "false"),
    ]  # of bytes: a1, a2 share a row
    records = [record(i, labels=sets[i % 3], answer=sets[i % 3][0]) for i in range(7)]
    questions, _ = scoring.read_questions(write(tmp_path / "task.jsonl", records), None)
    found = scoring.likelihoods(loaded, questions, batch_size=batch_size, report=quiet)
    for question, scores in zip(questions, found, strict=True):
        expected = [one_by_one(loaded, question, label) for label in question.labels]
        assert scores == pytest.approx(expected, abs=2e-4)  # float32 logits of 25 tokens
        assert len({round(s, 3) for s in scores}) == len(scores)


def test_labels_that_differ_in_their_last_token_share_a_row(loaded, tmp_path):
    path = write(tmp_path / "task.jsonl", [record(1, labels=("a1", "a2", "a3"), answer="a1")])
    rows, starts = scoring._rows(loaded, scoring.read_questions(path, None)[0])
    assert len(rows) == 1 and starts == [0, 3]


def test_many_positions_are_read_in_pieces(loaded, tmp_path, monkeypatch):
    questions, _ = scoring.read_questions(write(tmp_path / "task.jsonl", [record(i) for i in range(5)]), None)
    whole = scoring.likelihoods(loaded, questions, batch_size=None, report=quiet)
    monkeypatch.setattr(scoring, "CHUNK_TOKENS", 7)
    pieces = scoring.likelihoods(loaded, questions, batch_size=None, report=quiet)
    assert [x for row in pieces for x in row] == pytest.approx([x for row in whole for x in row], abs=1e-5)


def test_a_model_whose_head_is_not_plain_is_scored_too(loaded, tmp_path, monkeypatch):
    questions, _ = scoring.read_questions(write(tmp_path / "task.jsonl", [record(i) for i in range(3)]), None)
    whole = scoring.likelihoods(loaded, questions, batch_size=None, report=quiet)
    monkeypatch.setattr(loaded.model, "plain_head", False)
    other = scoring.likelihoods(loaded, questions, batch_size=None, report=quiet)
    assert [x for row in other for x in row] == pytest.approx([x for row in whole for x in row], abs=1e-4)


def test_equal_scores_go_to_the_first_label():
    question = scoring.Question(where="x:1", prompt="", labels=("b", "a", "c"), answer="a")
    assert scoring.best_label(question, [-2.0, -1.0, -1.0]) == "a"


def test_first_match_is_case_sensitive_and_the_first_in_the_text(loaded, tmp_path, monkeypatch):
    replies = {0: "No. True, true and false", 1: "nothing of the kind", 2: "so a10 is it", 3: "false"}
    records = [record(i, labels=("true", "false"), answer="true") for i in range(4)]
    questions, _ = scoring.read_questions(write(tmp_path / "task.jsonl", records), None)

    def reply(loaded, prompts, **how):
        number = int(loaded.tokenizer.decode(prompts[0]).split("Is ")[1][0])
        return [loaded.tokenizer(replies[number])["input_ids"]]

    monkeypatch.setattr(scoring, "generate", reply)
    words = ["a1", "a10", "false", "true"]
    found = scoring.first_matches(loaded, questions, words, batch_size=1, report=quiet)
    assert found == ["true", None, "a10", "false"]


def test_eval_shows_accuracies_and_the_trained_adapter_wins(run, tmp_path, capsys):
    task = write(tmp_path / "task.jsonl", [record(i) for i in range(10)])
    main([str(run.path), "--task", task, "--scorer", "both", "--json", "--limit", "6"])
    rows = json.loads(capsys.readouterr().out)
    assert [(row["scorer"], row["num_records"], row["accuracy"]) for row in rows] == [
        ("likelihood", 6, 1.0), ("first-match", 6, 1.0)
    ]  # fmt: skip
    main([str(run.path), "--task", task, "--scorer", "first-match", "--no-adapter"])
    table = capsys.readouterr().out
    assert "0.00%" in table and "10" in table


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "Is it?", "answer": "yes"}, r"task.jsonl:2: no line 'Answer format"),
        (
            record(1, answer="perhaps"),
            r"task.jsonl:2: its answer 'perhaps' is none of the labels .* a, b, c",
        ),
        ({"instruction": "Answer format: a/b"}, r"task.jsonl:2: .*answer"),
        (record(1, labels=("no " * 200, "yes"), answer="yes"), r"task.jsonl:2: .* 512 positions"),
    ],
)
def test_a_record_that_cannot_be_scored_is_named(run, tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        main([str(run.path), "--task", write(tmp_path / "task.jsonl", [record(0), row])])
    with pytest.raises(UserError, match="--limit 0"):
        main([str(run.path), "--task", "x", "--limit", "0"])


def test_the_papers_files_can_be_read():
    folder = Path(__file__).resolve().parents[2] / "shared/data/commonsense"
    if not folder.is_dir():
        pytest.skip("../shared/data is not on this machine")
    counts = {}
    for path in sorted(folder.glob("*_test.jsonl")):
        questions, words = scoring.read_questions(str(path), None)
        counts[path.stem] = len(questions), len(words)
        assert questions[0].prompt == instruction_prompt(
            {"instruction": json.loads(path.open().readline())["instruction"]}
        )
    assert counts == {
        "arc_challenge_test": (1172, 5),
        "arc_easy_test": (2376, 5),
        "boolq_test": (3270, 2),
        "openbookqa_test": (500, 4),
    }
