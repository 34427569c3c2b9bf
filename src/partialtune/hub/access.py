"""Where a run is pushed to, and checks that it can be: a target -> nothing, or an error that says what to do.

Called before any training.
"""

import logging
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from partialtune.errors import InputError
from partialtune.net.hub_client import (
    HUB_ERRORS,
    HubUnreachable,
    Patience,
    ask,
    hub_api,
    in_words,
    is_temporary,
    time_limits,
)

logger = logging.getLogger(__name__)

DEFAULT_BRANCH = "main"
REFUSED = frozenset({401, 402, 403, 404})  # HTTP statuses that a token or its rights explain


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


def check_access(target: Target, patience: Patience | None = None) -> None:
    """Check that a push will be accepted. A missing repository or branch is created.

    Args:
        target: The repository and branch.
        patience: Tries and time-outs.

    Raises:
        HubUnreachable: If the Hub does not answer. It is an InputError, as all of these:
        InputError: If the name, the token, its rights, the repository's visibility or the branch is no good.
    """
    patience = patience or Patience()
    target.check_names()
    _check_token()
    api, repo_id = hub_api(), target.repo_id
    with time_limits(patience.answer_seconds):
        # first, so that a refusal below can say whose token it is and where it may write
        user = _user_of_token(api, patience)
        try:
            ask(lambda: api.create_repo(repo_id, private=target.private, exist_ok=True), patience)
            ask(lambda: api.auth_check(repo_id, write=True), patience)  # create_repo lets read-only tokens pass
            _check_visibility(api, target, patience)
            _provide_branch(api, target, patience)
        except HUB_ERRORS as error:
            raise _refusal(error, repo_id, user) from error
    logger.info("%s can be pushed to by %s.", repo_id, user.get("name"))


def _check_token() -> None:
    if is_offline_mode():
        raise InputError(
            "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, so nothing can be pushed. Unset it, or train without "
            "push_to_hub and run `partialtune push` later."
        )
    token = get_token()
    if token is None:
        raise InputError(
            f"There is no Hugging Face token. Make one with write access at {constants.ENDPOINT}/settings/tokens, "
            f"then run `hf auth login` or set HF_TOKEN."
        )
    # With a line end or a letter outside ASCII in it, the HTTP client raises an error of its own about headers.
    if not re.fullmatch(r"[!-~]+", token):
        raise InputError("The Hugging Face token has characters in it that no token has. Copy it again.")


def _user_of_token(api: HfApi, patience: Patience) -> Mapping[str, Any]:
    """What the Hub knows of the token's owner: `name`, `orgs`, `auth`."""
    try:
        return ask(api.whoami, patience)
    except HUB_ERRORS as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise InputError(
                f"{constants.ENDPOINT} does not accept the token: it is wrong, revoked or expired. Make one with write "
                f"access at {constants.ENDPOINT}/settings/tokens, then run `hf auth login`, or set HF_TOKEN, which "
                f"takes precedence."
            ) from error
        raise _unreachable(error) from error


def _check_visibility(api: HfApi, target: Target, patience: Patience) -> None:
    if target.private is None:
        return
    is_private = ask(lambda: api.model_info(target.repo_id), patience).private
    if target.private and not is_private:
        raise InputError(
            f"{target.repo_id} exists and is public, and this run is to be private. Make the repository private at "
            f"{constants.ENDPOINT}/{target.repo_id}/settings, or give another name."
        )
    if is_private and not target.private:
        logger.warning("%s exists and is private; it stays so.", target.repo_id)


def _provide_branch(api: HfApi, target: Target, patience: Patience) -> None:
    repo_id, branch = target.repo_id, target.branch
    if branch == DEFAULT_BRANCH:
        return
    if branch.startswith("refs/"):  # a pull request's: it is there or it is not
        ask(lambda: api.model_info(repo_id, revision=branch), patience)
        return
    refs = ask(lambda: api.list_repo_refs(repo_id), patience)
    if branch in {tag.name for tag in refs.tags}:
        raise InputError(f"revision {branch!r} is a tag of {repo_id}, which cannot be pushed to. Give a branch's name.")
    if branch not in {existing.name for existing in refs.branches}:
        ask(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True), patience)


def _refusal(error: Exception, repo_id: str, user: Mapping[str, Any]) -> InputError:
    """The error that says why the repository cannot be written to, and what to do."""
    if is_temporary(error):
        return _unreachable(error)
    if not isinstance(error, HfHubHTTPError) or error.response.status_code not in REFUSED:
        return InputError(f"{repo_id} cannot be prepared on the Hub. {in_words(error)}")
    return InputError(f"{user.get('name')} may not push to {repo_id}. {in_words(error)} {_advice(repo_id, user)}")


def _advice(repo_id: str, user: Mapping[str, Any]) -> str:
    namespace, name = repo_id.split("/")
    namespaces = [user.get("name"), *(organisation.get("name") for organisation in user.get("orgs", []))]
    tokens = f"{constants.ENDPOINT}/settings/tokens"
    if namespace not in namespaces:
        return (
            f"The token is known in {', '.join(map(str, namespaces))}, not in {namespace}: "
            f"push to {namespaces[0]}/{name}, or use a token with write access there ({tokens})."
        )
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        return f"The token can only read: make one with write access at {tokens}, then `hf auth login` or HF_TOKEN."
    return f"Give the token write access to {repo_id}, or to all of {namespace}, at {tokens}."


def _unreachable(error: Exception) -> InputError:
    if not is_temporary(error):
        return InputError(f"The Hub cannot be asked. {in_words(error)}")
    return HubUnreachable(
        f"The Hub could not be reached, several times over. {in_words(error)} "
        f"Try again later; HF_ENDPOINT is {constants.ENDPOINT}."
    )
