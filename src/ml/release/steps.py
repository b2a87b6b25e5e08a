"""The steps of a release on the default branch; `ml.release.publish` runs them in order, and says them.

Each looks at what is there before it writes, so that a release which was cut off anywhere is finished by running it
again.
"""

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from ml import bundle, files, git
from ml.errors import UserError
from ml.lock import LOCK, Lock, parse_lock, read_lock
from ml.release import (
    clean,
    gitlab_release,
    lock_gate,
    merge_request,
    pipeline,
    provenance,
    push,
    receipt,
    remote,
    tag,
)
from ml.release.expected import Expected
from ml.release.journal import Journal
from ml.release.merge_request import Review
from ml.release.receipt import StageRecord
from ml.release.tag import Tag
from ml.release.version import Version, choose, interface_hash
from ml.remotes import MAIN
from ml.report import card, gate
from ml.report.escape import escape
from ml.report.result import Comparison
from ml.settings import Settings

MODELS = Path("models")
TITLE_LIMIT = 100  # characters of a merge request's title in the tag's first line
NOBODY = "Nobody has reviewed what this commit gives"
LET_IT = (
    "Nothing was released. Bring it in by a merge request, or set RELEASE_WITHOUT_REVIEW=1 for one pipeline of the "
    "default branch."
)
WAYS_ON = (
    "Another merge may have come in between, or outputs have gone from the remotes. Either bring the default branch "
    "into a merge request, let its pipeline run, and merge that; or set RELEASE_REBUILD=1 for one pipeline of the "
    "default branch: it trains there and demands the reviewed bytes."
)
LATER = "Run the release job again; it goes on where it stopped."


@dataclass(frozen=True)
class Released:
    """The candidate as it lies in the working folder."""

    model_sha256: str
    lock: bytes
    data_hash: str
    interface: str

    @property
    def lock_sha256(self) -> str:
        return hashlib.sha256(self.lock).hexdigest()


# ---- 1. Restore or rebuild


def restore(settings: Settings, expected: Expected | None, review: Review | None) -> list[StageRecord]:
    """Put every output of dvc.lock into place, and run only what the settings allow to run.

    Raises UserError when the lock is not right, an output is missing, or the bytes are not the expected ones.
    """
    clean.clean()
    remote.configure(settings, merge_request=review.iid if review else None)
    rebuild = settings.release_rebuild
    may_run = rebuild or settings.release_without_review or expected is None
    if expected is not None:
        files.write_bytes(Path(LOCK), expected.lock)
    if not may_run:
        check_lock(expected)
    try:
        stages: list[StageRecord] = pipeline.reproduce(settings, allow_run=may_run, force=rebuild)
    except pipeline.WouldRun as error:
        raise UserError(f"{error}\n{WAYS_ON}") from None
    provenance.verify_outputs()
    if expected is not None:
        found = differences(expected)
        if found and not settings.release_without_review:
            raise UserError(
                f"What was {'rebuilt' if rebuild else 'restored'} is not what {expected.by} vouches for:\n  "
                + "\n  ".join(found)
                + "\nNothing was released. `python -m ml.release.reproduce` on the merge request's commit tells "
                "which stage differs; RELEASE_WITHOUT_REVIEW=1 releases it all the same."
            )
    return stages


def check_lock(expected: Expected | None) -> None:
    """Raises UserError with what the lock gate finds."""
    findings = lock_gate.judge()
    if not findings:
        return
    listed = "\n  ".join(str(each) for each in findings)
    if expected is not None and expected.unreviewed:
        raise UserError(
            f"{NOBODY}: {expected.unreviewed}, and the {LOCK} of {expected.by} does not fit it:\n  {listed}\n{LET_IT}"
        )
    raise UserError(
        f"The {LOCK} that {expected.by if expected else 'this commit'} vouches for does not fit the default "
        f"branch, so nothing was released:\n  {listed}\n{WAYS_ON}"
    )


def differences(expected: Expected) -> list[str]:
    """What the working folder has otherwise than expected: the model and every output that dvc.lock names."""
    found = []
    model = files.sha256(files.MODEL_ONNX)
    if model != expected.model_sha256:
        found.append(f"{files.MODEL_ONNX}: sha256 {model}, expected {expected.model_sha256}")
    wanted, has = parse_lock(expected.lock, expected.by).outs, read_lock().outs
    for path in sorted(wanted.keys() | has.keys()):
        if wanted.get(path) != has.get(path):
            found.append(f"{path}: MD5 {has.get(path, 'none')}, expected {wanted.get(path, 'none')}")
    return found


def candidate() -> Released:
    data = files.read_json(files.DATA_SUMMARY, "load")
    return Released(
        model_sha256=files.sha256(files.MODEL_ONNX),
        lock=Path(LOCK).read_bytes(),
        data_hash=read_lock().sources.get(str(files.DATA), "unknown"),
        interface=interface_hash(data),
    )


# ---- 2. Outputs to the main remote


def push_outputs(settings: Settings, stages: list[StageRecord], journal: Journal) -> None:
    """Outputs, data, run records and receipts; verified where they arrive."""
    sent = push.push(MAIN, settings, stages)
    journal.say(f"{sent} objects sent" if sent else "all of them were there")


# ---- 3. Commit and tag


def next_version(
    commit: str, tags: list[Tag], review: Review | None, released: Released
) -> tuple[Version, str]:
    last = tags[0] if tags else None
    before: Lock | None = None
    messages: list[str] = []
    if last is not None:
        content = git.show(last.commit, LOCK)
        before = parse_lock(content, f"{LOCK} of {last.name}") if content else None
        messages = tag.run("log", "--format=%B%x01", f"{last.base}..{commit}").split("\x01")
    title = [review.title] if review else []
    known = last.trailers.get("Interface") if last else None
    return choose(
        last=last.version if last else None,
        labels=review.labels if review else (),
        messages=title + [message.strip() for message in messages],
        same_interface=known in (None, released.interface),
        before=before,
        now=parse_lock(released.lock, LOCK),
    )


def tag_message(version: Version, released: Released, review: Review | None) -> str:
    title = f": {review.title}"[:TITLE_LIMIT] if review else ""
    trailers = {
        "Model-Sha256": released.model_sha256,
        "Lock-Sha256": released.lock_sha256,
        "Data-Hash": released.data_hash,
        "Interface": released.interface,
    }
    if review:
        trailers["Merge-Request"] = review.url
    lines = "\n".join(f"{key}: {value}" for key, value in trailers.items())
    return f"Model {version}{title}\n\n{lines}\n"


def lock_message(version: Version) -> str:
    return f"Record the results of {version.tag} in {LOCK} [skip ci]\n\nWritten by the release job."


def commit_and_tag(
    settings: Settings,
    commit: str,
    version: Version,
    own: Tag | None,
    released: Released,
    review: Review | None,
    journal: Journal,
) -> str:
    """Bring dvc.lock to the default branch and the tag to the repository; the commit that the tag names.

    What may not be pushed is left out and said; a tag that may not be pushed GitLab makes with the release. `own` is
    the tag that is there already: it stays as it is.
    """
    before, message = git.show(commit, LOCK), tag_message(version, released, review)
    target = commit
    if before == released.lock:
        journal.say(f"{LOCK} is committed already")
    else:
        target = tag.lock_commit(commit, released.lock, lock_message(version))
        refused = tag.commit_lock(settings, commit, released.lock, lock_message(version))
        if refused:
            journal.warn(
                f"{LOCK} was not committed to {settings.ci_default_branch}: {refused}.{remedy(settings)}"
            )
        else:
            journal.say(f"{LOCK} is on {settings.ci_default_branch}")
    if own is not None:
        return own.commit
    pushed = tag.push(
        settings, tag.tag_object(version.tag, target, commit, message), f"refs/tags/{version.tag}"
    )
    if not pushed.done:
        if pushed.race:
            raise UserError(f"Somebody else has just pushed the tag {version.tag}. {LATER}")
        # The commit beside the branch is not there either, when nothing may be pushed.
        target = target if tag.is_ancestor(target, tag.fetch(settings.ci_default_branch)) else commit
        journal.warn(
            f"the tag could not be pushed: {pushed.reason}.{remedy(settings)} GitLab makes it instead."
        )
        release_by_api(settings, version, target, message)
    tag.fetch(settings.ci_default_branch)
    return git.resolve(version.tag)


def remedy(settings: Settings) -> str:
    if settings.release_token is None:
        return " RELEASE_TOKEN (project access token, scope write_repository) is not set."
    return " RELEASE_TOKEN needs scope write_repository and a role that may push there."


def release_by_api(settings: Settings, version: Version, commit: str, message: str) -> None:
    project = merge_request.connect(settings, write=True)
    if project is None:
        raise UserError(
            f"{version.tag} cannot be made: nothing may be pushed, and CI_API_V4_URL, CI_PROJECT_ID and a token do "
            "not name a GitLab that could make it. Set RELEASE_TOKEN, then run the job again."
        )
    with merge_request.explained(settings, f"Making the tag {version.tag}"):
        gitlab_release.write(project, version.tag, commit, message, "This release is being made.")


# ---- 4. Bundle and registry


def write_bundle(version: Version, commit: str, released: Released) -> Path:
    tag.stand_on(commit)
    if Path(LOCK).read_bytes() != released.lock:
        raise UserError(f"{LOCK} changed while it was being released. {LATER}")
    return bundle.write_bundle(MODELS, version.tag)


def how_it_passed(review: Review | None, first: bool) -> str:
    """What the gate said of the reviewed results: passed, accepted-regression or first."""
    if review is None or review.comparison is None:
        return "first" if first else "accepted-regression"
    try:
        comparison = Comparison.model_validate_json(review.comparison)
    except ValidationError:
        return "first" if first else "accepted-regression"
    if comparison.problem == "first_run":
        return "first"
    return "passed" if gate.without_label(comparison).passes else "accepted-regression"


def register(
    settings: Settings,
    folder: Path,
    review: Review | None,
    comment_url: str | None,
    first: bool,
    journal: Journal,
) -> str | None:
    """The model's address in MLflow's registry; None where there is no MLflow or it does not answer, which is said."""
    if "mlflow_tracking_uri" not in settings.model_fields_set:
        journal.say("MLFLOW_TRACKING_URI is not set: not registered")
        return None
    if importlib.util.find_spec("mlflow") is None:
        journal.warn("MLFLOW_TRACKING_URI is set, but mlflow is not installed here (pip install '.[track]').")
        return None
    from ml.tracking import registry
    from ml.tracking.client import without_password

    try:
        found = registry.register(
            settings,
            folder,
            comment_url=comment_url,
            gate=how_it_passed(review, first),
            merge_request_url=review.url if review else None,
        )
    except Exception as error:  # the server's, its store's or the network's: none may cost the release
        journal.warn(f"the model was not registered in MLflow: {without_password(str(error))} {LATER}")
        return None
    journal.say(f"registered as {found.uri}")
    return str(found.uri)


# ---- 5. GitLab release


def reviewed_comment(
    settings: Settings, review: Review | None, journal: Journal
) -> tuple[str | None, str | None]:
    """The comment's text and its address: from the note, whose pictures are uploaded, else from the job."""
    if review is None:
        return None, None
    try:
        seen = receipt.parse(review.receipt or b"", f"the receipt of !{review.iid}")
        found = merge_request.published_comment(settings, review, seen.commit)
    except UserError as error:
        journal.warn(f"the comment could not be read from the merge request: {str(error).splitlines()[0]}")
        found = None
    if found is not None:
        return found
    text = review.comment.decode("utf-8", "replace") if review.comment else None
    return text, review.url if text else None


def gitlab_release_of(
    settings: Settings,
    version: Version,
    commit: str,
    folder: Path,
    review: Review | None,
    comment: str | None,
    released: Released,
    journal: Journal,
) -> str | None:
    """The release's address; None without a GitLab."""
    model_card = card.card(card.gather())
    files.write_text(card.CARD, model_card)
    project = merge_request.connect(settings, write=True)
    if project is None:
        journal.warn("no GitLab release: CI_API_V4_URL, CI_PROJECT_ID and a token do not name a project.")
        return None
    with merge_request.explained(settings, "Writing the GitLab release"):
        contents = gitlab_release.files_of(folder, card.CARD, Path(LOCK))
        sent = [gitlab_release.upload(project, version, name, content) for name, content in contents.items()]
        assets = [asset for asset, _ in sent]
        sums, _ = gitlab_release.upload(project, version, "SHA256SUMS", gitlab_release.checksums(assets))
        summary = [
            ("commit", f"`{commit}`"),
            ("model, sha256", f"`{released.model_sha256}`"),
            (f"{LOCK}, sha256", f"`{released.lock_sha256}`"),
            ("data", escape(released.data_hash, 100)),
        ]
        text = gitlab_release.describe(
            version.tag, summary, comment, model_card, assets, review.url if review else None
        )
        message = tag_message(version, released, review)
        url, new = gitlab_release.write(project, version.tag, commit, message, text, f"Model {version}")
        for asset in [*assets, sums]:
            gitlab_release.link(project, version.tag, asset.name, asset.url, "package")
        if review:
            gitlab_release.link(project, version.tag, f"merge request !{review.iid}", review.url, "other")
    count = sum(new_file for _, new_file in sent)
    journal.say(f"{'made' if new else 'updated'} {url}; {count} of {len(assets)} files sent")
    return url
