"""A finished run's folder -> a repository on the Hugging Face Hub, verified: one commit, or none where nothing differs.

A push can be run again at any time. It lists what the Hub has, sends what is missing in a single commit, and lists
again: "pushed" means that the Hub's sizes and digests of all files of the run equal those on disk. Since a commit is
all or nothing, the branch holds either what it held before or the whole run, however the push ends.
"""

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from partialtune.errors import InputError, UploadIncomplete
from partialtune.hub.access import DEFAULT_BRANCH, Target, check_access
from partialtune.hub.published_files import Gap, LocalFile, check_finished, check_whole, files_to_send, gap_between
from partialtune.net.hub_client import (
    HUB_ERRORS,
    HubUnreachable,
    NotThereYet,
    Patience,
    ask,
    hub_api,
    in_words,
    progress_bars,
    storage_protocol,
    time_limits,
    without_xet,
)
from partialtune.pages.card import name_repository
from partialtune.run_folder import locked
from partialtune.words import megabytes

__all__ = ["Patience", "PushReport", "Target", "check_access", "push_after_training", "push_run"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PushReport:
    """What a push that is complete and verified leaves on the Hub.

    Attributes:
        commit: The commit whose files were compared with the run's.
        url: The repository's page, at the branch.
        files, bytes: The run's files there, and their size.
        sent: Names of the files that this push sent; empty where nothing differed.
        removed: Names of another model's weights and configurations that it took away.
    """

    commit: str
    url: str
    files: int
    bytes: int
    sent: tuple[str, ...]
    removed: tuple[str, ...]

    def __str__(self) -> str:
        what = f"{self.files} files, {megabytes(self.bytes, 1)}, at commit {self.commit[:12]}"
        if not self.sent and not self.removed:
            return f"{self.url} holds the run already: {what}, sizes and digests verified. Nothing was sent."
        return f"Pushed to {self.url}: {what}, sizes and digests verified."


def push_run(
    run: Path, target: Target, allow_failed_audit: bool = False, patience: Patience | None = None
) -> PushReport:
    """Upload a finished run and verify what arrived. Running it again sends only what is missing.

    The run's lock is held: nothing may train there meanwhile.

    Args:
        run: Folder of a finished run.
        target: The repository and branch.
        allow_failed_audit: Push a run whose freeze audit failed.
        patience: Tries and time-outs.

    Raises:
        InputError: If the folder holds no run that may be published, or the Hub refuses the token. Nothing was sent.
        UploadIncomplete: If the upload did not come to its end; the message gives the command that resumes it.
    """
    with _held(run):
        check_finished(run, allow_failed_audit)
        return _push(run, target, allow_failed_audit, patience or Patience())


def _held(run: Path) -> AbstractContextManager:
    """The run's lock; no lock where the folder is missing or read-only."""
    return locked(run, "RUN") if run.is_dir() and os.access(run, os.W_OK) else nullcontext()


def _push(run: Path, target: Target, allow_failed_audit: bool, patience: Patience) -> PushReport:
    again = target.command(run, allow_failed_audit)
    try:
        check_access(target, patience)
    except HubUnreachable as error:
        # no bad input: the same command may succeed later (exit code 5, not 2)
        raise UploadIncomplete(_what_is_safe(run, target, str(error), again)) from error
    upload = _Upload(hub_api(), run, target)
    try:
        with time_limits(patience.answer_seconds), progress_bars(), storage_protocol(patience.answer_seconds):
            # before anything is digested: it may write README.md
            name_repository(run, target.repo_id, None if target.branch == DEFAULT_BRANCH else target.branch)
            # Each try lists the Hub anew: where a commit landed and its answer was lost, nothing is missing any more.
            commit = ask(upload.bring_across, patience)
            ask(lambda: upload.verify(commit), patience)
    except HUB_ERRORS as error:
        raise UploadIncomplete(_what_is_safe(run, target, in_words(error), again)) from error
    return upload.report(commit)


def push_after_training(
    run: Path, target: Target, allow_failed_audit: bool = False, patience: Patience | None = None
) -> PushReport:
    """`push_run` at the end of a run, which holds its lock and has not ended yet: access that was lost since
    `check_access` is no bad input any more.

    Raises:
        InputError: If the folder holds no run that may be published.
        UploadIncomplete: If the upload did not come to its end, for whatever reason.
    """
    check_whole(run, allow_failed_audit)
    try:
        return _push(run, target, allow_failed_audit, patience or Patience())
    except InputError as error:
        again = target.command(run, allow_failed_audit)
        raise UploadIncomplete(_what_is_safe(run, target, str(error), again)) from error


@dataclass
class _Upload:
    """One push. `sent` and `removed` grow with what its commits carry."""

    api: HfApi
    run: Path
    target: Target
    sent: set[str] = field(default_factory=set)
    removed: set[str] = field(default_factory=set)
    refused_parent: str | None = None

    def bring_across(self) -> str:
        """Make the branch hold the run. Returns the commit that does; makes one only where something differs."""
        head = self.api.model_info(self.target.repo_id, revision=self.target.branch).sha
        local = files_to_send(self.run)
        gap = self._gap(local, head)
        return self._send(local, gap, head) if gap else head

    def verify(self, commit: str) -> None:
        """Compare sizes and digests of all files at `commit` with those on disk.

        Raises:
            NotThereYet: If they differ, or the commit is not to be seen yet.
        """
        try:
            gap = self._gap(files_to_send(self.run), commit)
        except RevisionNotFoundError as error:
            raise NotThereYet(f"The Hub does not show commit {commit} yet") from error
        if gap:
            raise NotThereYet(f"On the Hub, commit {commit} differs from the run in {gap}")

    def report(self, commit: str) -> PushReport:
        files = files_to_send(self.run)
        page = f"{constants.ENDPOINT}/{self.target.repo_id}"
        return PushReport(
            commit=commit,
            url=page if self.target.branch == DEFAULT_BRANCH else f"{page}/tree/{self.target.branch}",
            files=len(files),
            bytes=sum(file.size for file in files.values()),
            sent=tuple(sorted(self.sent)),
            removed=tuple(sorted(self.removed)),
        )

    def _gap(self, local: dict[str, LocalFile], commit: str) -> Gap:
        return gap_between(local, self.api.list_repo_tree(self.target.repo_id, recursive=True, revision=commit))

    def _send(self, local: dict[str, LocalFile], gap: Gap, head: str) -> str:
        """One commit on top of `head`, so that a commit whose answer was lost is never made twice."""
        size = sum(local[name].size for name in gap.missing)
        logger.info("Sending %d files, %s, to %s.", len(gap.missing), megabytes(size, 1), self.target.repo_id)
        if gap.stale:
            logger.info("Taking away files of another model: %s.", ", ".join(gap.stale))
        self.sent.update(gap.missing)
        self.removed.update(gap.stale)
        try:
            return self.api.create_commit(
                self.target.repo_id,
                [
                    *(CommitOperationAdd(name, local[name].path) for name in gap.missing),
                    *(CommitOperationDelete(name) for name in gap.stale),
                ],
                commit_message=f"Add a run of partialtune ({len(gap.missing)} files)",
                revision=self.target.branch,
                parent_commit=None if head == self.refused_parent else head,
            ).oid
        except HfHubHTTPError as error:
            if error.response.status_code == 412:  # for somebody else's commit; with some tokens for the very head
                self.refused_parent = head
            raise
        except (OSError, RuntimeError, ValueError) as error:
            raise without_xet(error) from error


def _what_is_safe(run: Path, target: Target, reason: str, again: str) -> str:
    """What failed, what is safe where, and the command that goes on."""
    return (
        f"The upload to {target.repo_id} did not complete. {reason}\n"
        f"The run is safe and whole in {run}. A push is one commit, so unless one is named above the Hub holds either "
        f"what it held before or the whole run, never a part. This sends what is missing and verifies it:\n"
        f"  {again}"
    )
