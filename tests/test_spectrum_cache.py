"""Singular factors are made once; whatever became of the cache, the factors are right."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import fork

from decompft.adapters import spectra
from decompft.launcher.places import cache_dir
from decompft.launcher.safetensors_header import read_header
from decompft.launcher.worker.spectrum_cache import SpectrumCache, hash_of, rows_of, spectra_dir

WEIGHT = torch.randn(48, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def make_full(weight):
    return rows_of(spectra.full(weight))


def must_not_make(weight):
    raise AssertionError("made again")


def filled(folder):
    cache = SpectrumCache(folder)
    cache.get(WEIGHT, kind="full", k=32, make=make_full)
    (path,) = folder.glob("*.safetensors")
    return cache, path


def assert_right(found, weight=WEIGHT):
    for name, tensor in make_full(weight).items():
        assert torch.equal(found[name], tensor), name


def assert_made_again(folder, *, num_damaged=1):
    cache = SpectrumCache(folder)
    assert_right(cache.get(WEIGHT, kind="full", k=32, make=make_full))
    assert (cache.num_damaged, cache.num_made, cache.num_hits) == (num_damaged, 1, 0)
    again = SpectrumCache(folder)
    assert_right(again.get(WEIGHT, kind="full", k=32, make=must_not_make))
    assert (again.num_damaged, again.num_hits) == (0, 1)


def test_a_hit_gives_the_same_bits_and_makes_nothing(tmp_path):
    cache, path = filled(tmp_path)
    assert (cache.num_made, cache.num_hits, cache.num_damaged, cache.warning) == (1, 0, 0, "")
    assert cache.seconds_making > 0
    other = SpectrumCache(tmp_path)
    assert_right(other.get(WEIGHT.clone(), kind="full", k=32, make=must_not_make))
    assert (other.num_made, other.num_hits, other.seconds_making) == (0, 1, 0.0)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing temporary is left


def test_the_default_folder_lies_in_the_cache():
    assert spectra_dir() == cache_dir() / "spectra"


@pytest.mark.parametrize(
    "change",
    [
        {"weight": WEIGHT.index_fill(0, torch.tensor([47]), 0.5)}, {"weight": WEIGHT.view(32, 48)},
        {"weight": WEIGHT.view(torch.float16)}, {"kind": "top"}, {"k": 31},
    ],
    ids=["an entry", "the shape", "the dtype", "the kind", "k"],
)  # fmt: skip
def test_another_weight_or_request_has_another_entry(tmp_path, change):
    filled(tmp_path)
    asked = {"weight": WEIGHT, "kind": "full", "k": 32} | change
    cache = SpectrumCache(tmp_path)
    cache.get(asked["weight"], kind=asked["kind"], k=asked["k"], make=lambda w: {"S": torch.ones(3)})
    assert (cache.num_made, cache.num_hits) == (1, 0)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_view_has_the_hash_of_what_it_shows():
    assert hash_of(WEIGHT.T) == hash_of(WEIGHT.T.contiguous()) != hash_of(WEIGHT)


def test_few_rows_are_read_without_the_others(tmp_path, monkeypatch):
    _, path = filled(tmp_path)
    cache, num_read = SpectrumCache(tmp_path), []
    preadv = os.preadv

    def counted(descriptor, buffers, offset):
        num_read.append(preadv(descriptor, buffers, offset))
        return num_read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    found = cache.get_rows(hash_of(WEIGHT), kind="full", k=32, indices=[30, 2, 7])
    whole = make_full(WEIGHT)
    assert found.keys() == whole.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, whole[name][[30, 2, 7]]), name
    tables = 32 + 3 * 32 * 32
    assert sum(num_read) == tables + 3 * 4 * (48 + 32 + 1)
    assert cache.num_hits == 1
    assert_right(cache.get_rows(hash_of(WEIGHT), kind="full", k=32))


def test_rows_of_an_entry_that_is_not_there_are_none(tmp_path):
    for folder in (None, tmp_path / "never", tmp_path):
        cache = SpectrumCache(folder)
        assert cache.get_rows(hash_of(WEIGHT), kind="full", k=32, indices=[0]) is None
        assert (cache.num_hits, cache.num_damaged) == (0, 0)


def test_a_row_beyond_the_last_is_the_callers_mistake(tmp_path):
    cache, _ = filled(tmp_path)
    with pytest.raises(IndexError, match="row 32 of 32"):
        cache.get_rows(hash_of(WEIGHT), kind="full", k=32, indices=[32])


@pytest.mark.parametrize("name", ["U", "S", "V", "U.sha256", "sha256"])
def test_a_flipped_bit_is_noticed_and_the_entry_made_again(tmp_path, name):
    _, path = filled(tmp_path)
    place = read_header(path)[name]
    data = bytearray(path.read_bytes())
    data[place.start + place.num_bytes - 1] ^= 1  # in the last row
    path.write_bytes(data)
    cache = SpectrumCache(tmp_path)
    assert cache.get_rows(hash_of(WEIGHT), kind="full", k=32, indices=[31]) is None
    assert cache.num_damaged == 1
    assert_made_again(tmp_path)


def test_every_length_it_may_be_cut_to_is_noticed(tmp_path):
    _, path = filled(tmp_path)
    whole = path.read_bytes()
    for length in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert_made_again(tmp_path)


def test_a_whole_file_of_something_else_is_not_believed(tmp_path):
    _, path = filled(tmp_path)
    save_file({"U": torch.zeros(32, 48), "S": torch.zeros(32), "V": torch.zeros(32, 32)}, path)
    assert_made_again(tmp_path)
    # another weight's entry, whole, under this one's name
    SpectrumCache(tmp_path / "other").get(2 * WEIGHT, kind="full", k=32, make=make_full)
    (other,) = (tmp_path / "other").glob("*.safetensors")
    shutil.copy(other, path)
    assert_made_again(tmp_path)
    # the same bytes in another shape
    held = load_file(path)
    save_file({**held, "V": held["V"].view(64, 16)}, path)
    assert_made_again(tmp_path)
    path.write_bytes(os.urandom(5000))
    assert_made_again(tmp_path)


def test_a_folder_that_vanishes_is_made_again(tmp_path):
    cache, path = filled(tmp_path / "spectra")
    shutil.rmtree(path.parent)
    assert_right(cache.get(WEIGHT, kind="full", k=32, make=make_full))
    assert (cache.num_made, cache.num_damaged, cache.warning) == (2, 0, "")
    assert path.exists()


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    cache = SpectrumCache(tmp_path / "file" / "spectra")
    for _ in range(2):
        assert_right(cache.get(WEIGHT, kind="full", k=32, make=make_full))
    assert (cache.num_made, cache.num_hits) == (2, 0)
    assert str(tmp_path / "file") in cache.warning and "DECOMPFT_CACHE" in cache.warning


@pytest.mark.dist
def test_a_disk_that_is_full_costs_a_warning_and_leaves_nothing(tmp_path):
    """In a process of its own: pytest's log may be a file, too."""

    def work(rank):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        # no file grows past this (a root user ignores permissions, not this)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        cache = SpectrumCache(tmp_path)
        assert_right(cache.get(WEIGHT, kind="full", k=32, make=make_full))
        assert cache.warning and not list(tmp_path.iterdir())

    fork(work, 1)


def test_without_a_folder_everything_is_made():
    cache = SpectrumCache(None)
    for _ in range(2):
        assert_right(cache.get(WEIGHT, kind="full", k=32, make=make_full))
    assert (cache.num_made, cache.num_hits, cache.warning) == (2, 0, "")


def test_what_a_killed_start_left_is_removed_when_it_is_old(tmp_path):
    old, young = tmp_path / ".1-a.tmp", tmp_path / ".2-b.tmp"
    for path in (old, young):
        path.write_text("half")
    os.utime(old, (0, time.time() - 2 * 24 * 3600))
    filled(tmp_path)
    assert not old.exists() and young.exists()


@pytest.mark.dist
def test_two_processes_may_write_the_same_entry(tmp_path):
    def work(rank):
        for i in range(20):
            cache = SpectrumCache(tmp_path / str(i))
            weight = WEIGHT + i
            assert_right(cache.get(weight, kind="full", k=32, make=make_full), weight)
            assert (cache.num_damaged, cache.warning) == (0, "")

    fork(work, 2)
    for i in range(20):
        cache = SpectrumCache(tmp_path / str(i))
        assert_right(cache.get(WEIGHT + i, kind="full", k=32, make=must_not_make), WEIGHT + i)
        assert len(list((tmp_path / str(i)).iterdir())) == 1
