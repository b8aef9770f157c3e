"""How a GGUF file becomes a folder that everything else reads: safetensors, config and tokenizer.

Converted once and kept in the user's cache under the file's own hash. transformers reads the tensors;
two things it does not do are done here: it cannot save such a model (its quantized config refuses),
and its tokenizer takes the begin token for the end token (transformers 5.17, integrations/ggml.py,
GGUFLlamaConverter), which would train and stop on the wrong one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decompft.launcher.errors import ModelError
from decompft.launcher.places import cache_dir

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONVERTER = 1  # raise it when the same file would give other bytes: part of the cache key
RECORD = "decompft.json"  # in a converted folder: what it was made of
_PLAIN = {"F32", "F16", "BF16"}  # tensor types of a file that was never quantized
_ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # GGUF's words: transformers'


def converted(path: Path, say: Callable[[str], None], environ: Mapping[str, str] = os.environ) -> Path:
    """The folder that the GGUF file was converted into, now or earlier.

    Args:
        path: the file; of a model in one file.
        say: takes a line for the user, before work that lasts.

    Raises:
        ModelError: not readable, in several files, of an architecture that transformers lacks, or no space.
    """
    _refuse_split(path)
    digest = _digest(path)
    parent = cache_dir(environ) / "models"
    folder = parent / f"{path.stem}-{digest[:16]}-v{CONVERTER}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        waiting = f"{path.name}: another process is converting it; waiting"
        with _locked(parent / f"{folder.name}.lock", lambda: say(waiting)):
            if not (folder / RECORD).is_file():
                say(f"{path.name}: converting to safetensors, once, into {folder}")
                _convert(path, digest, folder, say)
                say(f"{path.name}: converted")
    except OSError as error:
        raise ModelError(
            f"model.id: cannot convert {path} into {folder}: {error}",
            "it needs about twice the size of the file; DECOMPFT_CACHE names another cache folder",
        ) from error
    return folder


def _convert(path: Path, digest: str, folder: Path, say: Callable[[str], None]) -> None:
    """Into a temporary folder beside it, then renamed: a folder with its final name is whole."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fields, types = _header(path)
        with _no_bars():
            model = _plain_model(path, is_quantized=not types <= _PLAIN)
            model.save_pretrained(temporary)
            try:
                _tokenizer(path, fields).save_pretrained(temporary)
            except ModelError as error:
                say(str(error))  # fatal only if the recipe names no other tokenizer
        record = {
            "source": str(path.resolve()),
            "sha256": digest,
            "converter": CONVERTER,
            "transformers": version("transformers"),
            "gguf": version("gguf"),
        }
        (temporary / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors writes 0600, and a cache may be shared
            _sync(file)
        temporary.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)  # without its record: left by hand, never by us
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _plain_model(path: Path, *, is_quantized: bool) -> PreTrainedModel:
    """The model with dense weights and a config that says nothing of GGUF."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except Exception as error:  # the readers raise KeyError, ValueError, OSError, ... for one fact
        raise ModelError(
            f"model.id: transformers {version('transformers')} cannot read {path}: {_first_line(error)}",
            "get the model as safetensors instead (a hub id or a local folder)",
        ) from error
    config = read.config
    config.dtype = torch.bfloat16
    config._name_or_path = ""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        fresh: PreTrainedModel = type(read)(config)
    weights = {name: _compact(tensor, is_quantized) for name, tensor in read.state_dict().items()}
    fresh.load_state_dict(weights, assign=True)  # assign: each tensor keeps its own dtype
    fresh.tie_weights()
    fresh.generation_config = read.generation_config
    return fresh


def _compact(tensor: torch.Tensor, is_quantized: bool) -> torch.Tensor:
    """bfloat16 where that is exact; else the file's own precision, unless it was quantized."""
    import torch

    half = (torch.bfloat16,) if is_quantized and tensor.ndim > 1 else (torch.bfloat16, torch.float16)
    for dtype in half:
        if torch.equal(tensor.to(dtype).float(), tensor):
            return tensor.to(dtype)
    # the finest quantization, Q8_0, rounds to 2**-8 of a block's maximum; bfloat16 to 2**-9 of the value
    return tensor.to(torch.bfloat16) if is_quantized and tensor.ndim > 1 else tensor


def _tokenizer(path: Path, fields: dict[str, Any]) -> PreTrainedTokenizerBase:
    """transformers' tokenizer with the special tokens that the file names."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # as above
        raise ModelError(
            f"{path.name}: transformers cannot read the tokenizer in it: {_first_line(error)}",
            "name the model's own tokenizer with model.tokenizer",
        ) from error
    for gguf_role, role in _ROLES.items():
        token = fields.get(f"tokenizer.ggml.{gguf_role}_token_id")
        text = None if token is None else tokenizer.convert_ids_to_tokens(int(token))
        setattr(tokenizer, f"{role}_token", text)
    add_bos = fields.get("tokenizer.ggml.add_bos_token")
    if add_bos is None:  # llama.cpp's defaults: sentencepiece models begin with it, BPE ones do not
        add_bos = fields.get("tokenizer.ggml.model") == "llama"
    tokenizer.clean_up_tokenization_spaces = False  # decoding must give back what was encoded
    tokenizer.add_bos_token = bool(add_bos) and tokenizer.bos_token is not None
    return tokenizer


def _header(path: Path) -> tuple[dict[str, Any], set[str]]:
    """The file's tokenizer scalars and the names of its tensor types."""
    from gguf import GGUFReader  # 0.1 s, and an object for every token: not for the control plane

    try:
        reader = GGUFReader(path)
    except Exception as error:  # the reader indexes into a memory map: any exception says the same
        raise ModelError(
            f"model.id: cannot read {path} as a GGUF file: {_first_line(error)}",
            "the file may be cut short; copy it again and compare its size",
        ) from error
    wanted = {"tokenizer.ggml.model", "tokenizer.ggml.add_bos_token"}
    wanted |= {f"tokenizer.ggml.{role}_token_id" for role in _ROLES}
    fields = {key: field.contents() for key, field in reader.fields.items() if key in wanted}
    return fields, {tensor.tensor_type.name for tensor in reader.tensors}


def _refuse_split(path: Path) -> None:
    if "-of-" in path.stem and path.stem.rpartition("-of-")[2].isdigit():
        raise ModelError(
            f"model.id: {path.name} is one part of a GGUF model in several files",
            "join them first: `llama-gguf-split --merge FIRST_PART OUT.gguf`",
        )


@contextlib.contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock file; the lock goes with the process, so that a killed one leaves nothing to clean."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """transformers' progress bars are one character a tensor in a log file."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"model.id: cannot read {path}: {error}", "check its permissions") from error


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
