"""A second start reads packed rows from the cache: the same base bit for bit, whatever became of the cache."""

from __future__ import annotations

import os
import resource
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_load_quantized import save_tokenizer
from tiny import LLAMA, fork
from tiny_models import FAMILIES, plain_model

import decompft.launcher.worker.reading as reading
from decompft.launcher.places import cache_dir
from decompft.launcher.recipe import AdapterSection, ModelSection, QuantizationSection
from decompft.launcher.safetensors_header import read_header
from decompft.launcher.worker.build import build
from decompft.launcher.worker.engines.base import Engine
from decompft.launcher.worker.engines.fsdp import FsdpEngine
from decompft.launcher.worker.modelfiles import identity
from decompft.launcher.worker.packed_file import PackedFile, Writer

CPU = torch.device("cpu")
MAP = AdapterSection(method="map", rank=4, alpha=8.0)
FORMATS = {
    "nf4": QuantizationSection(format="nf4", compute="float32"),
    "nf4-plain-scales": QuantizationSection(format="nf4", double_quant=False, compute="float32"),
    "fp4": QuantizationSection(format="fp4", block_size=128, compute="float32"),
    "int8": QuantizationSection(format="int8", compute="float32"),
    "fp8": QuantizationSection(format="fp8", compute="float32"),
}
NF4 = FORMATS["nf4"]
SMALL = {**LLAMA, "hidden_size": 128, "intermediate_size": 256}
# next to no embedding, as in a 7B
WIDE = {**LLAMA, "hidden_size": 512, "intermediate_size": 2048}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint in 16 bits, as most are."""
    return made_of(SMALL, tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return made_of(WIDE, tmp_path_factory.mktemp("wide"))


def made_of(fields, folder):
    plain_model(fields).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DECOMPFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small_chunks(monkeypatch):
    """Many pieces a weight, as a large model has."""
    monkeypatch.setattr(reading, "CHUNK_BYTES", 10_000)


def loaded(folder, quantization=NF4, *, engine=None, base_hash=None, progress=lambda done, total: None):
    return build(
        ModelSection(id=str(folder)), quantization, MAP, engine or Engine(CPU, timeout_s=60), seed=0,
        model_dir=folder, recompute="none", base_hash=base_hash or identity(folder)["sha256"], progress=progress,
    )  # fmt: skip


def bits(made, engine=None):
    """Every tensor of this rank as bytes, norms too."""
    local = (engine or Engine(CPU, timeout_s=60)).local
    named = (*made.model.named_parameters(), *made.model.named_buffers())
    return {n: local(t).detach().clone().contiguous().view(-1).view(torch.uint8) for n, t in named}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [n for n in found if not torch.equal(found[n], expected[n])] == []


def files():
    return sorted((cache_dir() / "packed").glob("*/*.packed"))


def read_from_source(made):
    """Bytes of the checkpoint, without the kilobyte a piece that tells the cache is of it."""
    return made.loaded.bytes_read - 1024 * sum(len(PackedFile(f).pieces) for f in files())


# -- what it saves ---------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_the_second_start_is_the_first_bit_for_bit(original, format, small_chunks):
    first = loaded(original, FORMATS[format])
    second = loaded(original, FORMATS[format])
    assert_same(bits(second), bits(first))
    assert second.loaded.cache_bytes_read > 0 and second.loaded.cache_bytes_written == 0
    stored = load_file(original / "model.safetensors")
    plain = sum(t.numel() * 2 for n, t in stored.items() if "proj" not in n)
    # what is not quantized is read each time, and of what is, nothing
    assert read_from_source(second) == plain


def test_the_second_start_reads_at_most_three_tenths(wide):
    first, second = loaded(wide).loaded, loaded(wide).loaded
    read = second.bytes_read + second.cache_bytes_read
    print(f"first {first.bytes_read} bytes, second {read}: {read / first.bytes_read:.3f}")
    assert read <= 0.30 * first.bytes_read
    assert second.cache_share == pytest.approx(read / first.checkpoint_bytes)
    assert f"cached at {cache_dir()}/packed/" in first.line()
    assert f"from the cache: {second.cache_share:.0%} of the checkpoint's bytes" in second.line()


@pytest.mark.parametrize(
    "quantization", [NF4.model_copy(update={"cache": False}), QuantizationSection(format="none")]
)
def test_nothing_is_kept_unasked(original, quantization):
    made = loaded(original, quantization)
    assert not cache_dir().exists() and made.loaded.cache_dir is None
    assert made.loaded.cache_share == 1


def test_random_weights_are_not_kept():
    made = build(
        ModelSection(config=FAMILIES["llama"], weights="random"), NF4, MAP, Engine(CPU, timeout_s=60), seed=0,
        model_dir=None, recompute="none", base_hash="0" * 64,
    )  # fmt: skip
    assert not cache_dir().exists() and made.loaded.line() == ""


def test_another_base_or_format_has_a_folder_of_its_own(original):
    for quantization in FORMATS.values():
        loaded(original, quantization)
    loaded(original, base_hash="f" * 64)
    assert len({f.parent for f in files()}) == len(FORMATS) + 1


# -- stale and damaged -----------------------------------------------------------------------------


def changed(original, folder, name):
    tensors = load_file(original / "model.safetensors")
    tensors[name] = tensors[name] * 1.5
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((original / "config.json").read_bytes())
    return folder


def test_a_checkpoint_that_changed_is_noticed(original, tmp_path):
    loaded(original)
    other = changed(original, tmp_path / "other", "model.layers.0.self_attn.q_proj.weight")
    again = loaded(other)
    assert again.loaded.cache_bytes_read == 0
    assert_same(bits(again), bits(loaded(other, NF4.model_copy(update={"cache": False}))))


def test_a_file_that_was_replaced_never_meets_the_old_cache(original, tmp_path, small_chunks):
    """Other bytes where neither the identity nor a sample looks."""
    folder = shutil.copytree(original, tmp_path / "model")
    file, known = folder / "model.safetensors", identity(folder)["sha256"]
    first = loaded(folder, base_hash=known)
    before, q = file.stat(), read_header(file)["model.layers.0.self_attn.q_proj.weight"]
    with file.open("r+b") as opened:
        opened.seek(q.start)
        opened.write(torch.linspace(-3, 3, 16).bfloat16().view(torch.uint8).numpy().tobytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    samples_alone = loaded(folder, base_hash=known)
    assert samples_alone.loaded.cache_bytes_written == 0, "the test is to change what no sample sees"
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    again = loaded(folder, base_hash=known)
    assert again.loaded.cache_bytes_read == 0 and again.loaded.cache_dir != first.loaded.cache_dir
    expected = bits(loaded(folder, NF4.model_copy(update={"cache": False})))
    assert_same(bits(again), expected)
    assert_same(bits(loaded(folder, base_hash=known)), expected)


def test_a_change_under_the_same_hash_size_and_time_is_noticed_piece_by_piece(
    original, tmp_path, small_chunks
):
    known = identity(original)["sha256"]
    loaded(original, base_hash=known)
    other = changed(original, tmp_path / "other", "model.layers.0.self_attn.q_proj.weight")
    before = (original / "model.safetensors").stat()
    os.utime(other / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    again = loaded(other, base_hash=known)
    assert read_from_source(again) > 0 and again.loaded.cache_bytes_written > 0
    assert_same(bits(again), bits(loaded(other, NF4.model_copy(update={"cache": False}))))
    # both are in the folder now, and each finds its own
    for folder in (original, other):
        third = loaded(folder, base_hash=known)
        assert third.loaded.cache_bytes_written == 0
        assert_same(bits(third), bits(loaded(folder, NF4.model_copy(update={"cache": False}))))


def flip(path):
    with path.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))


def flip_index(path):
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-100, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [flip, flip_index, truncate, empty, os.unlink])
def test_damage_is_noticed_and_rebuilt(original, damage, small_chunks):
    first = loaded(original)
    (file,) = files()
    damage(file)
    second = loaded(original)
    assert_same(bits(second), bits(first))
    assert second.loaded.cache_bytes_written > 0
    said = "damaged pieces of the cache, read from the checkpoint instead: 1"
    assert (said in second.loaded.line()) == (damage is flip)
    if damage is flip:  # one piece is read again, not the whole
        assert second.loaded.cache_bytes_written < 0.1 * first.loaded.cache_bytes_written
    third = loaded(original)
    assert_same(bits(third), bits(first))
    assert "damaged" not in third.loaded.line()
    assert third.loaded.cache_bytes_written == 0 and read_from_source(third) < read_from_source(first) / 4


def test_a_start_that_dies_leaves_nothing(original, small_chunks):
    def die(done, total):
        if done > total // 2:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        loaded(original, progress=die)
    assert [p for p in cache_dir().rglob("*") if p.is_file()] == []


@pytest.mark.dist
def test_a_kill_leaves_no_file_that_is_read(original, small_chunks):
    def rank_main(rank):
        if os.fork() == 0:

            def die(done, total):
                if done > total // 2:
                    os.kill(os.getpid(), signal.SIGKILL)

            torch.set_num_threads(1)
            loaded(original, progress=die)
        os.wait()

    fork(rank_main, 1)
    assert files() == [] and len(list(cache_dir().rglob("*.tmp"))) == 1
    made = loaded(original)
    assert made.loaded.cache_bytes_read == 0
    # a day later it is swept away
    (left,) = cache_dir().rglob("*.tmp")
    os.utime(left, (0, 0))
    flip(files()[0])
    loaded(original)
    assert list(cache_dir().rglob("*.tmp")) == []


# -- a disk that refuses ---------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_is_a_warning(original, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DECOMPFT_CACHE", str(tmp_path / "file/cache"))
    made = loaded(original)
    assert "quantized rows are not cached" in made.loaded.warning and "DECOMPFT_CACHE" in made.loaded.warning
    assert_same(bits(made), bits(loaded(original, NF4.model_copy(update={"cache": False}))))


def test_a_defect_of_the_writer_is_a_warning_and_holds_nobody_up(tmp_path, caplog):
    writer = Writer(tmp_path)
    for first in range(20):  # many more than may wait
        writer.add("w", first, (torch.zeros(()),), "")  # a scalar has no rows
    writer.finish()
    assert writer.warning.startswith(f"quantized rows are not cached: {tmp_path}: ")
    assert "a defect in writing the cache" in caplog.text and list(tmp_path.iterdir()) == []


@pytest.mark.dist
def test_a_disk_that_fills_up_is_a_warning(original, small_chunks):
    def rank_main(rank):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        made = loaded(original)
        assert "File too large" in made.loaded.warning
        assert made.loaded.cache_bytes_written == 0
        assert_same(bits(made), bits(loaded(original, NF4.model_copy(update={"cache": False}))))

    fork(rank_main, 1)
    assert [p for p in cache_dir().rglob("*") if p.is_file()] == []


# -- several ranks ---------------------------------------------------------------------------------


def on_ranks(world, work, *, make=lambda: FsdpEngine(CPU, timeout_s=60, cpu_offload=False)):
    def rank_main(rank):
        engine = make()
        engine.start()
        try:
            work(engine)
        finally:
            engine.stop()

    fork(rank_main, world)


@pytest.mark.dist
@pytest.mark.parametrize(("writers", "readers"), [(2, 2), (2, 1), (1, 2), (2, 3), (3, 2)])
def test_a_cache_of_one_mesh_serves_another(original, writers, readers, small_chunks):
    on_ranks(writers, lambda engine: loaded(original, engine=engine))
    assert len(files()) == writers

    def work(engine):
        made = loaded(original, engine=engine)
        fresh = loaded(original, NF4.model_copy(update={"cache": False}), engine=engine)
        found, expected = bits(made, engine), bits(fresh, engine)
        assert_same(found, expected)
        assert made.loaded.cache_bytes_written == 0
        if writers == readers:  # pieces of one's own rows alone
            assert made.loaded.cache_bytes_read < 0.30 * made.loaded.checkpoint_bytes

    on_ranks(readers, work)
    assert len(files()) == writers


@pytest.mark.dist
def test_what_another_node_holds_is_read_from_the_checkpoint(original, small_chunks):
    on_ranks(2, lambda engine: loaded(original, engine=engine))
    files()[0].unlink()
    made = loaded(original)
    assert_same(bits(made), bits(loaded(original, NF4.model_copy(update={"cache": False}))))
    assert 0 < made.loaded.cache_bytes_written < 0.2 * made.loaded.checkpoint_bytes


@pytest.mark.dist
def test_where_the_base_is_whole_one_rank_of_a_node_writes(original):
    def work(engine):
        made = loaded(original, engine=engine)
        # the other rank may find what this one has written already: 0 is read, or a part
        assert made.loaded.bytes_read > 0
        assert made.loaded.cache_bytes_written == sum(f.stat().st_size for f in files())

    on_ranks(2, work, make=lambda: Engine(CPU, timeout_s=60))
    assert len(files()) == 1


@pytest.mark.dist
def test_jobs_that_start_at_once_agree(original, small_chunks):
    expected = bits(loaded(original, NF4.model_copy(update={"cache": False})))

    def rank_main(rank):
        os.environ |= {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
        for _ in range(3):
            assert_same(bits(loaded(original)), expected)

    fork(rank_main, 3)
    assert_same(bits(loaded(original)), expected)
