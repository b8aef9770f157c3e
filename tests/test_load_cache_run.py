"""Whole runs over the cache of packed rows: what they say of it, and that it changes no loss."""

from __future__ import annotations

import json

import pytest
from test_load_cache import SMALL, made_of
from tiny import losses, make_run, run_ranks


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return made_of(SMALL, tmp_path_factory.mktemp("original"))


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DECOMPFT_CACHE", str(tmp_path / "cache"))


@pytest.mark.dist
def test_a_run_says_what_it_read_and_a_second_repeats_its_losses(original, tmp_path):
    runs = []
    for name in ("first", "second"):
        model = {"config": None, "weights": "checkpoint", "id": str(original)}
        run = make_run(tmp_path, name, model=model)
        run_ranks(run)
        rows = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
        (event,) = [r for r in rows if r["event"] == "load"]
        runs.append((losses(run), event, run.rank_log(1, 0).read_text()))
    (first, cold, said), (second, warm, said_again) = runs
    assert first == second
    assert cold["cache_bytes_written"] > 0 and warm["cache_bytes_read"] > 0
    assert (
        warm["cache_share"] < cold["cache_share"] / 2
        and warm["seconds"] > 0
        and warm["peak_anonymous_bytes"] >= 0
    )
    assert "base: " in said and "cached at" in said and "from the cache" in said_again


@pytest.mark.dist
@pytest.mark.parametrize(("writer", "reader"), [("fsdp", "zero3"), ("zero3", "fsdp"), ("zero3", "zero3")])
def test_engines_share_a_cache(original, tmp_path, writer, reader):
    """ZeRO-3 cuts in the middle of rows; what it packs is whole rows all the same."""

    def run_of(name, strategy, cache):
        run = make_run(
            tmp_path,
            name,
            model={"config": None, "weights": "checkpoint", "id": str(original)},
            quantization={"cache": cache},
            parallel={"strategy": strategy, "gpus_per_node": 2},
        )
        run_ranks(run)
        rows = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
        return losses(run), next(r for r in rows if r["event"] == "load")

    run_of("cold", writer, cache=True)
    warm, event = run_of("warm", reader, cache=True)
    bare, _ = run_of("bare", reader, cache=False)
    assert warm == bare
    assert event["cache_bytes_read"] > 0 and event["cache_share"] < 0.6
