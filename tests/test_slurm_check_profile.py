"""`decompft doctor --slurm` compares a profile with a cluster: stand-ins for Slurm's programs, then a real one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import testbed
from slurm_site import CONFIG, NODE, Site
from slurm_site import site as site

from decompft.launcher.cli import main
from decompft.launcher.errors import EXIT_DONE, EXIT_USER
from decompft.slurm.check_profile import check_profile
from decompft.slurm.cluster import mebibytes
from decompft.slurm.commands import Answer
from decompft.slurm.profile import Profile
from decompft.slurm.times import seconds

pytestmark = pytest.mark.dist

FITTING: dict[str, object] = {
    "partition": "gpu", "account": "nlp", "qos": "low", "constraint": "ib&a100", "gpu_type": "a100",
    "gres": ["lscratch:200"], "cpus_per_node": 64, "mem": "400G", "time": "1-00:00:00", "reservation": "course",
}  # fmt: skip


def test_a_profile_that_fits_is_ok_in_every_line(site: Site, tmp_path: Path) -> None:
    found = site.check(**FITTING)
    assert {finding.state for finding in found.values()} == {"ok"}
    assert list(found) == [
        "Slurm", "partition", "time", "account", "qos", "GPUs", "gres", "node", "constraint", "preemption",
        "reservation", "requeue", "sbatch --test-only",
    ]  # fmt: skip
    assert "2 of 2 nodes up" in found["partition"].text and "4 on each of 2 nodes" in found["GPUs"].text
    assert found["Slurm"].text == "slurm 24.05.1, cluster mill"
    assert found["sbatch --test-only"].text == "Job 7 to start at noon"
    script = (tmp_path / "bin/sbatch.stdin").read_text().splitlines()
    assert script[0] == "#!/bin/bash" and script[-1] == ":"
    assert {"#SBATCH --partition=gpu", "#SBATCH --gpus-per-node=a100:1", "#SBATCH --gres=lscratch:200"} <= {
        *script
    }


@pytest.mark.parametrize(
    ("fields", "row", "text", "fix"),
    [
        ({"partition": "gpus"}, "partition", "no partition gpus", "did you mean gpu?"),
        ({"time": "2-00:00:00"}, "time", "more than gpu allows, 1-00:00:00", 'time: "1-00:00:00"'),
        ({"account": "nlq", "qos": None}, "account", "not in nlq", "yours: nlp, vision"),
        ({"qos": "high"}, "qos", "in the account nlp, may not use high", "yours: low, normal"),
        ({"account": "vision"}, "qos", "in the account vision, may not use low", "yours: normal"),
        ({"gpu_type": "a10"}, "GPUs", "no node of the partition has a10", "did you mean a100?"),
        ({"gres": ["nvme:1"]}, "gres", "has nvme", "known: gpu, lscratch"),
        ({"cpus_per_node": 65}, "node", "65 cores, a node gives 64", "ask for 64"),
        ({"mem": "501G"}, "node", "memory 501G, a node gives 512000 MiB", 'mem: "500G"'),
        ({"constraint": "ib&a1000"}, "constraint", "feature a1000", "did you mean a100?"),
        ({"reservation": "nix"}, "reservation", "there is no nix", "known: course"),
        ({"partition": "spare", "grace_s": 151}, "preemption", "150 s after the notice", "grace_s: 150"),
        ({"prepare": {"partition": "nix"}}, "prepare", "no partition nix", "known: cpu, gpu, spare"),
        ({"prepare": {"time": "9-00:00:00"}}, "prepare", "more than cpu allows", 'time: "1-00:00:00"'),
        ({"prepare": {"cpus": 128}}, "prepare", "128 cores", "ask for 64"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_wrong_and_says_what_to_do(
    site: Site, fields: dict[str, object], row: str, text: str, fix: str
) -> None:
    found = site.check(**Profile.model_validate({**FITTING, **fields}).__dict__)
    assert [name for name, finding in found.items() if finding.state == "wrong"] == [row]
    assert text in found[row].text and fix in found[row].fix, found[row]


def test_the_default_profile_asks_the_default_partition(site: Site) -> None:
    found = site.check()
    assert "cpu, the site's default: 1 of 1" in found["partition"].text
    assert "runs use its CPUs" in found["GPUs"].text
    assert "a task gets one core on many sites" in found["node"].fix and found["node"].state == "ok"


def test_gpus_are_asked_for_as_gres_where_the_site_is_old(site: Site) -> None:
    site.config = CONFIG.replace("cons_tres", "cons_res")
    site.write()
    assert site.check(partition="gpu")["GPUs"].fix == "gpu_request: gres"
    assert site.check(partition="gpu", gpu_request="gres")["GPUs"].state == "ok"


def test_a_type_is_left_out_where_gpus_have_none(site: Site) -> None:
    site.nodes["g[1-2]"] = [NODE.format(name="g1", gres="gpu:4")]
    site.write()
    assert "leave gpu_type out" in site.check(partition="gpu", gpu_type="a100")["GPUs"].fix
    assert site.check(partition="gpu")["GPUs"].text == "4 on each of 1 nodes (no types)"


@pytest.mark.parametrize(
    ("change", "row", "words"),
    [
        (("State=UP", "State=DRAIN"), "partition", "gpu is DRAIN"),
        (("AllowGroups=ALL", "AllowGroups=wheelers"), "partition", "for the groups wheelers"),
        (("AllowAccounts=ALL", "AllowAccounts=vision"), "account", "gpu does not take nlp"),
        (("AllowAccounts=ALL", "DenyAccounts=nlp"), "account", "gpu refuses nlp"),
        (("AllowQos=ALL", "AllowQos=normal"), "qos", "gpu does not take low"),
        (("MaxCPUsPerNode=UNLIMITED", "MaxCPUsPerNode=32"), "node", "gives 32 at most"),
        (("MaxMemPerNode=UNLIMITED", "MaxMemPerNode=1000"), "node", "gives 1000 MiB at most"),
    ],
)
def test_the_limits_of_a_partition_count(site: Site, change: tuple[str, str], row: str, words: str) -> None:
    site.partitions["gpu"] = site.partitions["gpu"].replace(*change)
    site.write()
    found = site.check(**FITTING)
    assert found[row].state == "wrong" and words in found[row].text


def test_a_partition_without_a_node_that_is_up_is_wrong(site: Site) -> None:
    site.nodes["g[1-2]"] = [line.replace("State=IDLE", "State=IDLE+DRAIN") for line in site.nodes["g[1-2]"]]
    site.write()
    assert "0 of 2 nodes up" in site.check(partition="gpu")["partition"].text


def test_accounts_are_not_checked_where_nothing_enforces_or_tells_them(site: Site) -> None:
    (site.folder / "bin/sacctmgr").unlink()
    found = site.check(account="nlp", qos="low")
    assert {found["account"].state, found["qos"].state} == {"not checked"}
    assert "sacctmgr gives no answer" in found["account"].text
    site.config = CONFIG.replace("associations,limits,qos", "none")
    site.write()
    found = site.check(account="nlp", qos="low")
    assert "enforces no accounts" in found["account"].text and "enforces no qos" in found["qos"].text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("PreemptType             = preempt/partition_prio", "PreemptType = preempt/none"), "none in this"),
        (("PreemptType             = preempt/partition_prio", "PreemptType = (null)"), "none in this"),
        (("", ""), "TERM to the ranks, 150 s to the kill, then requeued"),
        (
            ("SlurmctldParameters     = (null)", "SlurmctldParameters = preempt_send_user_signal"),
            "USR1 to the",
        ),
    ],
)
def test_preemption_is_told_as_the_site_does_it(site: Site, change: tuple[str, str], words: str) -> None:
    site.config = CONFIG.replace(*change)
    site.write()
    found = site.check(partition="spare", grace_s=120)["preemption"]
    assert found.state == "ok" and words in found.text


def test_a_qos_that_preempts_is_asked_for_its_grace(site: Site) -> None:
    site.config = CONFIG.replace("partition_prio", "qos")
    site.write()
    site.program(
        "sacctmgr", 'case "$*" in *qos\\ low*) echo "low|cluster|00:01:00";; *) echo "nlp|low|";; esac'
    )
    found = site.check(partition="gpu", qos="low", grace_s=91)["preemption"]
    assert found.state == "wrong" and found.fix.startswith("grace_s: 90")
    (site.folder / "bin/sacctmgr").unlink()
    assert site.check(partition="gpu", qos="low")["preemption"].state == "not checked"


@pytest.mark.parametrize(
    ("change", "requeue", "words"),
    [
        (("", ""), "requeue", "at least 121 s"),
        (
            ("AuthInfo                = (null)", "AuthInfo = socket=/x,cred_expire=5"),
            "requeue",
            "at least 6 s",
        ),
        (("JobRequeue              = 1", "JobRequeue = 0"), "requeue", "the script asks for it"),
        (("", ""), "successor", "a new job"),
        (("", ""), "never", "waits for you"),
    ],
)
def test_requeueing_is_told(site: Site, change: tuple[str, str], requeue: str, words: str) -> None:
    site.config = CONFIG.replace(*change)
    site.write()
    assert words in site.check(requeue=requeue)["requeue"].text


def test_what_sbatch_refuses_is_shown_with_what_was_asked(site: Site) -> None:
    refusal = "echo 'sbatch: unrecognized option --swtches=1' >&2; echo 'Try \"sbatch --help\"' >&2; exit 255"
    site.program("sbatch", f'[ "$1" = --version ] && echo slurm 24.05.1 && exit\n{refusal}')
    found = site.check(directives=["--swtches=1"])["sbatch --test-only"]
    assert (found.state, found.text) == ("wrong", "unrecognized option --swtches=1")
    assert found.fix == "Slurm was asked for --nodes=1 --swtches=1"


# -- without an answer --


def test_without_slurm_the_rest_is_checked_all_the_same(site: Site) -> None:
    for path in (site.folder / "bin").iterdir():
        path.unlink()
    found = {f.name: f for f in check_profile(Profile(logs=str(site.folder)))}
    assert found["Slurm"].state == "wrong" and "no such program" in found["Slurm"].text
    assert found["logs"].state == "ok"


def test_a_controller_that_is_down_is_told_in_its_words(site: Site) -> None:
    site.program(
        "scontrol", "echo 'slurm_load_ctl_conf error: Unable to contact slurm controller' >&2; exit 1"
    )
    found = site.check()["Slurm"]
    assert found.state == "wrong" and "Unable to contact" in found.text and "scontrol ping" in found.fix


# -- the verb --


def test_the_verb_prints_a_table_and_its_code_says_whether_all_is_fine(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.write()
    (site.folder / "slurm").mkdir()
    (site.folder / "slurm/mill.yaml").write_text("partition: gpu\ncpus_per_node: 64\n")
    monkeypatch.chdir(site.folder)
    assert main(["doctor", "--slurm", "mill"]) == EXIT_DONE
    shown = capsys.readouterr().out
    assert "slurm/mill.yaml" in shown and "slurm 24.05.1" in shown and "wrong" not in shown
    (site.folder / "slurm/mill.yaml").write_text("partition: gpu\ncpus_per_node: 640\n")
    assert main(["doctor", "--slurm", "mill"]) == EXIT_USER
    assert "do: ask for 64 cores" in capsys.readouterr().out
    assert main(["doctor", "--slurm", "mill", "--json"]) == EXIT_USER
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False and answer["profile"].endswith("slurm/mill.yaml")
    wrong = [finding for finding in answer["findings"] if finding["state"] == "wrong"]
    assert wrong == [{"name": "node", "state": "wrong", "text": "640 cores, a node gives 64 at most",
                      "fix": "ask for 64 cores"}]  # fmt: skip


def test_without_a_name_the_known_profiles_are_listed(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.write()
    assert main(["doctor", "--slurm"]) == EXIT_DONE
    assert "known here: container-pyxis, generic-gpu, gres-modules-infiniband" in capsys.readouterr().out


def test_mistakes_of_the_user_are_told_in_words(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--slurm", "generic-gpus"]) == EXIT_USER
    assert "did you mean generic-gpu?" in capsys.readouterr().err
    assert main(["doctor", "--json"]) == EXIT_USER
    assert "--json goes with --slurm" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "expected"), [("1-02:03:04", 93784), ("02:03:04", 7384), ("30:00", 1800),
                                                ("UNLIMITED", None), ("NONE", None)])  # fmt: skip
def test_times_of_slurm(text: str, expected: int | None) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize(
    ("stdout", "stderr", "expected"),
    [
        ("", "sbatch: Job 7 to start at noon\n", "Job 7 to start at noon"),
        ("", "sbatch: error: no such partition\nsbatch: error: refused\n", "no such partition; refused"),
        (
            "",
            "squeue: unrecognized option '--x'\nTry \"squeue --help\" for more\n",
            "unrecognized option '--x'",
        ),
        ("slurm_load_node error: down\n", "", "slurm_load_node error: down"),
        ("", "", "exit code 1"),
    ],
)
def test_the_words_of_a_program_of_slurm(stdout: str, stderr: str, expected: str) -> None:
    assert Answer(code=1, stdout=stdout, stderr=stderr).words == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("0", 0), ("64", 64), ("2048K", 2), ("3M", 3), ("2G", 2048), ("1T", 2**20)]
)
def test_memory_as_sbatch_reads_it(text: str, expected: float) -> None:
    assert mebibytes(text) == expected


# -- a real Slurm --


@pytest.mark.slurm
def test_a_real_cluster_agrees_with_a_profile_that_fits(cluster: testbed.Cluster, tmp_path: Path) -> None:
    fields = {"partition": "preempt", "gpu_type": "sim", "cpus_per_node": 8, "mem": "8G", "time": "1:00:00",
              "grace_s": 25, "logs": str(tmp_path), "mail": {"user": "root"}}  # fmt: skip
    for request in ("gpus-per-node", "gres"):
        found = check_profile(Profile.model_validate({**fields, "gpu_request": request}))
        assert [f for f in found if f.state == "wrong"] == []
        by_name = {finding.name: finding for finding in found}
        assert re.fullmatch(r"preempt: [1-9]\d* of \d+ nodes up", by_name["partition"].text)
        assert re.fullmatch(r"2 on each of \d+ nodes \(sim\)", by_name["GPUs"].text)
        assert "25 s to the kill" in by_name["preemption"].text
        assert "to start at" in by_name["sbatch --test-only"].text
    assert "sbatch" not in cluster.run("squeue", "-h", "-o", "%j"), "a script from stdin has that name"


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        ({"partition": "gpu"}, {"partition", "sbatch --test-only"}),
        ({"gpu_type": "a100"}, {"GPUs"}),
        ({"gres": ["lscratch:1"]}, {"gres", "sbatch --test-only"}),
        ({"cpus_per_node": 9}, {"node", "sbatch --test-only"}),
        ({"mem": "64G"}, {"node", "sbatch --test-only"}),
        ({"constraint": "ib"}, {"constraint", "sbatch --test-only"}),
        ({"reservation": "nix"}, {"reservation", "sbatch --test-only"}),
        ({"partition": "preempt", "grace_s": 26}, {"preemption"}),
        ({"directives": ["--swtches=1"]}, {"sbatch --test-only"}),
    ],
)
def test_a_real_cluster_refuses_what_doctor_finds_wrong(
    cluster: testbed.Cluster, fields: dict[str, object], rows: set[str]
) -> None:
    found = check_profile(Profile.model_validate({"cpus_per_node": 4, **fields}))
    assert {finding.name for finding in found if finding.state == "wrong"} == rows
