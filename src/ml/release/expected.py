"""Which bytes may be released from a commit, and who vouches for them: its tag, its reviewers, or an unchanged lock."""

import hashlib
from dataclasses import dataclass

from ml import git
from ml.errors import UserError
from ml.lock import LOCK
from ml.release import receipt, tag
from ml.release.merge_request import Review
from ml.release.tag import Tag

AGAIN = (
    "Retry the job of the merge request's pipeline that keeps it: it restores or trains, and keeps both anew. Then run the "
    "release job again."
)


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


def expect(commit: str, tags: list[Tag], review: Review | None) -> Expected | None:
    """What the tag of this commit, else the reviewers' receipt, else an unchanged dvc.lock vouches for.

    None when nothing does. Raises UserError for a receipt that cannot be trusted.
    """
    own = own_tag(tags, commit)
    if own is not None:
        return of_tag(own)
    if review is not None and review.receipt is not None:
        return of_receipt(review, commit)
    committed = git.show(commit, LOCK)
    if tags and committed is not None:
        digest = hashlib.sha256(committed).hexdigest()
        if tags[0].trailers.get("Lock-Sha256") == digest:
            why = why_unexpected(review)
            return Expected(tags[0].name, committed, tags[0].trailers["Model-Sha256"], unreviewed=why)
    return None


def of_tag(own: Tag) -> Expected:
    """The dvc.lock of a release is in its commit."""
    digest, model, lock = (
        own.trailers.get("Lock-Sha256"),
        own.trailers.get("Model-Sha256"),
        git.show(own.commit, LOCK),
    )
    named = None not in (digest, model) and own.sums
    if not named or model is None or lock is None or hashlib.sha256(lock).hexdigest() != digest:
        raise UserError(
            f"The tag {own.name} does not name its model (Model-Sha256), the {LOCK} of its commit (Lock-Sha256) and its "
            f"files ({tag.SUMS}), so it was not made by the release job. Delete it (Code → Tags), then run the job again."
        )
    return Expected(f"the tag {own.name}", lock, model)


def of_receipt(review: Review, commit: str) -> Expected:
    assert review.receipt is not None
    source = f"the receipt of !{review.iid}"
    seen = receipt.parse(review.receipt, source)
    if seen.model_sha256 is None:
        raise UserError(f"{source} names no model. {AGAIN}")
    ran_in = seen.job.pipeline_id if seen.job else None
    if seen.commit != review.sha or ran_in not in (None, review.pipeline):
        raise UserError(
            f"{source} is about commit {seen.commit} in pipeline {ran_in}, and was found in pipeline {review.pipeline} of "
            f"commit {review.sha}. Somebody has put it there. {AGAIN}"
        )
    for lock in (review.lock, git.show(commit, LOCK)):
        if lock is not None and hashlib.sha256(lock).hexdigest() == seen.lock_sha256:
            return Expected(source, lock, seen.model_sha256)
    raise UserError(
        f"{source} is about a dvc.lock with sha256 {seen.lock_sha256}, which neither the job's artifacts nor the "
        f"commit holds. Somebody has changed one of them. {AGAIN}"
    )


def why_unexpected(review: Review | None) -> str:
    return review.absent if review else "no merged merge request was found for it"
