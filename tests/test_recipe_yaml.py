"""YAML that bites: what looks like a number, a word or a mark is read as people mean it, or refused with its place."""

from __future__ import annotations

import pytest
from test_recipe_source import GOOD, error, of


@pytest.mark.parametrize("written", ["3e-4", "3.0e-4", "0.0003", ".0003", "+3E-4"])
def test_numbers_without_a_point_are_numbers(written: str) -> None:
    assert of(GOOD + f"  learning_rate: {written}\n").train.learning_rate == 3e-4


@pytest.mark.parametrize(("written", "number"), [("010", 10), ("0x10", 16), ("0o10", 8), ("+3", 3)])
def test_whole_numbers_are_decimal_unless_marked(written: str, number: int) -> None:
    assert of(GOOD, f"adapter.rank={written}").adapter.rank == number


def test_a_wall_time_is_not_base_sixty() -> None:
    assert of(GOOD + "slurm:\n  time: 1:30:00\n").slurm.time == "1:30:00"


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "Yes", "y"])
def test_only_true_and_false_are_booleans(word: str) -> None:
    caught = error(GOOD + f"logging:\n  tensorboard: {word}\n")
    assert caught.message == (
        f"r.yaml:13:16: logging.tensorboard: found the text '{word}', expected true or false"
    )
    assert caught.hint == "write true or false"


@pytest.mark.parametrize("word", ["true", "True", "false"])
def test_booleans(word: str) -> None:
    assert of(GOOD + f"logging:\n  tensorboard: {word}\n").logging.tensorboard is (word.lower() == "true")


@pytest.mark.parametrize("word", ["no", "on", "off", "yes"])
def test_words_stay_text_in_text_and_as_keys(word: str) -> None:
    assert of(GOOD, f"model.revision={word}").model.revision == word
    assert f"model.{word}: unknown key" in error(GOOD.replace("model:\n", f"model:\n  {word}: 1\n")).message


def test_a_repeated_key_names_both_places() -> None:
    caught = error(GOOD.replace("  rank: 8\n", "  rank: 8\n  alpha: 3\n  rank: 9\n"))
    assert caught.message == "r.yaml:7:3: adapter.rank: written twice, first at line 5:3"


def test_a_repeated_section_is_refused() -> None:
    assert (
        "r.yaml:12:1: adapter: written twice, first at line 3:1"
        in error(GOOD + "adapter: {rank: 3}\n").message
    )


def test_infinity_is_no_learning_rate() -> None:
    assert "expected a finite number" in error(GOOD + "  learning_rate: .inf\n").message


def test_anchors_are_kept() -> None:
    text = GOOD.replace("path: a.jsonl", "path: &p a.jsonl").replace("b.jsonl", "*p")
    assert of(text).data.train[1].path == "/base/a.jsonl"


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("model:\n\tid: x\n", "r.yaml:2:1", "a tab is used"),
        ("model: a: b\n", "r.yaml:1:9", "in quotes"),
        ("model: {id: x\ndata: 3\n", "r.yaml:2:", "not valid YAML"),
        ("model: {id: x}\ndata\n", "r.yaml:3:1", "colon and a space"),
        ("model: {<<: {id: x}}\n", "r.yaml:1:9", "merge keys"),
        ("model: !!python/name:os.system x\n", "r.yaml:1:8", "the tag !!python/name:os.system is not known"),
        ("model: !!int x\n", "r.yaml:1:8", "'x' is not of type !!int"),
        ("model: &a {id: *a}\n", "r.yaml:1:8", "contains itself"),
        ("model: *a\n", "r.yaml:1:8", "starts with * is put in quotes"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2:1", "second document"),
        ("a: \x01\n", "r.yaml:1:4", "U+0001"),
        ("{a: 1}: 3\n", "r.yaml:1:1", "plain text"),
        ("- a\n", "r.yaml:1:1", "list of sections"),
        ("", "r.yaml", "empty"),
        ("# only a comment\n", "r.yaml", "empty"),
    ],
)
def test_what_is_not_a_recipe_is_said_in_words(text: str, place: str, words: str) -> None:
    caught = str(error(text))
    assert caught.startswith(place) and words in caught
