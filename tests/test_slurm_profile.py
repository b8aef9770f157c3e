"""A site's profile is found, read strictly, and what is wrong in it is told with its place."""

from __future__ import annotations

import subprocess
import typing
from pathlib import Path
from typing import Any

import pytest

from decompft.launcher.errors import EXIT_USER, ProfileError
from decompft.slurm.profile import Profile, default, find, load
from decompft.slurm.profile_environment import CondaEnvironment, NoEnvironment, VenvEnvironment
from decompft.slurm.shell_words import expanding
from decompft.slurm.site_options import site_options


@pytest.fixture
def read(tmp_path: Path) -> typing.Callable[[str], Profile]:
    def read(text: str) -> Profile:
        path = tmp_path / "site.yaml"
        path.write_text(text)
        return load(path)

    return read


@pytest.fixture
def error(tmp_path: Path) -> typing.Callable[[str], ProfileError]:
    def error(text: str) -> ProfileError:
        path = tmp_path / "site.yaml"
        path.write_text(text)
        with pytest.raises(ProfileError) as caught:
            load(path)
        assert caught.value.exit_code == EXIT_USER
        caught.value.message = caught.value.message.replace(f"{path}:", "")
        return caught.value

    return error


# -- reading --


def test_an_empty_file_is_the_default(read: Any) -> None:
    assert read("") == read("# nothing\n") == default() == Profile()
    assert default().environment == NoEnvironment(kind="none", python="python")


def test_every_kind_of_environment_is_read(read: Any) -> None:
    assert read("environment: {kind: venv, path: ~/v}").environment == VenvEnvironment(
        kind="venv", path="~/v"
    )
    conda = read("environment: {kind: conda, name: ft}").environment
    assert conda == CondaEnvironment(kind="conda", name="ft") and conda.python == "python"
    assert read("environment: {kind: module, load: [python/3.12]}").environment.load == ["python/3.12"]
    assert read("environment: {kind: apptainer, image: a.sif}").environment.binds == []
    pyxis = read("environment: {kind: pyxis, image: r#a:1, mounts: [/a:/b, /a:/c:ro]}").environment
    assert pyxis.mounts == ["/a:/b", "/a:/c:ro"]


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("partion: x", "1:1: partion", "did you mean partition?"),
        ("interface: ib0", "1:1: interface", "did you mean network.interface?"),
        ("network:\n  interfaces: ib0", "2:3: network.interfaces", "did you mean interface?"),
        ("mem: 64", "1:6: mem", 'put it in quotes: "64"'),
        ("mem: 64GB", "1:6: mem", "does not have the form"),
        ("time: 1:30", "1:7: time", "D-HH:MM:SS"),
        ("exclusive: yes", "1:12: exclusive", "true or false"),
        ("gpu_request: Gres", "1:14: gpu_request", "did you mean gres?"),
        ("signal: usr1", "1:9: signal", "did you mean USR1?"),
        ("grace_s: 0", "1:10: grace_s", "at least 1"),
        ("mail: {events: [END]}", "1:1: mail.user", "required and missing"),
        ("mail: {user: me, events: [FAILED]}", "1:27: mail.events[0]", "did you mean FAIL?"),
        ("mail: {user: me, events: []}", "1:26: mail.events", "at least 1 item"),
        ("prepare: {cpus: 0}", "1:17: prepare.cpus", "at least 1"),
        ("environment: venv", "1:14: environment", "a section (key: value)"),
        ("environment: {path: x}", "1:1: environment", "needs a kind: none, module, venv, conda, apptainer"),
        ("environment: {kind: cond}", "1:21: environment.kind", "did you mean conda?"),
        ("environment: {kind: venv}", "1:1: environment.path", "add it: the environment's folder"),
        ("environment: {kind: venv, path: x, pth: y}", "1:36: environment.pth", "did you mean path?"),
        ("environment: {kind: conda}", "1:1: environment", "exactly one of name and prefix"),
        ("environment: {kind: conda, name: a, prefix: /b}", "1:1: environment", "exactly one of"),
        ("environment: {kind: module, load: []}", "1:35: environment.load", "at least 1 item"),
        ("environment: {kind: module, load: [-x]}", "1:36: environment.load[0]", "not a module's name"),
        ("environment: {kind: pyxis, image: a, mounts: ['/a:/b,/c:/d']}", "1:47: environment.mounts[0]", "one an"),
        ("environment: {kind: pyxis, image: a, options: [x]}", "1:48: environment.options[0]", "begins with -"),
        ('environment: {kind: venv, path: "a\\nb"}', "1:33: environment.path", "a line break"),
        ("modules: ['cuda; rm']", "1:11: modules[0]", "not a module's name"),
        ("network: {interface: ^docker0}", "1:22: network.interface", "by their names"),
        ("logs: ~/logs", "1:7: logs", "expands neither ~ nor $"),
        ("logs: logs", "1:7: logs", "an absolute path"),
        ("- a", "1:1", "a list of keys"),
        ("a: 1\na: 2", "2:1: a", "written twice, first at line 1:1"),
        ("a: b: c", "1:5", "not valid YAML"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_place(error: Any, text: str, place: str, words: str) -> None:
    caught = str(error(text))
    assert f"{place}: " in caught and words in caught, caught


@pytest.mark.parametrize("key", ["partition", "account", "qos", "constraint", "reservation", "gpu_type"])
@pytest.mark.parametrize(
    "value", ["a b", "a\\nb", "a\\t", "$HOME", "`id`", "a'b", 'a\\"b', "a#b", "a;b", "", "a\\\\b"]
)
def test_a_value_that_sbatch_would_split_or_misread_is_refused(error: Any, key: str, value: str) -> None:
    caught = error(f'{key}: "{value}"')
    assert caught.message.startswith(f"1:{len(key) + 3}: {key}: ") and "job script's header" in caught.message


@pytest.mark.parametrize("value", ["ib&a100", "[rack1*2&rack2*4]", "(a|b)&!c", "a,b"])
def test_what_sbatch_takes_is_taken(read: Any, value: str) -> None:
    assert read(f'constraint: "{value}"').constraint == value


@pytest.mark.parametrize(
    ("option", "owner"),
    [
        ("--nodes=2", "parallel.nodes"),
        ("--ntasks-per-node=4", "field tasks"),
        ("--signal=USR1@60", "signal and grace_s"),
        ("--output=x", "field logs"),
        ("--error=x", "field logs"),
        ("--open-mode=truncate", "logs of all restarts"),
        ("--requeue", "field requeue"),
        ("--no-requeue", "field requeue"),
        ("--job-name=x", "the recipe's name"),
        ("--time=1", "field time"),
        ("--array=1-3", "sweep"),
        ("--dependency=afterok:1", "chain"),
        ("--gpus=4", "gpu_request"),
        ("--gpus-per-task=1", "gpu_request"),
        ("--gres=gpu:4", "gres"),
        ("--part=x", "--partition is not a directive"),
        ("--cpus-per=4", "cpus_per_node"),
        ("--exclus", "field exclusive"),
        ("-N 2", "long form"),
        ("switches=1", "long form"),
        ("--comment=a b", "job script's header"),
        ("--comment=a\\n#SBATCH --nodes=9", "job script's header"),
    ],
)
def test_a_directive_that_is_somebody_elses_is_refused(error: Any, option: str, owner: str) -> None:
    caught = error(f'directives:\n  - --switches=1@00:10:00\n  - "{option}"\n')
    assert caught.message.startswith("3:5: directives[1]: ") and owner in caught.message


@pytest.mark.parametrize(
    "option", ["--switches=1@00:10:00", "--mem-bind=local", "--nice", "--time-min=1:00:00"]
)
def test_other_directives_are_kept_as_they_are(read: Any, option: str) -> None:
    profile = read(f'directives: ["{option}"]')
    assert profile.directives == [option] and site_options(profile, gpus_per_node=0) == (option,)


@pytest.mark.parametrize("section", ["env", "network.env"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("HF_TOKEN", "looks like a secret"),
        ("WANDB_API_KEY", "export it in the shell that submits"),
        ("wandb_apikey", "looks like a secret"),
        ("MY_PASSWORD", "looks like a secret"),
        ("AWS_SECRET_ACCESS", "looks like a secret"),
        ("GOOGLE_CREDENTIALS", "looks like a secret"),
        ("NCCL_SOCKET_IFNAME", "network.interface"),
        ("GLOO_SOCKET_IFNAME", "network.interface"),
        ("CUDA_VISIBLE_DEVICES", "cannot change it"),
        ("RANK", "cannot change it"),
        ("SLURM_NNODES", "belongs to Slurm"),
        ("A-B", "not a name of an environment variable"),
        ("1A", "not a name of an environment variable"),
        ("A B", "not a name of an environment variable"),
    ],
)
def test_a_variable_that_must_not_be_set_is_refused(error: Any, section: str, name: str, words: str) -> None:
    if section == "env":
        caught, place = error(f"env:\n  {name}: x"), "2:3: env."
    else:
        caught, place = error(f"network:\n  env:\n    {name}: x"), "3:5: network.env."
    assert caught.message.startswith(f"{place}{name}: ") and words in caught.message, caught


def test_a_name_that_only_looks_near_a_secret_is_no_secret(read: Any) -> None:
    env = {"TOKENIZERS_PARALLELISM": "false", "HF_HOME": "$SCRATCH/hf", "KEYBOARD": "de", "PASSES": "3"}
    assert read("env:\n" + "".join(f"  {k}: '{v}'\n" for k, v in env.items())).env == env


def test_all_mistakes_are_told_at_once_and_in_order(error: Any) -> None:
    message = error("partition: a b\nenv: {HF_TOKEN: x}\ngrace: 3\n").message
    assert "3 errors" in message
    assert [message.index(key) for key in ("partition:", "env.HF_TOKEN:", "grace:")] == sorted(
        message.index(key) for key in ("partition:", "env.HF_TOKEN:", "grace:")
    )


# -- finding --


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a folder in it, and a user's configuration."""
    (tmp_path / "repo/.git").mkdir(parents=True)
    (tmp_path / "repo/deep/er").mkdir(parents=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def put(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text("")
    return folder / f"{name}.yaml"


def test_a_name_is_looked_up_from_the_repository_outwards(places: Path) -> None:
    cwd = places / "repo/deep/er"
    shipped = find("generic-gpu", cwd=cwd)
    assert shipped.parent.name == "profiles"
    for folder in ("config/decompft/slurm", "repo/.decompft/slurm", "repo/slurm", "repo/deep/slurm"):
        path = put(places / folder, "generic-gpu")
        assert find("generic-gpu", cwd=cwd) == path


def test_folders_above_the_repository_are_not_looked_at(places: Path) -> None:
    put(places / "slurm", "mine")
    with pytest.raises(ProfileError):
        find("mine", cwd=places / "repo/deep")
    put(places / "elsewhere/slurm", "mine")  # no repository: only the current folder
    assert find("mine", cwd=places / "elsewhere").exists()
    (places / "elsewhere/below").mkdir()
    with pytest.raises(ProfileError):
        find("mine", cwd=places / "elsewhere/below")


def test_a_path_is_that_file(places: Path) -> None:
    path = put(places / "repo/deep", "here")
    assert find("here.yaml", cwd=path.parent) == find(str(path), cwd=places) == path


def test_without_xdg_the_home_folder_counts(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", str(places / "home"))
    path = put(places / "home/.config/decompft/slurm", "mine")
    assert find("mine", cwd=places / "repo") == path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("generic-gpus", "did you mean generic-gpu?"),
        ("nix", "known here: container-pyxis, generic-gpu, gres-modules-infiniband"),
        ("nix.yaml", "nix.yaml: no such file"),
        ("generic-gpu.yaml", "did you mean generic-gpu?"),
        ("a/b", "neither the name of a profile nor a path"),
        ("../generic-gpu", "neither the name of a profile nor a path"),
        ("", "neither the name of a profile nor a path"),
    ],
)
def test_what_is_not_found_names_what_is(places: Path, name: str, words: str) -> None:
    with pytest.raises(ProfileError) as caught:
        find(name, cwd=places / "repo")
    assert words in str(caught.value)


def test_a_folder_or_other_bytes_are_told_in_words(places: Path) -> None:
    (places / "folder.yaml").mkdir()
    with pytest.raises(ProfileError, match="no such file"):
        find("folder.yaml", cwd=places)
    (places / "b.yaml").write_bytes(b"partition: \xff\n")
    with pytest.raises(ProfileError, match="not UTF-8"):
        load(places / "b.yaml")


# -- what it means to sbatch and to the shell --


def test_the_options_of_a_full_profile(read: Any) -> None:
    profile = read(
        "{partition: p, account: a, qos: q, constraint: x&y, reservation: r, gpu_type: a100, gres: ['l:200'], "
        "cpus_per_node: 64, mem: 400G, exclusive: true, time: 1:00:00, mail: {user: me}, directives: [--nice]}"
    )
    assert site_options(profile, gpus_per_node=4, tasks_per_node=4) == (
        "--partition=p", "--account=a", "--qos=q", "--constraint=x&y", "--reservation=r",
        "--gpus-per-node=a100:4", "--gres=l:200", "--cpus-per-task=16", "--mem=400G", "--time=1:00:00",
        "--mail-user=me", "--mail-type=END,FAIL", "--exclusive", "--nice",
    )  # fmt: skip
    as_gres = profile.model_copy(update={"gpu_request": "gres"})
    assert "--gres=gpu:a100:4,l:200" in site_options(as_gres, gpus_per_node=4)
    assert "--gres=l:200" in site_options(as_gres, gpus_per_node=0)


def test_no_profile_asks_for_nothing_but_gpus() -> None:
    assert site_options(default(), gpus_per_node=0) == ()
    assert site_options(default(), gpus_per_node=2) == ("--gpus-per-node=2",)
    assert site_options(Profile(gpu_request="gres"), gpus_per_node=2) == ("--gres=gpu:2",)


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("/local/$USER/${JOB}x", "/local/me/7x"),
        ("~/a b", "/home/me/a b"),
        ("~", "/home/me"),
        ("a~/b", "a~/b"),
        ("$(id) `id` \\ \" ' $ $$ $1 ${} *", "$(id) `id` \\ \" ' $ $$ $1 ${} *"),
        ("\\$USER", "\\me"),
        ("a!b", "a!b"),
    ],
)
def test_a_value_is_one_shell_word_in_which_only_names_are_filled_in(text: str, becomes: str) -> None:
    env = {"USER": "me", "JOB": "7", "HOME": "/home/me", "PATH": "/bin"}
    done = subprocess.run(
        ["bash", "-uc", f"printf '<%s>' {expanding(text)}"], env=env, capture_output=True, text=True
    )
    assert done.stdout == f"<{becomes}>", done.stderr


def test_a_variable_that_is_not_there_ends_the_script_with_its_name() -> None:
    done = subprocess.run(
        ["bash", "-uc", f": {expanding('/x/$NIX')}"], env={}, capture_output=True, text=True
    )
    assert done.returncode != 0 and "NIX" in done.stderr
