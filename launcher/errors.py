"""What can go wrong, in words: every error says where, what, and what to do."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_USER = 2
EXIT_FAILED = 3
EXIT_AGAIN = 75


class DecompftError(Exception):
    """An error that is shown to the user as text, never as a traceback.

    Args:
        message: where and what, starting with the place (file, key, rank) if there is one.
        hint: what to do about it; one or two sentences, or "".
    """

    exit_code = EXIT_FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class UserError(DecompftError):
    """The input is wrong: nothing was started, nothing was changed."""

    exit_code = EXIT_USER


class RecipeError(UserError):
    """A recipe, an override or a combination of keys that cannot work."""


class PlanError(UserError):
    """A recipe that is well formed but cannot be planned (batch, memory, world size)."""


class ModelError(UserError):
    """A model that cannot be found, read or understood."""


class DataError(UserError):
    """Training data that is missing, empty or cannot be trained on."""


class CheckpointError(UserError):
    """A checkpoint that does not belong to this run, or is damaged."""


class AdapterError(UserError):
    """An adapter that does not fit its model, or a target that matches nothing."""


class ProfileError(UserError):
    """A description of a Slurm site that cannot be found or cannot work."""


class SlurmError(UserError):
    """Slurm is not here, does not answer, or refuses what was asked of it."""


class RunFailed(DecompftError):
    """The run started and died; the message says which rank, which step, and what to type next."""
