"""Where a run is pushed to: a repository, a branch of it, and who may see it."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from partialtune.errors import InputError

DEFAULT_BRANCH = "main"


@dataclass(frozen=True)
class Target:
    """A repository on the Hub.

    Attributes:
        repo_id: NAMESPACE/NAME, created where it is missing.
        revision: A branch, created where it is missing; None is `main`.
        private: Whether the repository has to be private (True), is made public where it is new (False), or follows
            the namespace's default (None).
    """

    repo_id: str
    revision: str | None = None
    private: bool | None = None

    @property
    def branch(self) -> str:
        return self.revision or DEFAULT_BRANCH

    def check_names(self) -> None:
        """Check the form of the repository's name and of the branch's, without asking anybody.

        Raises:
            InputError: If one of them cannot be pushed to.
        """
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise InputError(f"{self.repo_id!r} is no repository's name: {error}") from error
        if "/" not in self.repo_id:
            raise InputError(
                f"{self.repo_id!r} names no namespace. Give the full name, NAMESPACE/{self.repo_id}, where the "
                f"namespace is your user name or an organisation of yours."
            )
        if self.revision is not None and (re.fullmatch(r"[0-9a-f]{40}", self.revision) or not self.revision.strip("/")):
            raise InputError(
                f"revision {self.revision!r} cannot be pushed to. Give the name of a branch, such as main."
            )

    def command(self, run: Path, allow_failed_audit: bool) -> str:
        """The command that pushes a run here, or goes on with it."""
        words = ["partialtune", "push", str(run), "--repo_id", self.repo_id]
        words += ["--revision", self.revision] if self.revision else []
        words += ["--private", str(self.private).lower()] if self.private is not None else []
        words += ["--allow_failed_audit"] if allow_failed_audit else []
        return shlex.join(words)
