"""How a prompt becomes tokens the way training wrote it, and tokens become an answer."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from decompft.adapters.merge import dense_bytes, make_dense
from decompft.launcher.errors import DataError, UserError
from decompft.launcher.worker.data.encode import Encoder
from decompft.launcher.worker.data.rendered import Rendered
from decompft.launcher.worker.data.templates import instruction_prompt
from decompft.launcher.worker.inference import Loaded
from decompft.launcher.worker.tokenizers import pad_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Format = Literal["chat", "instruction", "plain"]


def choose_format(loaded: Loaded) -> Format:
    """The format of the data that the adapter was trained on; a bare base that can chat is asked so."""
    if "chat" in loaded.formats or (not loaded.formats and loaded.tokenizer.chat_template):
        return "chat"
    return "instruction" if "instruction" in loaded.formats else "plain"


def prompt_ids(prompt: str, form: Format, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt, its begin token included.

    Raises:
        UserError: format chat, and the tokenizer has no template.
    """
    if form != "chat":
        text = prompt if form == "plain" else instruction_prompt({"instruction": prompt})
        return encode_prompts([text], tokenizer)[0]
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template", "use --format instruction or plain")
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def encode_prompts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of texts that an answer follows: begun as documents are, not ended."""
    items = [Rendered(text=text, spans=(), add_eos=False) for text in texts]
    return [ids.tolist() for ids, _ in Encoder(tokenizer).encode(items)]


def stop_ids(loaded: Loaded) -> list[int]:
    """Tokens that end an answer: the end token, the end of a turn, and what the model's folder names."""
    tokenizer = loaded.tokenizer
    found = {tokenizer.eos_token_id, _turn_end(tokenizer)}
    config = None if loaded.model_dir is None else loaded.model_dir / "generation_config.json"
    if config is not None and config.is_file():
        named = json.loads(config.read_text(encoding="utf-8")).get("eos_token_id")
        found |= set(named) if isinstance(named, list) else {named}
    return sorted(found - {None})


def unpack_if_room(loaded: Loaded) -> None:
    """Merge and dequantize once, where memory allows, instead of for every token that is written."""
    model = loaded.model.model
    dtype = model.get_input_embeddings().weight.dtype
    if loaded.device.type == "cuda":
        free = torch.cuda.mem_get_info(loaded.device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 1.5 * dense_bytes(model, dtype) < free:
        make_dense(model, dtype)


def generate(loaded: Loaded, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
    """Greedy continuations, without the token that ended them.

    Args:
        prompts: token ids; shorter ones are padded at the left.
        max_new_tokens: at most; fewer where the model's positions end.

    Raises:
        DataError: a prompt fills all positions that the model has.
    """
    from transformers import GenerationConfig

    unpack_if_room(loaded)
    longest = max(len(p) for p in prompts)
    room = positions(loaded) - longest
    if room < 1:
        raise DataError(
            f"the prompt has {longest} tokens, and the model {positions(loaded)} positions", "make it shorter"
        )
    stops, pad = stop_ids(loaded), pad_id(loaded.tokenizer)
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=loaded.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=loaded.device)
    # training turned the cache off in the model's config; here it is what makes a token cost a token
    how = GenerationConfig(
        max_new_tokens=min(max_new_tokens, room),
        do_sample=False,
        use_cache=True,
        eos_token_id=stops,
        pad_token_id=pad,
    )
    with torch.inference_mode():
        out = loaded.model.model.generate(input_ids=ids, attention_mask=mask, generation_config=how)
    return [_until(row, stops) for row in out[:, longest:].tolist()]


def positions(loaded: Loaded) -> int:
    """How many tokens the model has positions for."""
    return getattr(loaded.model.config, "max_position_embeddings", None) or sys.maxsize


def _until(ids: list[int], stops: list[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in stops), len(ids))]


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes after an assistant's answer."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | {
        i for i, t in tokenizer.added_tokens_decoder.items() if t.special
    }
    last = [token for token in ids[-2:] if token in special]  # a line break may follow it
    return last[-1] if last else None
