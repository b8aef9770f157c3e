"""How does a repository of the hub come here, whole and at one commit? Into the hub library's own cache."""

from __future__ import annotations

import fnmatch
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from decompft.launcher.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Repository:
    """What was asked of the hub, and what it gave."""

    folder: Path  # the snapshot of one commit in the cache
    commit: str
    files: dict[str, str]  # name -> sha256 as the hub has it, "" where it keeps none (small files)


def fetch(
    name: str,
    revision: str,
    *,
    kind: Literal["model", "dataset"],
    part: str,
    choose: Callable[[Sequence[str], Callable[[str], str]], list[str]],
    say: Callable[[str], None],
) -> Repository:
    """Resolve a revision, and bring the files that are chosen.

    Args:
        part: the recipe's key, for messages.
        choose: from all names, and a function that reads a small file of it, those to bring.

    Raises:
        UserError: no network, no such repository or revision, no access, no space.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.hf_api import RepoFile

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(
            f"{part}: HF_HUB_OFFLINE is set, so {name} cannot be fetched",
            "type `env -u HF_HUB_OFFLINE decompft fetch ...` where there is a network",
        )
    where: dict[str, Any] = {"repo_id": name, "repo_type": kind}
    try:
        commit = str(HfApi().repo_info(revision=revision, **where).sha)
        tree = HfApi().list_repo_tree(revision=commit, recursive=True, **where)
        sums = {e.path: e.lfs.sha256 if e.lfs else "" for e in tree if isinstance(e, RepoFile)}

        def read(path: str) -> str:
            return Path(hf_hub_download(filename=path, revision=commit, **where)).read_text(encoding="utf-8")

        chosen = choose(sorted(sums), read)
        say(f"{part}: {name}, revision {revision}, is commit {commit}; {len(chosen)} files")
        # asked for by its branch, the cache notes the branch, too
        folder = Path(
            snapshot_download(revision=revision, allow_patterns=[_exactly(n) for n in chosen], **where)
        )
    except Exception as error:  # the library and httpx raise a dozen types
        raise _in_words(error, name, revision, part) from error
    if folder.name != commit:  # somebody pushed between the two requests
        raise UserError(f"{part}: {name}: {revision} has just moved to commit {folder.name}", "fetch again")
    return Repository(folder=folder, commit=commit, files={path: sums[path] for path in chosen})


def _exactly(name: str) -> str:
    """A pattern for one name, which may hold a pattern's own characters."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Names that a shell-like pattern fits; * goes through folders."""
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def _in_words(error: Exception, name: str, revision: str, part: str) -> Exception:
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoRevision

    if isinstance(error, UserError):
        return error
    if isinstance(error, HFValidationError):
        hint = "a hub id looks like meta-llama/Llama-2-7b-hf; paths in a recipe are relative to its folder"
        return UserError(f"{part}: there is no file or folder {name}, and it is no hub id either", hint)
    if isinstance(error, GatedRepoError):
        hint = (
            f"accept its licence at {constants.ENDPOINT}/{name}, then type `hf auth login` (or set HF_TOKEN)"
        )
        return UserError(f"{part}: {name} is gated, and the hub did not let you in", hint)
    if isinstance(error, NoRevision):
        return UserError(f"{part}: {name} has no revision {revision}", "its page on the hub lists them")
    if isinstance(error, RepositoryNotFoundError):
        hint = "check its name; a private one needs `hf auth login` (or HF_TOKEN)"
        return UserError(f"{part}: the hub has no {name}", hint)
    if isinstance(error, httpx.TransportError):
        return UserError(
            f"{part}: the hub ({constants.ENDPOINT}) cannot be reached from {socket.gethostname()}: "
            f"{str(error) or type(error).__name__}",
            "type `decompft fetch RECIPE` on a machine with a network, such as the login node, with HF_HOME on a "
            "disk that the nodes share; behind a proxy set HTTPS_PROXY, for a mirror HF_ENDPOINT",
        )
    if isinstance(error, OSError) and error.errno is not None:
        return error  # a full disk has words of its own
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return UserError(
        f"{part}: the hub did not give {name} (revision {revision}): {lines[0]}", "try again later"
    )
