"""`inspect checkpoint`: what lies there is listed and verified without torch; two of them: test_inspect_compare.py."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from decompft.launcher.checkpoint_survey import leftovers, survey
from decompft.launcher.checkpoints import FORMAT_VERSION, newest_valid
from decompft.launcher.cli import main
from decompft.launcher.errors import CheckpointError
from decompft.launcher.worker.restore import open_checkpoint

Capture = pytest.CaptureFixture[str]
Whole = dict[tuple[str, str], Tensor]  # (name, kind) -> the whole tensor
BASE = {"id": "org/llama", "sha256": "c0ffee" * 10 + "beef", "quantization": {"format": "nf4"}}
ADAPTER = {"adapter": {"method": "map", "rank": 4}, "base": BASE}


def make_whole() -> Whole:
    g = torch.Generator().manual_seed(0)
    whole = {
        (f"layers.{n}.{part}", kind): torch.randn(shape, generator=g)
        for n in range(2)
        for part, shape in (("A", (4, 8)), ("B", (8, 4)))
        for kind in ("param", "exp_avg", "exp_avg_sq")
    }
    whole |= {(name, "step"): torch.tensor([3.0]) for name, kind in list(whole) if kind == "param"}
    return whole | {("layers.0.A", "codes"): torch.arange(32, dtype=torch.uint8).view(4, 8)}


def write_checkpoint(
    folder: Path, whole: Whole, *, world_size: int = 2, version: int = FORMAT_VERSION, **state: Any
) -> Path:
    """A checkpoint as the ranks write it, each tensor cut into as many spans as there are ranks."""
    (folder / "state").mkdir(parents=True)
    tensors: dict[str, Any] = {}
    ranks: list[Whole] = [{} for _ in range(world_size)]
    for (name, kind), tensor in whole.items():
        parts, flat = [], tensor.reshape(-1)
        chunk = math.ceil(flat.numel() / world_size)
        for rank in range(world_size):
            piece = flat[rank * chunk : (rank + 1) * chunk].clone()
            if piece.numel():
                ranks[rank][f"{name}|{kind}|{rank * chunk}"] = piece  # type: ignore[index]
                file = f"state/rank-{rank:05d}.safetensors"
                parts.append({"file": file, "start": rank * chunk, "numel": piece.numel()})
        dtype = str(tensor.dtype).removeprefix("torch.")
        tensors.setdefault(name, {})[kind] = {"dtype": dtype, "shape": list(tensor.shape), "parts": parts}
    files = {f"state/rank-{rank:05d}.safetensors": save(pieces) for rank, pieces in enumerate(ranks)}
    files["adapter.safetensors"] = save({name: t for (name, kind), t in whole.items() if kind == "param"})
    files["adapter.json"] = json.dumps(ADAPTER).encode()
    records = {}
    for name, content in files.items():
        (folder / name).write_bytes(content)
        records[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    step = int(folder.name.rpartition("-")[2])
    head = {"version": version, "step": step, "world_size": world_size, "incarnation": 7}
    head |= {"time_s": time.time() - 7300, "eval_loss": 0.25}
    state = {"base": BASE, "progress": {"step": step, "trained_tokens": 10 * step}} | state
    seal(folder, head | {"state": state, "tensors": tensors, "files": records})
    return folder


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    content = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(content)
    (folder / "COMPLETE").write_text(hashlib.sha256(content).hexdigest() + "\n")


def make_run(folder: Path, *steps: int) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "plan.json").write_text("{}")
    for step in steps:
        write_checkpoint(folder / f"checkpoints/step-{step:08d}", make_whole())
    return folder


def inspect(*words: str | Path) -> int:
    return main(["inspect", "checkpoint", *map(str, words)])


def report(capsys: Capture) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


# -- a folder of checkpoints --


def test_a_run_of_whole_checkpoints_is_listed_and_exits_with_0(tmp_path: Path, capsys: Capture) -> None:
    run = make_run(tmp_path / "run", 100, 200)
    assert inspect(run) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    header = "step state size ranks incarnation age eval loss method base"
    assert " ".join(rows[1]) == header
    assert [row[:2] for row in rows[2:4]] == [["100", "whole"], ["200", "whole"]]
    assert rows[2][4:6] == ["2", "7"]
    assert " ".join(rows[2][6:]) == "2 h 0.2500 map r=4 org/llama nf4 c0ffeec0ffee"
    assert "the newest whole one is step-00000200" in out and "leftovers" not in out
    size = sum(
        path.stat().st_size for path in (run / "checkpoints/step-00000200").rglob("*") if path.is_file()
    )
    assert f"{size / 1024:.1f} KiB" in out


def test_a_suspect_one_is_not_damaged_and_not_the_newest_whole_one(tmp_path: Path, capsys: Capture) -> None:
    run = make_run(tmp_path / "run", 100, 200)
    folder = run / "checkpoints/step-00000200"
    seal(folder, json.loads((folder / "manifest.json").read_text()) | {"reason": "non-finite"})
    assert inspect(run) == 0
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()[2:4]] == [["100", "whole"], ["200", "suspect"]]
    assert "the newest whole one is step-00000100" in out
    assert inspect(folder) == 0
    assert "by incarnation 7 on 2 ranks (non-finite)" in capsys.readouterr().out
    shutil.rmtree(run / "checkpoints/step-00000100")
    assert inspect(run) == 0
    assert "none is whole but what is suspect" in capsys.readouterr().out


_PART = {"file": "adapter.json", "start": 0, "numel": "8"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tensors": [], "state": 3}, "state is no object"),
        ({"tensors": []}, "tensors is no object"),
        ({"files": {}}, "it names no files"),
        ({"step": "200"}, "step is no whole number"),
        ({"world_size": None}, "world_size is no whole number"),
        ({"eval_loss": "low", "tensors": {}}, "eval_loss is no number"),
        ({"state": {"base": "org/llama"}}, "state.base is no object"),
        ({"tensors": {"A": 3}}, "tensors of A is not described as a tensor is"),
        (
            {"tensors": {"A": {"param": {"dtype": "float32", "shape": [8], "parts": [_PART]}}}},
            "param of A is not",
        ),
    ],
)
def test_a_sealed_manifest_of_wrong_types_is_damaged_in_words(
    tmp_path: Path, capsys: Capture, change: dict[str, Any], words: str
) -> None:
    run = make_run(tmp_path / "run", 100, 200)
    folder = run / "checkpoints/step-00000200"
    seal(folder, json.loads((folder / "manifest.json").read_text()) | change)
    for place in (run, folder):
        assert inspect(place) == 3
        out = capsys.readouterr().out
        assert "step-00000200: damaged: manifest.json is not as decompft writes it" in out and words in out
    newest, skipped = newest_valid(run / "checkpoints")
    assert newest == run / "checkpoints/step-00000100" and words in skipped[0]
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder)


@pytest.mark.parametrize("typed", ["run", "run/checkpoints", "named"])
def test_a_run_by_path_by_name_or_its_folder_is_the_same(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    make_run(tmp_path / "run", 100)
    make_run(tmp_path / "runs/named", 100)
    monkeypatch.chdir(tmp_path)
    assert inspect(typed, "--json") == 0
    told = report(capsys)
    assert [c["step"] for c in told["checkpoints"]] == [100]
    assert told["path"] == {"named": "runs/named/checkpoints"}.get(typed, "run/checkpoints")


def test_each_damage_is_named_and_exits_with_3(tmp_path: Path, capsys: Capture) -> None:
    run = make_run(tmp_path / "run", 100, 200, 300, 400, 500, 600, 700)
    at = [run / f"checkpoints/step-{step:08d}" for step in (100, 200, 300, 400, 500, 600, 700)]
    flip(at[1] / "state/rank-00001.safetensors")
    (at[2] / "state/rank-00000.safetensors").unlink()
    os.truncate(at[3] / "adapter.safetensors", 99)
    (at[4] / "COMPLETE").unlink()
    flip(at[5] / "manifest.json")
    shutil.rmtree(at[6])
    write_checkpoint(at[6], make_whole(), version=FORMAT_VERSION + 1)
    assert inspect(run, "--json") == 3
    told = report(capsys)
    verdicts = {c["step"]: c["verdict"] for c in told["checkpoints"]}
    assert verdicts == {
        100: "whole", 200: "damaged", 300: "damaged", 400: "damaged", 500: "damaged", 600: "damaged",
        700: f"format {FORMAT_VERSION + 1}",
    }  # fmt: skip
    words = {
        200: "state/rank-00001.safetensors is damaged", 300: "state/rank-00000.safetensors is missing",
        400: "adapter.safetensors has 99 bytes", 500: "no COMPLETE file", 600: "manifest.json is damaged",
        700: "newer version of decompft",
    }  # fmt: skip
    problems = {c["step"]: c["problem"] for c in told["checkpoints"]}
    assert problems.pop(100) is None
    assert all(words[step] in problems[step] for step in words)
    assert told["newest_whole"] == "step-00000100"
    assert inspect(run) == 3
    out = capsys.readouterr().out
    assert all(f"step-{step:08d}: {verdicts[step]}: {problems[step]}" in out for step in words)


def test_a_manifest_that_cannot_be_read_is_damage_and_not_a_crash(tmp_path: Path, capsys: Capture) -> None:
    run = make_run(tmp_path / "run", 100, 200)
    manifest = run / "checkpoints/step-00000200/manifest.json"
    manifest.unlink()
    manifest.mkdir()
    assert inspect(run) == 3
    assert (
        "step-00000200: damaged: manifest.json cannot be read from the disk (Is a directory)"
        in capsys.readouterr().out
    )


def test_a_run_without_a_checkpoint_is_fine(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "plan.json").write_text("{}")
    assert inspect(tmp_path) == 0
    assert "checkpoints: no checkpoint" in capsys.readouterr().out


def test_a_checkpoint_that_is_rotated_away_meanwhile_is_not_damage(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 100, 150, 200)
    doomed = run / "checkpoints/step-00000100"
    os.truncate(doomed / "adapter.safetensors", 2**28)  # sparse, and large enough to be spoken of
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        shutil.rmtree(doomed)
        shutil.rmtree(run / "checkpoints/step-00000150")

    assert [each.step for each in survey(run / "checkpoints", say)] == [200]
    assert said == ["verifying step-00000100 (1 of 3): 256.0 MiB"]


# -- what is left beside them --


def test_leftovers_say_whether_they_may_be_deleted(tmp_path: Path, capsys: Capture) -> None:
    run = make_run(tmp_path / "run", 100)
    names = {
        ".tmp-step-00000200-inc1": True,  # incarnation 1 has ended, and 3 has started
        ".tmp-step-00000200-inc3": False,  # perhaps it is saving now
        ".tmp-deleted-step-00000050": True,
        ".old-step-00000100": True,
        ".old-step-00000090": False,  # the only copy
        "abandoned-step-00000300-inc3": True,
    }
    for name in names:
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "file").write_bytes(bytes(3000))
    for number in (1, 2, 3):
        (run / f"incarnations/{number}").mkdir(parents=True)
    assert inspect(run) == 0
    out = capsys.readouterr().out
    for name, may_delete in names.items():
        (line,) = [line for line in out.splitlines() if name in line]
        assert "2.9 KiB" in line and ("may be deleted" if may_delete else "do not delete") in line, line
    assert "it is step-00000090: replacing it was cut short" in out
    (run / "incarnations/3/outcome.json").write_text("{}")
    told = {b.path.name: b.may_delete for b in leftovers(run / "checkpoints")}
    assert told == names | {".tmp-step-00000200-inc3": True}


def test_a_leftover_can_be_looked_at_itself(tmp_path: Path, capsys: Capture) -> None:
    run = make_run(tmp_path / "run", 100)
    aside = run / "checkpoints/abandoned-step-00000100-inc2"
    (run / "checkpoints/step-00000100").rename(aside)
    assert inspect(aside) == 0
    assert "step 100, " in capsys.readouterr().out
    (aside / "COMPLETE").unlink()
    assert inspect(aside) == 3


# -- one checkpoint --


def test_one_checkpoint_shows_kinds_shapes_bytes_and_state(tmp_path: Path, capsys: Capture) -> None:
    path = write_checkpoint(tmp_path / "best-100", make_whole(), world_size=3)  # renamed, outside any run
    assert inspect(path) == 0
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert f"{path}: whole: every file is as its manifest says" in lines
    assert any(line.startswith("step 100, ") and "by incarnation 7 on 3 ranks" in line for line in lines)
    assert "adapter map r=4 over org/llama nf4 c0ffeec0ffee" in lines
    assert "param 4 128 512 B float32 2 x [4, 8], 2 x [8, 4]" in lines
    assert "step 4 4 16 B float32 4 x [1]" in lines
    assert "codes 1 32 32 B uint8 1 x [4, 8]" in lines
    assert "progress.trained_tokens 1000" in lines and f"base.sha256 {BASE['sha256']}" in lines
    assert inspect(path, "--json") == 0
    told = report(capsys)
    assert told["state"]["base"] == BASE and told["tensors"]["exp_avg"]["num_numbers"] == 128
    assert list(told["tensors"]["param"]["shapes"][0].values()) == [2, [4, 8]]


def test_damage_of_one_is_said_with_what_can_still_be_known(tmp_path: Path, capsys: Capture) -> None:
    path = write_checkpoint(tmp_path / "step-00000100", make_whole())
    flip(path / "state/rank-00000.safetensors")
    assert inspect(path) == 3
    out = capsys.readouterr().out
    assert "step-00000100: damaged: state/rank-00000.safetensors is damaged" in out
    assert "incarnation 7 on 2 ranks" in out and "exp_avg" in out
    flip(path / "manifest.json")
    assert inspect(path) == 3
    out = capsys.readouterr().out
    assert "manifest.json is damaged" in out and "step 100, " in out
    assert "exp_avg" not in out, "what a damaged manifest says cannot be relied on"


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["empty"], "empty: neither a checkpoint, nor a run, nor a folder of checkpoints"),
        (["file"], "file: neither a checkpoint"),
        (["run", "nowhere"], "nowhere: no such folder"),
        (["run", "new"], "new: has no checkpoint to compare"),
    ],
)
def test_a_mistake_is_said_in_words_and_exits_with_2(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, typed: list[str], words: str
) -> None:
    make_run(tmp_path / "run", 100)
    make_run(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    assert inspect(*typed) == 2
    err = capsys.readouterr().err
    assert f"error: {words}" in err and "\n  hint: " in err


def test_listing_loads_no_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 100)
    probe = (
        "import sys; from decompft.launcher.cli import main; main(sys.argv[1:]); "
        "sys.exit(sorted({'torch', 'numpy', 'safetensors', 'transformers'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, "inspect", "checkpoint", str(run)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "") and "step-00000100" in done.stdout


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)
