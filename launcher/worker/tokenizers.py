"""Which tokenizer a recipe uses: a file, a folder, the hub, or bytes.

Every document of a data set starts as the tokenizer itself would start it and ends with its end token;
padding is never told from an end token by its id (the masks come from construction), so a tokenizer
whose pad token is its end token is as good as any.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from decompft.launcher.errors import ModelError
from decompft.launcher.recipe import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTE_VOCAB_SIZE = 260  # 256 bytes, <s>, </s>, <pad>, <spare>

_BYTE_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ bos_token + message['role'] + '\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant\\n' }}{% endif %}"
)
# none begins with a space: there the two differ by design (transformers adds no second one)
_PROBES = ("Hello world, 1234.", "two  spaces", "a\nb")


def load_tokenizer(model: ModelSection, model_dir: Path | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe's model.

    Args:
        model: `model.tokenizer` wins, then `model_dir`, then bytes (config model) or the hub id.
        model_dir: local folder of the checkpoint, None for a model that has none.

    Raises:
        ModelError: it does not exist, cannot be read, or is not reachable from here.
    """
    if model.tokenizer is not None:
        return _from_place(model.tokenizer, "main", model.trust_remote_code)
    if model_dir is not None:
        return _from_folder(model_dir, model.trust_remote_code)
    if model.id is None:
        return byte_tokenizer()
    return _from_place(model.id, model.revision, model.trust_remote_code)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of the 256 bytes: id = byte value, then <s> 256, </s> 257, <pad> 258, <spare> 259."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {char: byte for byte, char in enumerate(_byte_chars())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>", "<pad>", "<spare>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=_BYTE_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer so that `load_tokenizer` of the folder gives the same one."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id that is safe to fill rows with; padding is masked by position, never by this id."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def _byte_chars() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (as in GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    chars, spare = [], 0x100
    for byte in range(256):
        if byte in printable:
            chars.append(chr(byte))
        else:
            chars.append(chr(spare))
            spare += 1
    return chars


def _from_place(place: str, revision: str, trust_code: bool) -> PreTrainedTokenizerBase:
    path = Path(place)
    if path.is_dir():
        return _from_folder(path, trust_code)
    if path.is_file():
        return _from_file(path, trust_code)
    if path.is_absolute() or path.suffix in {".json", ".model", ".gguf"} or place.count("/") > 1:
        raise ModelError(
            f"{place}: there is no such tokenizer file or folder",
            "model.tokenizer takes a folder, a tokenizer.json, a sentencepiece .model file or a hub id",
        )
    return _from_hub(place, revision, trust_code)


def _from_folder(folder: Path, trust_code: bool) -> PreTrainedTokenizerBase:
    names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if "tokenizer.model" in names and not names & {"tokenizer.json", "tokenizer_config.json"}:
        return _from_sentencepiece(folder / "tokenizer.model")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_code)
    except Exception as error:  # the library raises many types for one fact: no tokenizer can be made of this
        raise ModelError(
            f"{folder}: no tokenizer could be read from this folder: {_first_line(error)}",
            "it should hold tokenizer.json or tokenizer.model; or name another with model.tokenizer",
        ) from error


def _from_file(path: Path, trust_code: bool) -> PreTrainedTokenizerBase:
    if path.suffix == ".model":
        return _from_sentencepiece(path)
    if path.suffix != ".json":
        raise ModelError(
            f"{path}: a tokenizer file ends in .json (tokenizers) or .model (sentencepiece)",
            "give its folder, if it lies in one with its configuration",
        )
    sibling = path.parent / "tokenizer_config.json"
    if path.name == "tokenizer.json" and sibling.is_file():
        return _from_folder(path.parent, trust_code)
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"{path}: not a tokenizer.json: {_first_line(error)}") from error
    specials = _special_names(tokenizer.get_added_tokens_decoder())
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **specials)


def _special_names(added: Mapping[int, object]) -> dict[str, str]:
    """Roles of the usual special tokens, which a bare tokenizer.json does not record."""
    known = {
        "bos_token": ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>"),
        "eos_token": ("</s>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "<eos>"),
        "pad_token": ("<pad>", "[PAD]"),
        "cls_token": ("[CLS]",),
        "sep_token": ("[SEP]",),
    }
    texts = {str(getattr(token, "content", token)) for token in added.values()}
    return {role: next(n for n in names if n in texts) for role, names in known.items() if texts & set(names)}


def _from_sentencepiece(path: Path) -> PreTrainedTokenizerBase:
    """A Llama-like sentencepiece model, proved against sentencepiece itself.

    AutoTokenizer reads a bare .model file as well, but without the leading space of its training; the
    Llama class has it, and adds the begin token that its family was trained with when asked.
    """
    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaTokenizer

    try:
        reference = SentencePieceProcessor(model_file=str(path))
    except Exception as error:
        raise ModelError(f"{path}: not a sentencepiece model: {_first_line(error)}") from error
    with tempfile.TemporaryDirectory() as folder:  # the class looks for a fixed file name
        (Path(folder) / "tokenizer.model").symlink_to(path.resolve())
        tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=reference.bos_id() >= 0)
    for probe in _PROBES:
        if tokenizer(probe, add_special_tokens=False)["input_ids"] != reference.encode(probe):
            raise ModelError(
                f"{path}: this sentencepiece model is not of the Llama kind (BPE with a leading space)",
                "give the folder of the model it belongs to, with its tokenizer_config.json",
            )
    return tokenizer


def _from_hub(name: str, revision: str, trust_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_code)
    except Exception as error:  # network, authentication and parsing all raise their own types
        raise ModelError(
            f"{name}: no such folder here, and the hub could not give its tokenizer: {_first_line(error)}",
            "without a network, give a local folder (model.id or model.tokenizer), or run "
            "`decompft fetch RECIPE` where there is one",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
