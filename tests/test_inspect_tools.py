"""`inspect weights` and `inspect adapter`: what they write, and how they run as typed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from inspecting import Capture, adapter_over

from decompft.launcher.cli import main as cli
from decompft.launcher.errors import UserError
from decompft.launcher.worker.tools import inspect, inspect_weights


def test_out_holds_json_and_both_plots_and_repeats_byte_for_byte(
    llama: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder, _ = adapter_over(llama, tmp_path / "adapter", targets=["q_proj", "v_proj"])
    for argv, name, outs in (
        (["weights", str(llama), "--layers", "q_proj", "--tuned", str(folder)], "weights", ("one",)),
        (["adapter", str(folder)], "adapter", ("one", "two")),
    ):
        for out in outs:
            inspect.main([*argv, "--all", "--out", str(tmp_path / out)])
        printed = capsys.readouterr()
        assert "layers.1.self_attn.q_proj" in printed.out and f"{name}.svg" in printed.err
        for ending, start in (("json", b"{"), ("png", b"\x89PNG"), ("svg", b"<?xml")):
            files = {(tmp_path / out / f"{name}.{ending}").read_bytes() for out in outs}
            assert len(files) == 1 and files.pop().startswith(start)
        assert len(json.loads((tmp_path / "one" / f"{name}.json").read_text())["layers"]) in (2, 4)


def test_plots_without_matplotlib_say_what_to_install(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="matplotlib, which is not installed") as caught:
        inspect_weights.main([str(llama), "--out", str(tmp_path / "out")])
    assert "decompft[plot]" in caught.value.hint and not (tmp_path / "out").exists()


@pytest.mark.dist
def test_the_verbs_run_as_typed_and_a_mistake_exits_with_2(
    llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli(["inspect", "weights", str(llama), "--layers", "q_proj", "v_proj", "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)["layers"]) == 4
    assert cli(["inspect", "adapter", str(tmp_path)]) == 2
    assert capfd.readouterr().err.startswith("error: ") and not capfd.readouterr().out
