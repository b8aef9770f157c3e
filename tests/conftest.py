"""Options and fixtures that several test files share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import testbed


def pytest_configure() -> None:
    """Signals that came in ignored (nohup, a background job of a script) would be ignored by every child too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden; review the diff")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or fills the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DECOMPFT_CACHE", str(tmp_path_factory.mktemp("decompft-cache")))
        yield


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is planned here is planned without GPUs, on a machine that has some too."""
    monkeypatch.setenv("DECOMPFT_DEVICE", "cpu")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The ModelSection of tiny_models' llama, saved with random weights; never changed."""
    # transformers: seconds that most files need not wait
    from tiny_models import FAMILIES, saved, section

    return section(saved(tmp_path_factory.mktemp("tiny-llama"), FAMILIES["llama"])[0])


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama; never changed."""
    # transformers: seconds that most files need not wait
    from tiny_models import FAMILIES, saved

    return saved(tmp_path_factory.mktemp("llama"), FAMILIES["llama"])[0]


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(scope="session")
def running_testbed() -> Iterator[testbed.Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        # a worker of pytest-xdist has a cluster of its own
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        yield from testbed.start(patch, number=worker)


@pytest.fixture
def cluster(running_testbed: testbed.Cluster) -> Iterator[testbed.Cluster]:
    """A real Slurm with an empty queue; what the test submits is cancelled at its end."""
    yield running_testbed
    running_testbed.cancel_all()


@pytest.fixture
def lone_cluster() -> Iterator[testbed.Cluster]:
    """Another one, of two nodes and without accounting, so that there is no sacct."""
    with pytest.MonkeyPatch.context() as patch:
        for cluster in testbed.start(patch, number=9, settings={"ACCT": "filetxt", "NODES": "2"}):
            yield cluster
            cluster.cancel_all()
