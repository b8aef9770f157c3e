"""Tokenizers: bytes round-trip, sentencepiece equals sentencepiece, and absence is said in words."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from decompft.launcher.errors import ModelError
from decompft.launcher.recipe import ModelSection
from decompft.launcher.worker.tokenizers import (
    BYTE_VOCAB_SIZE,
    byte_tokenizer,
    load_tokenizer,
    pad_id,
    save_tokenizer,
)

TINY = {"model_type": "llama"}


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    model = io.BytesIO()
    lines = [f"the quick brown fox {i} jumps over the lazy dog" for i in range(100)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    path = tmp_path_factory.mktemp("spm") / "small.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.mark.parametrize(
    "text", ["plain", "  two  spaces\n\n", "\xe9\u4f60\u597d \U0001f600", "\x00\x7f", "it's 3.5"]
)
def test_bytes_round_trip(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_byte_tokenizer_has_260_ids_and_survives_saving(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == BYTE_VOCAB_SIZE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(ModelSection(config=TINY, weights="random"), tmp_path)
    assert again("d\xe9j\xe0 </s>")["input_ids"] == tokenizer("d\xe9j\xe0 </s>")["input_ids"]
    assert again.chat_template == tokenizer.chat_template


def test_config_model_uses_bytes() -> None:
    tokenizer = load_tokenizer(ModelSection(config=TINY, weights="random"), None)
    assert tokenizer("ab")["input_ids"] == [97, 98]


def test_model_tokenizer_wins_over_the_model_folder(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "own")
    model = ModelSection(id="some/model", tokenizer=str(tmp_path / "own"))
    assert load_tokenizer(model, tmp_path / "absent")("a")["input_ids"] == [97]


def test_bare_tokenizer_json_knows_its_special_tokens(tmp_path: Path) -> None:
    byte_tokenizer().backend_tokenizer.save(str(tmp_path / "some.json"))
    tokenizer = load_tokenizer(ModelSection(id="x/y", tokenizer=str(tmp_path / "some.json")), None)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)


def test_sentencepiece_ids_are_its_own_after_a_begin_token(sentencepiece_file: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    tokenizer = load_tokenizer(ModelSection(id="x/y", tokenizer=str(sentencepiece_file)), None)
    reference = SentencePieceProcessor(model_file=str(sentencepiece_file))
    text = "the lazy fox\n jumps  \xdcbergang"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text)
    assert tokenizer(text)["input_ids"][0] == reference.bos_id()


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("absent.json", None, "no such tokenizer"),
        ("broken.json", b"{", "not a tokenizer.json"),
        ("broken.model", b"\x0e\x01rubbish", "not a sentencepiece model"),
        ("vocab.txt", b"a", "ends in .json"),
    ],
)
def test_unreadable_tokenizer_file_is_named(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=words) as caught:
        load_tokenizer(ModelSection(id="x/y", tokenizer=str(path)), None)
    assert str(path) in caught.value.message


def test_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer could be read") as caught:
        load_tokenizer(ModelSection(id="x/y"), tmp_path)
    assert str(tmp_path) in caught.value.message


def test_padding_falls_back_to_the_end_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    assert pad_id(tokenizer) == tokenizer.eos_token_id
