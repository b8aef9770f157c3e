"""`inspect checkpoint A B`: two checkpoints are compared number by number, however they are cut."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_inspect_checkpoint import Capture, flip, inspect, make_run, make_whole, report, write_checkpoint

from decompft.launcher.worker.tools import compare_checkpoints


def compared(capsys: Capture, first: Path, second: Path) -> dict[str, Any]:
    compare_checkpoints.main([str(first), str(second), "--json"])
    told = report(capsys)
    return told | {kind["kind"]: kind for kind in told["kinds"]}


def test_other_cuts_of_the_same_numbers_are_bit_equal(tmp_path: Path, capsys: Capture) -> None:
    whole = make_whole()
    whole["layers.1.B", "param"][0, 0] = math.nan
    first = write_checkpoint(tmp_path / "a/step-00000100", whole, world_size=1)
    second = write_checkpoint(tmp_path / "b/step-00000100", whole, world_size=5)
    told = compared(capsys, first, second)
    assert [k["kind"] for k in told["kinds"]] == ["param", "exp_avg", "exp_avg_sq", "step", "codes"]
    assert all(k["num_bit_equal"] == k["num_compared"] > 0 for k in told["kinds"])
    assert all(k["absolute"] is None for k in told["kinds"]) and told["holds_the_same"] is True
    assert told["state"] == {"world_size": [1, 5]}


def test_the_largest_difference_is_found_with_its_tensor(tmp_path: Path, capsys: Capture) -> None:
    whole = make_whole()
    other = {key: tensor.clone() for key, tensor in whole.items()}
    other["layers.0.B", "param"][7, 3] += 25
    other["layers.1.A", "param"][1, 2] *= 1 + 2**-20
    other["layers.1.B", "exp_avg"].mul_(1e-6)
    other["layers.1.B", "exp_avg_sq"][2, 2] = math.nan
    other["layers.0.A", "codes"][0, 0] = 200
    first = write_checkpoint(tmp_path / "a/step-00000100", whole)
    second = write_checkpoint(tmp_path / "b/step-00000101", other, trained="longer")
    told = compared(capsys, first, second)
    param = told["param"]
    assert (param["num_compared"], param["num_bit_equal"]) == (4, 2)
    assert param["absolute"] == {"tensor": "layers.0.B", "value": pytest.approx(25, rel=1e-6)}
    largest = max(
        whole["layers.0.B", "param"].abs().max().item(), other["layers.0.B", "param"].abs().max().item()
    )
    assert param["relative"]["value"] == pytest.approx(25 / largest, rel=1e-6)
    assert told["exp_avg"]["relative"]["tensor"] == "layers.1.B"
    assert told["exp_avg_sq"]["absolute"] == {"tensor": "layers.1.B", "value": None}  # no number in JSON
    assert told["codes"]["absolute"] == {"tensor": "layers.0.A", "value": 200}
    assert told["step"]["num_bit_equal"] == 4
    assert told["state"] == {
        "progress.step": [100, 101], "progress.trained_tokens": [1000, 1010], "step": [100, 101],
        "trained": [None, "longer"],
    }  # fmt: skip
    compare_checkpoints.main([str(first), str(second)])
    out = capsys.readouterr().out
    assert "param: 2 of 4 bit-equal" in out and "largest difference 25 in layers.0.B" in out
    assert "largest difference inf in layers.1.B" in out and "trained: A null" in out


def test_tensors_that_only_one_holds_are_named(tmp_path: Path, capsys: Capture) -> None:
    whole = make_whole()
    other = {key: tensor for key, tensor in whole.items() if key != ("layers.0.A", "codes")}
    other["layers.0.A", "exp_avg"] = torch.zeros(4, 9)
    other["layers.0.B", "exp_avg"] = whole["layers.0.B", "exp_avg"].bfloat16()
    other["layers.2.A", "param"] = torch.zeros(3)
    first = write_checkpoint(tmp_path / "a/step-00000100", whole)
    second = write_checkpoint(tmp_path / "b/step-00000100", other)
    told = compared(capsys, first, second)
    assert told["holds_the_same"] is False
    assert (told["codes"]["only_first"], told["codes"]["num_compared"]) == (["layers.0.A"], 0)
    assert told["param"]["only_second"] == ["layers.2.A"] and told["param"]["num_bit_equal"] == 4
    assert told["exp_avg"]["other_shape"] == ["layers.0.A", "layers.0.B"]
    compare_checkpoints.main([str(first), str(second)])
    out = capsys.readouterr().out
    assert "they hold other tensors" in out and "only in B: layers.2.A" in out


def test_a_damaged_one_is_not_compared(tmp_path: Path, capsys: Capture) -> None:
    run = make_run(tmp_path / "run", 100, 200)
    flip(run / "checkpoints/step-00000200/adapter.json")
    good, damaged = (run / f"checkpoints/step-00000{n}00" for n in (1, 2))
    assert inspect(good, damaged) == 3
    captured = capsys.readouterr()
    assert "step-00000200: damaged: adapter.json is damaged" in captured.err and captured.out == ""


@pytest.mark.dist
def test_the_verb_compares_the_newest_whole_ones_of_two_runs(tmp_path: Path, capfd: Any) -> None:
    first, second = make_run(tmp_path / "first", 50, 100, 200), make_run(tmp_path / "second", 100)
    (first / "checkpoints/step-00000200/COMPLETE").unlink()
    assert inspect(first, second, "--json") == 0
    captured = capfd.readouterr()
    told = json.loads(captured.out)
    assert told["first"].endswith("first/checkpoints/step-00000100") and told["state"] == {}
    assert "step-00000200: damaged: it has no COMPLETE file" in captured.err
