"""Masks of every format, token by token, with the byte tokenizer (one token a byte)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from decompft.launcher.errors import DataError
from decompft.launcher.recipe import DataSection, Source
from decompft.launcher.worker.data.encode import Encoder
from decompft.launcher.worker.data.records import Record
from decompft.launcher.worker.data.samples import Counts, Sample, iter_samples
from decompft.launcher.worker.data.templates import instruction_prompt
from decompft.launcher.worker.tokenizers import byte_tokenizer

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<s>system\nBe good.</s>\n' }}{% endif %}"
    "{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '</s>\n' }}{% endfor %}"
)
PHI = (  # ends whatever it renders with the end token, unless asked for an answer
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '<spare>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
FORGETFUL = (  # earlier answers are rewritten, as reasoning models' templates do
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' }}"
    "{{ m['content'] if loop.last or m['role'] != 'assistant' else '...' }}{{ '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2 \u4f60"},
]


def samples(
    values: dict[str, Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: dict[str, Any] | None = None,
    counts: Counts | None = None,
    **source: Any,
) -> list[Sample]:
    one = Source(path="set.jsonl", **source)
    section = DataSection(train=[one], **({"sequence_length": 512} | (data or {})))
    record = Record(where="set.jsonl:7", index=0, values=values)
    total = counts or Counts()
    return list(iter_samples([record], one, section, Encoder(tokenizer or byte_tokenizer()), lambda _: total))


def marked(sample: Sample, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """The text with trained stretches in [[ ]]."""
    decode = (tokenizer or byte_tokenizer()).decode
    out, position = "", 0
    while position < len(sample.tokens):
        end = position
        while end < len(sample.tokens) and sample.trained[end] == sample.trained[position]:
            end += 1
        text = decode(sample.tokens[position:end].tolist())
        out += f"[[{text}]]" if sample.trained[position] else text
        position = end
    return out


def chat(template: str, messages: Sequence[dict[str, str]] = TALK, **source: Any) -> str:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    (sample,) = samples({"messages": list(messages)}, tokenizer=tokenizer, format="chat", **source)
    return marked(sample, tokenizer)


def test_instruction_trains_answer_and_end_token_after_the_shared_prompt() -> None:
    record = {"instruction": "Add {1} and 1.", "output": "2"}
    (sample,) = samples(record)
    assert marked(sample) == instruction_prompt(record) + "[[2</s>]]"


def test_instruction_template_is_pinned() -> None:
    assert instruction_prompt({"instruction": "Q\nA/B"}) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nQ\nA/B\n\n### Response:\n"
    )


def test_instruction_with_input_shows_it_between() -> None:
    (sample,) = samples({"instruction": "Sum.", "input": "1, 2", "output": "3"})
    text = marked(sample)
    assert "### Instruction:\nSum.\n\n### Input:\n1, 2\n\n### Response:\n[[3</s>]]" in text


def test_empty_input_is_no_input() -> None:
    (sample,) = samples({"instruction": "Sum.", "input": "", "output": "3"})
    assert "### Input" not in marked(sample)


def test_train_on_all_trains_the_prompt_too() -> None:
    record = {"instruction": "a", "output": "b"}
    (sample,) = samples(record, train_on="all")
    assert marked(sample) == f"[[{instruction_prompt(record)}b</s>]]"


def test_completion_is_verbatim() -> None:
    (sample,) = samples({"prompt": "2 + 2 =", "completion": " 4 "}, format="completion")
    assert marked(sample) == "2 + 2 =[[ 4 </s>]]"


def test_renamed_fields_are_read() -> None:
    (sample,) = samples({"q": "x", "a": "y"}, format="completion", fields={"prompt": "q", "completion": "a"})
    assert marked(sample) == "x[[y</s>]]"


def test_text_trains_everything() -> None:
    (sample,) = samples({"text": "all of it"}, format="text")
    assert marked(sample) == "[[all of it</s>]]"


def test_long_text_is_split_with_each_token_a_target_once() -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(50))
    pieces = samples({"text": text}, format="text", data={"sequence_length": 16})
    targets = [int(token) for piece in pieces for token in piece.tokens[1:]]
    assert targets == [*text.encode()[1:], 257]
    assert all(len(piece.tokens) <= 16 and piece.trained.all() for piece in pieces)


def test_a_tokenizer_that_begins_documents_begins_ours() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    (sample,) = samples({"prompt": "a", "completion": "b"}, tokenizer=tokenizer, format="completion")
    assert marked(sample, tokenizer) == "<s>a[[b</s>]]"


def test_end_token_is_trained_when_it_is_the_pad_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    (sample,) = samples({"prompt": "a", "completion": "b"}, tokenizer=tokenizer, format="completion")
    assert sample.tokens[-1] == tokenizer.eos_token_id and sample.trained[-1]


def test_token_over_the_border_of_prompt_and_answer_is_trained() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"a": 0, "b": 1, "c": 2, "bc": 3, "</s>": 4}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocab, merges=[("b", "c")])), eos_token="</s>"
    )
    (sample,) = samples({"prompt": "ab", "completion": "ca"}, tokenizer=tokenizer, format="completion")
    assert sample.tokens.tolist() == [0, 3, 0, 4]  # the text's own tokens, not "a b" + "c a"
    assert sample.trained.tolist() == [False, True, True, True]


def test_chat_trains_each_assistant_turn_and_its_end_under_a_default_system_message() -> None:
    assert chat(CHATML) == (
        "<s>system\nBe good.</s>\n<s>user\none?</s>\n<s>assistant\n[[1</s>]]\n"
        "<s>user\ntwo?</s>\n<s>assistant\n[[2 \u4f60</s>]]\n"
    )


def test_chat_with_own_system_message() -> None:
    talk = [{"role": "system", "content": "Hm."}, *TALK[:2]]
    assert chat(CHATML, talk) == "<s>system\nHm.</s>\n<s>user\none?</s>\n<s>assistant\n[[1</s>]]\n"


def test_chat_generation_marks_are_followed_and_the_end_token_added() -> None:
    first, second = "user: one?</s>\nassistant: [[1</s>]]\n", "user: two?</s>\nassistant: [[2 \u4f60</s>]]\n"
    assert chat(MARKED) == first + second


def test_chat_template_that_closes_every_rendering() -> None:
    assert chat(PHI) == (
        "<s>user\none?<spare>\n<s>assistant\n[[1<spare>]]\n"
        "<s>user\ntwo?<spare>\n<s>assistant\n[[2 \u4f60<spare>\n</s>]]"
    )


def test_chat_template_without_end_tokens_gets_one_at_the_end() -> None:
    assert chat(PLAIN) == "user: one?\nassistant: [[1\n]]user: two?\nassistant: [[2 \u4f60\n</s>]]"


def test_chat_train_on_all() -> None:
    assert chat(PLAIN, TALK[:2], train_on="all") == "[[user: one?\nassistant: 1\n</s>]]"


def test_chat_template_that_rewrites_earlier_turns_is_refused() -> None:
    with pytest.raises(DataError, match="set.jsonl:7: .* message 2 differently"):
        chat(FORGETFUL)
    assert chat(FORGETFUL, TALK[:2]).endswith("<s>assistant\n[[1</s>]]\n")


@pytest.mark.parametrize(
    "messages, words",
    [
        ("hello", "not a list"),
        ([], "not a list with at least one"),
        ([{"role": "user", "content": "a"}], "no trained token: no message of role assistant"),
        ([{"role": "user"}, *TALK], "message 1 has no text 'content'"),
        (["hello"], "message 1 is str"),
    ],
)
def test_malformed_conversation_names_the_record(messages: Any, words: str) -> None:
    with pytest.raises(DataError, match=f"set.jsonl:7: .*{words}"):
        samples({"messages": messages}, format="chat")


def test_chat_needs_a_template() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        samples({"messages": TALK}, tokenizer=tokenizer, format="chat")


def test_template_refusal_is_told() -> None:
    with pytest.raises(DataError, match="refuses this conversation: no tools"):
        chat("{{ raise_exception('no tools') }}")


def test_empty_answer_is_an_error() -> None:
    with pytest.raises(DataError, match="set.jsonl:7: no trained token"):
        samples({"instruction": "a", "output": ""})


def test_missing_field_names_the_nearest() -> None:
    with pytest.raises(DataError, match="set.jsonl:7: no field 'output'") as caught:
        samples({"instruction": "a", "outputs": "b"})
    assert "did you mean 'outputs'?" in caught.value.hint


@pytest.mark.parametrize("value, words", [(5, "is int, not text"), (None, "is null"), (["a"], "is list")])
def test_wrong_type_is_named(value: Any, words: str) -> None:
    with pytest.raises(DataError, match=f"set.jsonl:7: field 'output' {words}"):
        samples({"instruction": "a", "output": value})


def test_too_long_names_length_and_limit() -> None:
    record = {"prompt": "a" * 10, "completion": "b" * 10}
    with pytest.raises(DataError, match="set.jsonl:7: 21 tokens, but data.sequence_length is 16") as caught:
        samples(record, format="completion", data={"sequence_length": 16})
    assert "truncate" in caught.value.hint and "drop" in caught.value.hint


def test_too_long_truncated_keeps_the_head_and_counts() -> None:
    counts = Counts()
    (sample,) = samples(
        {"prompt": "a" * 10, "completion": "b" * 10},
        format="completion",
        data={"sequence_length": 16, "too_long": "truncate"},
        counts=counts,
    )
    assert marked(sample) == "a" * 10 + "[[bbbbbb]]"
    assert (counts.records, counts.truncated, counts.dropped) == (1, 1, 0)


def test_truncated_to_its_prompt_is_an_error() -> None:
    with pytest.raises(DataError, match="no trained token: its prompt alone fills the 16"):
        samples(
            {"prompt": "a" * 16, "completion": "b"},
            format="completion",
            data={"sequence_length": 16, "too_long": "truncate"},
        )


def test_too_long_dropped_counts() -> None:
    counts = Counts()
    record = {"prompt": "a" * 20, "completion": "b"}
    assert not samples(
        record, format="completion", data={"sequence_length": 16, "too_long": "drop"}, counts=counts
    )
    assert counts.dropped == 1
