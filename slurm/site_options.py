"""Which options of sbatch does a profile stand for? A pure function of checked values."""

from __future__ import annotations

from decompft.slurm.profile import Profile


def site_options(profile: Profile, *, gpus_per_node: int, tasks_per_node: int = 1) -> tuple[str, ...]:
    """What goes behind `#SBATCH ` for the site; the run's own options (nodes, signal, output, ...) are not here.

    Args:
        gpus_per_node: 0 asks for none.
        tasks_per_node: among which the node's cores are divided.

    Returns:
        `--name` or `--name=value` each, the profile's own `directives` last.
    """
    gpu = [profile.gpu_type] if profile.gpu_type else []
    other = list(profile.gres)
    per_node = None
    if gpus_per_node and profile.gpu_request == "gpus-per-node":
        per_node = ":".join([*gpu, str(gpus_per_node)])
    elif gpus_per_node:
        other = [":".join(["gpu", *gpu, str(gpus_per_node)]), *other]
    cpus = profile.cpus_per_node
    values = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "reservation": profile.reservation,
        "gpus-per-node": per_node,
        "gres": ",".join(other) or None,
        "cpus-per-task": None if cpus is None else max(1, cpus // tasks_per_node),
        "mem": profile.mem,
        "time": profile.time,
        "mail-user": profile.mail and profile.mail.user,
        "mail-type": profile.mail and ",".join(profile.mail.events),
    }
    options = [f"--{name}={value}" for name, value in values.items() if value is not None]
    return (*options, *(["--exclusive"] if profile.exclusive else []), *profile.directives)
