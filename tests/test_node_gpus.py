"""What nvidia-smi says of a node's GPUs before training: a stand-in on PATH that answers in its format."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from decompft.launcher.node_file import Problem
from decompft.launcher.worker.node_gpus import check_gpus, compute_problems

Patch = pytest.MonkeyPatch

A, B = "GPU-5b8c1f2e-0000-0000-0000-00000000000a", "GPU-5b8c1f2e-0000-0000-0000-00000000000b"
GOOD = {
    "--query-gpu=index,uuid,name,memory.used,ecc.errors.uncorrected.volatile.total": f"""\
0, {A}, NVIDIA H200, 4, 0
1, {B}, NVIDIA H200, 4, 0
""",
    "--query-remapped-rows=gpu_uuid,remapped_rows.pending,remapped_rows.failure": f"{A}, No, No\n{B}, No, No\n",
    # idle
    "--query-gpu=uuid,clocks_event_reasons.active": f"{A}, 0x0000000000000001\n{B}, 0x0000000000000001\n",
    "--query-compute-apps=gpu_uuid,pid,process_name": "",
}
STATE, ROWS, CLOCKS, APPS = GOOD


def answer(folder: Path, monkeypatch: Patch, answers: dict[str, str], *, code: int = 0) -> None:
    """Put an nvidia-smi on PATH that prints what it was asked; other questions it does not know."""
    cases = "".join(f"'{query}') cat <<'END'\n{text}END\n;;\n" for query, text in answers.items())
    unknown = "echo 'Field is not a valid field to query.'; exit 2"
    smi = folder / "nvidia-smi"
    smi.write_text(f'#!/bin/sh\ncase "$1" in\n{cases}*) {unknown};;\nesac\nexit {code}\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def texts(problems: list[Problem], severity: str = "bad") -> list[str]:
    return [problem.text for problem in problems if problem.severity == severity]


def test_healthy_gpus_are_listed_without_a_problem(tmp_path: Path, monkeypatch: Patch) -> None:
    answer(tmp_path, monkeypatch, GOOD)
    states, problems = check_gpus(2)
    assert [state.uuid for state in states] == [A, B] and problems == []


def test_without_nvidia_smi_nothing_is_said(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_gpus(0) == ([], [])


def test_an_uncorrected_ecc_error_is_bad(tmp_path: Path, monkeypatch: Patch) -> None:
    text = GOOD[STATE].replace(f"{B}, NVIDIA H200, 4, 0", f"{B}, NVIDIA H200, 4, 2")
    answer(tmp_path, monkeypatch, GOOD | {STATE: text})
    found = texts(check_gpus(2)[1])
    assert found == ["GPU 1 (NVIDIA H200): 2 uncorrected ECC error(s) since the driver was loaded"]


def test_a_gpu_without_ecc_is_no_problem(tmp_path: Path, monkeypatch: Patch) -> None:
    answer(tmp_path, monkeypatch, GOOD | {STATE: GOOD[STATE].replace("4, 0", "4, [N/A]")})
    assert check_gpus(2)[1] == []


@pytest.mark.parametrize(
    "row, word", [("Yes, No", "waits to be remapped"), ("No, Yes", "could not be"), ("0, 1", "could not be")]
)
def test_memory_rows_that_need_a_reset_are_bad(
    row: str, word: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    answer(tmp_path, monkeypatch, GOOD | {ROWS: f"{A}, {row}\n{B}, No, No\n"})
    (found,) = texts(check_gpus(2)[1])
    assert found.startswith("GPU 0") and word in found


def test_memory_in_use_by_others_names_the_process(tmp_path: Path, monkeypatch: Patch) -> None:
    busy = GOOD[STATE].replace(f"{A}, NVIDIA H200, 4", f"{A}, NVIDIA H200, 71680")
    answer(tmp_path, monkeypatch, GOOD | {STATE: busy, APPS: f"{A}, 4711, /usr/bin/python3\n{B}, 1, x\n"})
    (found,) = texts(check_gpus(2)[1])
    assert found == "GPU 0 (NVIDIA H200): 70.0 GiB are in use by others (pid 4711 /usr/bin/python3)"


def test_an_idle_gpu_that_is_slowed_down_is_bad_and_a_warm_one_is_worth_a_line(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    answer(tmp_path, monkeypatch, GOOD | {CLOCKS: f"{A}, 0x0000000000000048\n{B}, 0x0000000000000020\n"})
    problems = check_gpus(2)[1]
    assert len(texts(problems)) == 2 and all("GPU 0" in text for text in texts(problems))
    assert texts(problems, "warn") == ["GPU 1 (NVIDIA H200): slowed down (software thermal slowdown)"]


def test_an_older_driver_is_asked_by_the_older_name(tmp_path: Path, monkeypatch: Patch) -> None:
    old = {key: text for key, text in GOOD.items() if key not in (CLOCKS, ROWS)}
    old["--query-gpu=uuid,clocks_throttle_reasons.active"] = f"{B}, 0x0000000000000080\n"
    answer(tmp_path, monkeypatch, old)
    (found,) = texts(check_gpus(2)[1])
    assert "GPU 1" in found and "power brake" in found


def test_only_visible_gpus_count(tmp_path: Path, monkeypatch: Patch) -> None:
    text = GOOD[STATE].replace(f"{B}, NVIDIA H200, 4, 0", f"{B}, NVIDIA H200, 4, 9")
    answer(tmp_path, monkeypatch, GOOD | {STATE: text})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    states, problems = check_gpus(1)
    assert [state.uuid for state in states] == [A] and problems == []
    assert texts(check_gpus(2)[1]) == ["1 of the 2 GPUs asked for are visible"]


def test_more_gpus_than_asked_for_are_worth_a_line(tmp_path: Path, monkeypatch: Patch) -> None:
    answer(tmp_path, monkeypatch, GOOD)
    problems = check_gpus(1)[1]
    assert texts(problems) == [] and "2 GPUs are visible, 1 were asked for" in texts(problems, "warn")[0]


def test_an_nvidia_smi_that_fails_is_quoted(tmp_path: Path, monkeypatch: Patch) -> None:
    words = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n"
    answer(tmp_path, monkeypatch, {STATE: words}, code=9)
    (found,) = texts(check_gpus(2)[1])
    assert found.startswith("nvidia-smi does not work: NVIDIA-SMI has failed")


def test_a_right_product_is_no_problem() -> None:
    assert compute_problems("cpu", 0) == ([], [])


def test_a_wrong_product_is_bad(monkeypatch: Patch) -> None:
    import torch

    multiply = torch.Tensor.__matmul__

    def off_by_one(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = multiply(a, b)
        if product.dtype == torch.bfloat16:
            product[17, 23] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", off_by_one)
    assert texts(compute_problems("cpu", 0)[1]) == ["a matrix product is wrong"]
