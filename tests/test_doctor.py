"""Doctor shows every check, lets none hide another, and ends with 3 when something needed fails."""

from __future__ import annotations

import pytest

from decompft.launcher.errors import EXIT_FAILED, RunFailed
from decompft.launcher.worker import checkup
from decompft.launcher.worker.tools.doctor import main

SHOWN = (
    "python", "torch", "transformers", "bitsandbytes", "torchao", "deepspeed", "liger-kernel", "triton",
    "devices", "gpu health", "bfloat16", "fp8 products", "nf4", "8-bit AdamW", "gloo", "nccl", "torchrun", "fsdp",
    "liger kernels", "cache", "disk", "hub",
)  # fmt: skip


@pytest.fixture(autouse=True)
def writable_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DECOMPFT_CACHE", str(tmp_path / "cache"))


def test_every_check_is_shown_and_this_machine_is_fit(capsys):
    main([])
    shown = capsys.readouterr().out
    assert [name for name in SHOWN if name not in shown] == []
    assert "fail" not in shown


def test_a_check_that_breaks_hides_no_other(monkeypatch, capsys):
    def broken():
        raise OSError("libfoo.so: cannot open shared object file\nmore")

    checks = tuple((n, broken if n == "nf4" else c, r) for n, c, r in checkup._CHECKS if n in ("nf4", "disk"))
    monkeypatch.setattr(checkup, "_CHECKS", checks)
    with pytest.raises(RunFailed, match="doctor: nf4: needed") as error:
        main([])
    assert error.value.exit_code == EXIT_FAILED
    shown = " ".join(capsys.readouterr().out.split())
    assert "OSError: libfoo.so: cannot open" in shown and "fix: pip install" in shown and "free for" in shown


def test_what_is_not_required_is_a_warning():
    def broken():
        raise ImportError("no")

    assert checkup.guarded("liger kernels", broken, required=False).state == "warn"
    assert checkup.guarded("nf4", broken, required=True).state == "fail"


def test_a_cache_that_cannot_be_written_fails_with_its_fix(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DECOMPFT_CACHE", str(tmp_path / "file/cache"))
    found = checkup._cache()
    assert found.state == "fail" and "DECOMPFT_CACHE" in found.fix


def test_offline_variables_are_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = checkup._hub()
    assert found.state == "warn" and "HF_HUB_OFFLINE" in found.text


def test_a_lone_process_group_is_left_as_it_was_found():
    import torch.distributed as dist

    assert checkup._gloo().state == "ok"
    assert not dist.is_initialized()


def test_a_sick_gpu_is_a_warning(tmp_path, monkeypatch):
    from test_node_gpus import GOOD, ROWS, A, answer

    answer(tmp_path, monkeypatch, GOOD | {ROWS: f"{A}, No, Yes\n"})
    found = checkup._gpu_health()
    assert found.state == "warn" and "could not be remapped" in found.text and "administrators" in found.fix
    answer(tmp_path, monkeypatch, GOOD)
    assert checkup._gpu_health().text.endswith("on 2 GPU(s)")
