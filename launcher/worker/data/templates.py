"""The text that an instruction becomes, the same in training, evaluation and generation.

The template of the papers (METHODS.md 4.1: one preamble sentence, `### Instruction:`, `### Response:`)
with these departures, on purpose:
- no indentation: theirs sits inside code and carries 16 spaces at the head of every line but the first;
- one template, not two: theirs has two spaces after the preamble and 16 on the blank line in training only;
- the response starts on the line after `### Response:` in both, and the prompt ends with that line break;
- a record with an `input` gets the Alpaca preamble and section for it; the papers' records have none.
Loss is by default on the response and its end token; the papers train on every token (train_on: all).
"""

from __future__ import annotations

from collections.abc import Mapping

_PLAIN = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def instruction_prompt(record: Mapping[str, str]) -> str:
    """The text a model sees before it answers; the answer follows with nothing between.

    Args:
        record: `instruction`, and `input` if there is one (an empty one counts as none).
    """
    text = record.get("input", "")
    if text:
        return _WITH_INPUT.format(instruction=record["instruction"], input=text)
    return _PLAIN.format(instruction=record["instruction"])
