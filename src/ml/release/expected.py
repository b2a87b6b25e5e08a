"""Which bytes may be released from a commit, and who vouches for them: its tag, its reviewers, or an unchanged lock."""

import hashlib
from dataclasses import dataclass

from ml import git
from ml.errors import UserError
from ml.lock import LOCK
from ml.release import gitlab_release, merge_request, receipt, tag
from ml.release.merge_request import Review
from ml.release.tag import Tag
from ml.settings import Settings


@dataclass(frozen=True)
class Expected:
    """The bytes that may be released: what `by` says of them.

    `unreviewed`: why no review says so; then all that is known is that dvc.lock is the last release's.
    """

    by: str
    lock: bytes
    model_sha256: str
    unreviewed: str | None = None


def own_tag(tags: list[Tag], commit: str) -> Tag | None:
    """The release of this very commit. Raises UserError when a later commit has been released already."""
    for each in tags:
        if each.base == commit:
            return each
    for each in tags:
        if tag.is_ancestor(commit, each.base):
            raise UserError(
                f"{each.name} is the release of a later commit ({each.base[:8]}), so {commit[:8]} comes too late. "
                f"Nothing was released. To go back to its model, revert what came after it."
            )
    return None


def expect(settings: Settings, commit: str, tags: list[Tag], review: Review | None) -> Expected | None:
    """What the tag of this commit, else the reviewers' receipt, else an unchanged dvc.lock vouches for.

    None when nothing does. Raises UserError for a receipt that cannot be trusted.
    """
    own = own_tag(tags, commit)
    if own is not None:
        return of_tag(settings, own, commit, review)
    if review is not None and review.receipt is not None:
        return of_receipt(review, commit)
    committed = git.show(commit, LOCK)
    if tags and committed is not None:
        digest = hashlib.sha256(committed).hexdigest()
        if tags[0].trailers.get("Lock-Sha256") == digest:
            why = why_unexpected(review, settings)
            return Expected(tags[0].name, committed, tags[0].trailers["Model-Sha256"], unreviewed=why)
    return None


def of_tag(settings: Settings, own: Tag, commit: str, review: Review | None) -> Expected:
    """The dvc.lock of a release is in its commit; where nobody could push one, among its files."""
    digest, model = own.trailers.get("Lock-Sha256"), own.trailers.get("Model-Sha256")
    if digest is None or model is None:
        raise UserError(
            f"The tag {own.name} has no Model-Sha256 and Lock-Sha256 below its message, so it was not made by the "
            "release job. Delete it, then run the job again."
        )
    found = [git.show(own.commit, LOCK), git.show(commit, LOCK), review.lock if review else None]
    project = merge_request.connect(settings, write=False)
    if project is not None:
        with merge_request.explained(settings, "Looking for the release's dvc.lock"):
            found.append(gitlab_release.download(project, own.version, LOCK))
    for lock in found:
        if lock is not None and hashlib.sha256(lock).hexdigest() == digest:
            return Expected(f"the tag {own.name}", lock, model)
    raise UserError(
        f"The dvc.lock that {own.name} was released with (sha256 {digest}) is nowhere to be had: not in its commit, "
        "not among the files of its GitLab release. Put it into dvc.lock and commit it."
    )


def of_receipt(review: Review, commit: str) -> Expected:
    assert review.receipt is not None
    source = f"the receipt of !{review.iid}"
    seen = receipt.parse(review.receipt, source)
    if seen.model_sha256 is None:
        raise UserError(f"{source} names no model. Run the merge request's pipeline again.")
    for lock in (review.lock, git.show(commit, LOCK)):
        if lock is not None and hashlib.sha256(lock).hexdigest() == seen.lock_sha256:
            return Expected(source, lock, seen.model_sha256)
    raise UserError(
        f"{source} is about a dvc.lock with sha256 {seen.lock_sha256}, which neither the job's artifacts nor the "
        "commit holds. Somebody has changed one of them: run the merge request's pipeline again."
    )


def why_unexpected(review: Review | None, settings: Settings) -> str:
    if review is None:
        return "no merged merge request was found for it"
    return f"the job {settings.release_job} of {review.url} left no reports/receipt.json, or it has expired"
