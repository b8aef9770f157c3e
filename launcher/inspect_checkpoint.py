"""`decompft inspect checkpoint`: which folders a PATH means, what is told of them, and the exit code."""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decompft.launcher.checkpoint_survey import (
    Found,
    Leftover,
    examine,
    holds_checkpoints,
    is_checkpoint,
    leftovers,
    size_text,
    survey,
)
from decompft.launcher.errors import EXIT_DONE, EXIT_FAILED, UserError
from decompft.launcher.runs import find_run
from decompft.launcher.say import to_stderr

_VALUE_WIDTH = 100  # of a printed value of the state; --json has all of it
_HINT = "name a run, its folder checkpoints, or one checkpoint in it (RUN/checkpoints/step-NNNNNNNN)"


def inspect_checkpoint(path: str, *, as_json: bool) -> int:
    """Print what is known of a checkpoint, a run, or a folder of checkpoints.

    Returns:
        0, or 3 when anything is damaged.

    Raises:
        UserError: no such path, or it is none of these.
    """
    place = _place(path)
    if is_checkpoint(place):
        found = [examine(place, to_stderr)]
        text, report = _one(found[0]), _one_report(found[0])
    else:
        found, beside = survey(place, to_stderr), leftovers(place)
        text, report = _many(place, found, beside), _many_report(place, found, beside)
    print(json.dumps(report, indent=1, sort_keys=True) if as_json else "\n".join(text))
    return EXIT_DONE if all(each.problem is None for each in found) else EXIT_FAILED


def pair_to_compare(first: str, second: str) -> tuple[Path, Path] | None:
    """The two verified checkpoints that are to be compared; a run means its newest whole one.

    Returns:
        None when one is damaged, which was said on stderr.

    Raises:
        UserError: no such path, or nothing there to compare.
    """
    pair = []
    is_fine = True
    for typed in (first, second):
        place = _place(typed)
        found = [examine(place, to_stderr)] if is_checkpoint(place) else survey(place, to_stderr)
        for each in found:
            if each.problem is not None:
                to_stderr(f"{each.path}: {each.verdict}: {each.problem}")
        whole = [each.path for each in found if each.problem is None]
        if not found:
            raise UserError(f"{typed}: has no checkpoint to compare", _HINT)
        if not whole:
            is_fine = False
            continue
        if len(found) > 1:
            to_stderr(f"{typed}: {whole[-1].name} is its newest whole checkpoint")
        pair.append(whole[-1])
    return (pair[0], pair[1]) if is_fine else None


def _place(typed: str) -> Path:
    """The checkpoint, or the folder of checkpoints; runs are also looked for by name under ./runs.

    Raises:
        UserError: it is neither.
    """
    path = find_run(typed)
    if not path.exists():
        raise UserError(f"{typed}: no such folder", _HINT)
    if is_checkpoint(path):
        return path
    if (path / "checkpoints").is_dir() or (path / "plan.json").is_file():
        return path / "checkpoints"  # of a run that may have none yet
    if holds_checkpoints(path) or (path.name == "checkpoints" and path.is_dir()):
        return path
    raise UserError(f"{typed}: neither a checkpoint, nor a run, nor a folder of checkpoints", _HINT)


# -- a folder of checkpoints --


def _many(place: Path, found: Sequence[Found], beside: Sequence[Leftover]) -> list[str]:
    if not found:
        lines = [f"{place}: no checkpoint"]
    else:
        rows: list[tuple[str, ...]] = [
            ("step", "state", "size", "ranks", "incarnation", "age", "eval loss", "method", "base")
        ]
        rows += [_row(each) for each in found]
        lines = [str(place), *_aligned(rows)]
        lines += [f"{each.path.name}: {each.verdict}: {each.problem}" for each in found if each.problem]
        whole = [each.path.name for each in found if each.verdict == "whole"]
        nothing = (
            "none is whole but what is suspect"
            if any(not each.problem for each in found)
            else "none is whole"
        )
        lines.append(f"the newest whole one is {whole[-1]}" if whole else nothing)
    if beside:
        lines.append("leftovers")
        lines += _aligned(
            [(b.path.name, size_text(b.num_bytes), _deletable(b), b.why) for b in beside], right=(1,)
        )
    return lines


def _row(each: Found) -> tuple[str, ...]:
    return (
        _or_dash(each.step), each.verdict, size_text(each.num_bytes), _or_dash(each.world_size),
        _or_dash(each.incarnation), _age(each.saved_at), "-" if each.eval_loss is None else f"{each.eval_loss:.4f}",
        _method(each), _base(each),
    )  # fmt: skip


def _many_report(place: Path, found: Sequence[Found], beside: Sequence[Leftover]) -> dict[str, Any]:
    whole = [each.path.name for each in found if each.verdict == "whole"]
    return {
        "path": str(place),
        "checkpoints": [_head(each) for each in found],
        "newest_whole": whole[-1] if whole else None,
        "leftovers": [
            {"name": b.path.name, "num_bytes": b.num_bytes, "may_delete": b.may_delete, "why": b.why}
            for b in beside
        ],
    }


def _head(each: Found) -> dict[str, Any]:
    return {
        "path": str(each.path), "step": each.step, "verdict": each.verdict, "problem": each.problem,
        "format": each.version, "reason": each.reason, "world_size": each.world_size, "incarnation": each.incarnation,
        "num_bytes": each.num_bytes, "num_files": each.num_files, "saved_at": each.saved_at,
        "eval_loss": each.eval_loss,
        "method": _object(each.adapter, "adapter").get("method"), "base": _base(each),
    }  # fmt: skip


# -- one checkpoint --


def _one(each: Found) -> list[str]:
    lines = [f"{each.path}: {each.verdict}: {each.problem or 'every file is as its manifest says'}"]
    written = f"step {_or_dash(each.step)}, {size_text(each.num_bytes)} in {each.num_files} files"
    if each.world_size is not None:
        ranks = "1 rank" if each.world_size == 1 else f"{each.world_size} ranks"
        written += f", written {_age(each.saved_at)} ago by incarnation {each.incarnation} on {ranks}"
        written += f" ({each.reason})" if each.reason else ""
    lines.append(f"{written}, format {each.version}" if each.version is not None else written)
    if each.adapter:
        lines.append(f"adapter {_method(each)} over {_base(each)}")
    if each.tensors:
        rows = [("kind", "tensors", "numbers", "size", "dtype", "shapes")]
        rows += [
            (
                kind, str(k["num_tensors"]), f"{k['num_numbers']:,}", size_text(k["num_bytes"]),
                ", ".join(k["dtypes"]), _shapes(k["shapes"]),
            )
            for kind, k in _kinds(each).items()
        ]  # fmt: skip
        lines += ["tensors", *_aligned(rows, right=(1, 2, 3))]
    if each.state:
        flat = [(key, _shortened(value)) for key, value in _flat(each.state, 2).items()]
        lines += ["state", *_aligned(flat, right=())]
    return lines


def _one_report(each: Found) -> dict[str, Any]:
    return {**_head(each), "tensors": _kinds(each), "state": each.state, "adapter": each.adapter}


def _kinds(each: Found) -> dict[str, dict[str, Any]]:
    """Kind of state -> counts, dtypes and shapes; parameters and moments first."""
    found: dict[str, dict[str, Any]] = {}
    for kinds in each.tensors.values():
        for kind, entry in kinds.items():
            blank = {"num_tensors": 0, "num_numbers": 0, "num_bytes": 0, "dtypes": set(), "shapes": Counter()}
            k, numbers = found.setdefault(kind, blank), math.prod(entry["shape"])
            k["num_tensors"] += 1
            k["num_numbers"] += numbers
            k["num_bytes"] += numbers * _itemsize(entry["dtype"])
            k["dtypes"].add(entry["dtype"])
            k["shapes"][tuple(entry["shape"])] += 1
    first = ("param", "exp_avg", "exp_avg_sq", "step")
    order = sorted(found, key=lambda kind: (first.index(kind) if kind in first else len(first), kind))
    return {
        kind: found[kind]
        | {
            "dtypes": sorted(found[kind]["dtypes"]),
            "shapes": [{"shape": list(s), "num": n} for s, n in found[kind]["shapes"].most_common()],
        }
        for kind in order
    }


def _shapes(shapes: list[dict[str, Any]]) -> str:
    shown = [f"{s['num']} x {s['shape']}" for s in shapes[:4]]
    return ", ".join([*shown, "..."] if len(shapes) > 4 else shown)


def _itemsize(dtype: str) -> int:
    """Bytes of a number: a dtype's name ends, or goes on, after its bits (float32, float8_e4m3fn)."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) // 8 if bits else 1


def _flat(value: dict[str, Any], depth: int, prefix: str = "") -> dict[str, Any]:
    """Dotted keys, down to so many levels."""
    flat: dict[str, Any] = {}
    for key, item in sorted(value.items()):
        if isinstance(item, dict) and item and depth > 1:
            flat |= _flat(item, depth - 1, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _shortened(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= _VALUE_WIDTH else f"{text[: _VALUE_WIDTH - 4]} ..."


# -- words --


def _method(each: Found) -> str:
    section = _object(each.adapter, "adapter")
    method, rank = section.get("method"), section.get("rank")
    return f"{method} r={rank}" if method and rank else str(method or "-")


def _base(each: Found) -> str:
    """Name, format and the beginning of the hash that decides whether it is the same base."""
    base = _object(each.state, "base") or _object(each.adapter, "base")
    name = base.get("id") or Path(str(base.get("source") or "")).name
    if not name and "config" in base:
        name = f"{_object(base, 'config').get('model_type', 'model')} from a config"
    quantization = _object(base, "quantization").get("format")
    parts = (str(name), str(quantization or ""), str(base.get("sha256", ""))[:12])
    return " ".join(part for part in parts if part) or "-"


def _object(holder: dict[str, Any], key: str) -> dict[str, Any]:
    """What was written by hand may hold anything."""
    value = holder.get(key)
    return value if isinstance(value, dict) else {}


def _deletable(leftover: Leftover) -> str:
    return "may be deleted" if leftover.may_delete else "do not delete"


def _age(saved_at: float) -> str:
    age_s = max(0.0, time.time() - saved_at)  # clocks of two machines differ
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if age_s >= unit:
            return f"{age_s / unit:.0f} {name}"
    return f"{age_s:.0f} s"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _aligned(rows: Sequence[tuple[str, ...]], right: tuple[int, ...] = (0, 2, 3, 4, 5, 6)) -> list[str]:
    """Columns as wide as they need: a log has no width, and a wrapped table cannot be searched."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
