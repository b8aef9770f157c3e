"""Which texts may stand in a job script's header, and which in its environment?

sbatch expands nothing in an #SBATCH line, splits it at blanks, and reads quotes, backslashes and # in its own way:
what goes there is checked letter by letter. Everything else is quoted by the renderer and may hold what it likes.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

# what sbatch takes as it stands: a feature list (a&b|[c*2]), a GRES (gpu:a100:4), a mail address
HEADER_TEXT = re.compile(r"[\w.,:@%+/=*\[\]&|!()-]+", re.ASCII)
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# whole words of a name, or how one ends: HF_TOKEN, APIKEY, but not TOKENIZERS_PARALLELISM
_SECRET = re.compile(
    r"(TOKENS?|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|KEYS?|CREDENTIALS?)$|^(PASS|PAT)$", re.ASCII
)
# set for each rank, or for each node, by the script, by torchrun or by Slurm
_RANK_NAMES = frozenset(
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK NODE_RANK MASTER_ADDR MASTER_PORT "
    "CUDA_VISIBLE_DEVICES DECOMPFT_DEVICE DECOMPFT_JOB PYTHONSAFEPATH TORCH_ELASTIC_SHUTDOWN_TIMEOUT".split()
)
_OF_FIELDS = {
    "NCCL_SOCKET_IFNAME": "network.interface",
    "GLOO_SOCKET_IFNAME": "network.interface",
    "DECOMPFT_SCRATCH": "scratch",
    "DECOMPFT_PYTHON": "environment",
}

# an option that a field, the recipe or the script itself writes -> whose it is
_OWNED = {
    "nodes": "the recipe's parallel.nodes",
    "ntasks": "the field tasks",
    "ntasks-per-core": "the field tasks",
    "ntasks-per-gpu": "the field tasks",
    "ntasks-per-node": "the field tasks",
    "ntasks-per-socket": "the field tasks",
    "cpus-per-task": "the field cpus_per_node",
    "cpus-per-gpu": "the field cpus_per_node",
    "gpus": "the fields gpu_request and gpu_type",
    "gpus-per-node": "the fields gpu_request and gpu_type",
    "gpus-per-socket": "the fields gpu_request and gpu_type",
    "gpus-per-task": "the fields gpu_request and gpu_type",
    "gpu-bind": "nothing: a rank must see all GPUs of its node",
    "gres": "the fields gpu_request, gpu_type and gres",
    "mem": "the field mem",
    "mem-per-cpu": "the field mem",
    "mem-per-gpu": "the field mem",
    "exclusive": "the field exclusive",
    "partition": "the field partition",
    "account": "the field account",
    "qos": "the field qos",
    "constraint": "the field constraint",
    "reservation": "the field reservation",
    "time": "the field time",
    "signal": "the fields signal and grace_s",
    "requeue": "the field requeue",
    "no-requeue": "the field requeue",
    "mail-user": "the field mail.user",
    "mail-type": "the field mail.events",
    "output": "the field logs",
    "error": "the field logs",
    "open-mode": "nothing: the logs of all restarts are kept",
    "job-name": "the recipe's name",
    "array": "decompft, for a sweep",
    "dependency": "decompft, for a chain of jobs",
    "chdir": "nothing: a job starts where it was submitted",
    "export": "the field env",
    "export-file": "the field env",
    "exclude": "decompft, which leaves out nodes that failed",
    "nodelist": "nothing: a job bound to a dead node waits for ever",
    "wrap": "nothing: the script is decompft's",
    "wait": "nothing: use `decompft status`",
    "test-only": "nothing: `decompft doctor --slurm` does it",
    "parsable": "nothing: decompft reads sbatch's answer itself",
    "clusters": "nothing: submit on a login node of that cluster",
    "nodefile": "nothing: a job bound to a dead node waits for ever",
    "no-kill": "the recipe's slurm.spares",
}


def _header_text(text: str) -> str:
    if not HEADER_TEXT.fullmatch(text):
        raise ValueError(
            f"{text!r} cannot stand in a job script's header: "
            "letters, digits and . , : @ % + / = * [ ] & | ! ( ) - _ only"
        )
    return text


def _directive(line: str) -> str:
    found = re.fullmatch(r"--([a-z][a-z0-9-]*)(?:=(.*))?", line, re.ASCII | re.DOTALL)
    if not found:
        raise ValueError(f"{line!r} is not an option of sbatch in its long form, like --switches=1@00:10:00")
    name, value = found[1], found[2]
    # sbatch takes any beginning of a name that is clear: --part is --partition
    owned = name if name in _OWNED else next((o for o in sorted(_OWNED) if o.startswith(name)), None)
    if owned:
        raise ValueError(f"--{owned} is not a directive of a profile; it belongs to {_OWNED[owned]}")
    if value is not None:
        _header_text(value)
    return line


def _env_name(name: str) -> str:
    if not _ENV_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a name of an environment variable: letters, digits and _ only")
    if any(_SECRET.search(word) for word in name.upper().split("_")):
        raise ValueError(
            f"{name} looks like a secret, and a profile is no place for one: export it in the shell that submits, "
            "the job inherits it"
        )
    if name in _OF_FIELDS:
        raise ValueError(f"{name} is set by the field {_OF_FIELDS[name]}; write that")
    if name in _RANK_NAMES:
        raise ValueError(f"{name} is set by the job script; a profile cannot change it")
    if name.startswith(("SLURM_", "SBATCH_")):
        raise ValueError(f"{name} belongs to Slurm; use a field of the profile, or directives")
    return name


def _no_nul(text: str) -> str:
    if "\0" in text or "\n" in text:
        raise ValueError("a line break cannot stand here")
    return text


def _log_folder(text: str) -> str:
    if not re.fullmatch(r"/[\w.,:@+/=-]*", text, re.ASCII):
        raise ValueError(
            f"{text!r} is not a folder that sbatch could write to: an absolute path of letters, digits and "
            ". , : @ + / = - _ only, since sbatch expands neither ~ nor $"
        )
    return text


def _module(text: str) -> str:
    if not re.fullmatch(r"[\w./+:@~][\w./+:@~-]*", text, re.ASCII):
        raise ValueError(f"{text!r} is not a module's name, like cuda/12.8")
    return text


def _long_option(text: str) -> str:
    if not re.fullmatch(r"--?[A-Za-z].*", _no_nul(text)):
        raise ValueError(f"{text!r} is not an option: it begins with - or --")
    return text


def _mount(text: str) -> str:
    # pyxis takes one list, with commas between
    if not re.fullmatch(r"[^,:]+:[^,:]+(:[^,]+)?", _no_nul(text)):
        raise ValueError(f"{text!r} is not SRC:DST[:FLAGS], or holds more than one mount: write one an item")
    return text


def _interface(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.:@-]*(,[A-Za-z0-9][\w.:@-]*)*", text, re.ASCII):
        raise ValueError(
            f"{text!r} is not a list of network interfaces by their names, like ib0 or eth0,eth1; `ip -br addr` "
            "on a node shows them"
        )
    return text


HeaderText = Annotated[str, AfterValidator(_header_text)]  # a value of an #SBATCH line
Directive = Annotated[str, AfterValidator(_directive)]  # a whole option of one
EnvName = Annotated[str, AfterValidator(_env_name)]
Line = Annotated[str, Field(min_length=1), AfterValidator(_no_nul)]  # $NAME and a leading ~ mean the node's
LogFolder = Annotated[str, AfterValidator(_log_folder)]
ModuleName = Annotated[str, AfterValidator(_module)]
Mount = Annotated[str, AfterValidator(_mount)]
Option = Annotated[str, AfterValidator(_long_option)]
Interface = Annotated[str, AfterValidator(_interface)]
