"""Where records come from: files of every kind, read one record at a time, each knowing its place."""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from decompft.launcher.errors import DataError
from decompft.launcher.recipe import Source

# .gz and .zst of the text ones too
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record as it was read."""

    where: str  # "path:line" or "path: record 7", for messages
    index: int  # position in its source, from 0
    values: dict[str, Any]


def iter_records(source: Source, *, streaming: bool = False) -> Iterator[Record]:
    """The records of a source in file order, at most `max_records` of them.

    Args:
        streaming: read a hub set over the network instead of downloading it first.

    Raises:
        DataError: missing or broken file, or no record at all; the message names file and line.
    """
    if source.hub is not None:
        from decompft.launcher.worker.data.hub import iter_hub

        rows = iter_hub(source, streaming)
    else:
        rows = (row for path in source_files(source) for row in _read(path))
    index = -1
    for index, (where, values) in enumerate(islice(rows, source.max_records)):
        if not isinstance(values, dict):
            raise DataError(
                f"{where}: expected an object with fields, found {type(values).__name__}",
                'a record looks like {"instruction": "...", "output": "..."}',
            )
        yield Record(where=where, index=index, values=values)
    if index < 0:
        raise DataError(f"{source_name(source)}: the data set is empty", "no record was found in it")


def source_name(source: Source) -> str:
    """How messages and reports call a source."""
    if source.path is not None:
        return source.path
    return ":".join(part for part in (source.hub, source.name, source.split) if part)


def source_files(source: Source) -> list[Path]:
    """The files that `path` names, sorted.

    Raises:
        DataError: there is none, or one of a kind that cannot be read.
    """
    assert source.path is not None, "hub sources have no files"
    path = Path(source.path).expanduser()
    if path.is_dir():
        raise DataError(f"{path}: is a folder", f"name the files in it, e.g. {path}/*.jsonl")
    if path.is_file():
        files = [path]
    else:
        files = sorted(Path(f) for f in glob.glob(str(path), recursive=True) if Path(f).is_file())
    if not files:
        raise DataError(f"{path}: no such file", _near_file(path))
    for file in files:
        if _kind(file) not in SUFFIXES:
            raise DataError(
                f"{file}: unknown kind of data file {file.suffix!r}",
                f"known: {', '.join(SUFFIXES)}, text ones also as .gz or .zst",
            )
    return files


def text_field(record: Record, name: str, mapping: dict[str, str], *, required: bool = True) -> str:
    """The text of one of our fields; "" for an absent optional one.

    Args:
        mapping: our field name -> the file's (`data.*.fields`).

    Raises:
        DataError: the field is missing or is not text.
    """
    value = raw_field(record, name, mapping, required=required)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{record.where}: field {mapping.get(name, name)!r} is {type(value).__name__}, not text",
            "numbers and lists have to be written out as text before training on them",
        )
    return value


def raw_field(record: Record, name: str, mapping: dict[str, str], *, required: bool = True) -> Any:
    """The value of one of our fields as it was read; None for an absent optional one."""
    key = mapping.get(name, name)
    value = record.values.get(key)
    if value is None and (required or name in mapping):
        if key in record.values:
            raise DataError(
                f"{record.where}: field {key!r} is null", "give it a value, or leave the record out"
            )
        present = [str(k) for k in record.values]
        near = difflib.get_close_matches(key, present, n=1, cutoff=0.5)
        found = f"the record has {', '.join(present) or 'no fields'}"
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(
            f"{record.where}: no field {key!r}; {found}",
            f"{hint}a field of another name is given as fields: {{{name}: {near[0] if near else 'NAME'}}}",
        )
    return value


def _kind(path: Path) -> str:
    suffixes = path.suffixes
    return suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in (".gz", ".zst") else path.suffix


def _near_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either; paths in a recipe are relative to its folder"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"did you mean {near[0]}?" if near else f"nothing like it lies in {path.parent}"


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        yield from _READERS[_kind(path)](path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error.reason}", "save it as UTF-8") from error
    except (OSError, EOFError) as error:
        raise DataError(
            f"{path}: cannot be read: {error}", "the file may be damaged, or not yours to read"
        ) from error


def _open_text(path: Path) -> IO[str]:
    # utf-8-sig: files saved on Windows begin with a mark that is no part of the first field's name
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    if path.suffix == ".zst":
        import pyarrow as pa

        stream = pa.input_stream(str(path), compression="zstd")
        return io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with _open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    value = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{path}:{number}: broken JSON: {error.msg} (column {error.colno})",
                        "a .jsonl file holds one complete JSON object a line",
                    ) from error
                yield f"{path}:{number}", value


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    with _open_text(path) as text:
        try:
            value = json.load(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{error.lineno}: broken JSON: {error.msg} (column {error.colno})",
                "a file with one object a line should be named .jsonl",
            ) from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of records, or an object with a list named data")
    for number, record in enumerate(value, start=1):
        yield f"{path}: record {number}", record


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the module's default refuses a document over 128 KiB
    with _open_text(path) as text:
        reader = csv.DictReader(text, delimiter="\t" if _kind(path) == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                if None in row:
                    raise DataError(
                        f"{path}:{reader.line_num}: more cells than the header has names",
                        "a cell that contains the separator has to be quoted",
                    )
                yield f"{path}:{reader.line_num}", row
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: broken CSV: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _numbered(path, file.iter_batches(batch_size=1024))
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


def _arrow(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                table = pa.ipc.open_file(path)
                yield from _numbered(path, (table.get_batch(i) for i in range(table.num_record_batches)))
            else:  # the stream form, which `datasets` writes
                file.seek(0)
                yield from _numbered(path, pa.ipc.open_stream(file))
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Arrow file: {error}") from error


def _numbered(path: Path, batches: Any) -> Iterator[tuple[str, Any]]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"{path}: record {number}", row


def _txt(path: Path) -> Iterator[tuple[str, Any]]:
    with _open_text(path) as text:
        yield str(path), {"text": text.read()}


_READERS = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".txt": _txt,
}
