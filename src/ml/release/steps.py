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
    remote,
    tag,
)
from ml.release.access import Project, explained
from ml.release.expected import Expected
from ml.release.gitlab_release import sha256
from ml.release.journal import Journal
from ml.release.merge_request import Review
from ml.release.receipt import StageRecord
from ml.release.tag import SUMS, Tag
from ml.release.version import Version, choose, interface_hash
from ml.remotes import MAIN
from ml.report import card, gate
from ml.report.escape import escape
from ml.report.result import Comparison
from ml.settings import Settings

MODELS = Path("models")
TITLE_LIMIT = 100  # characters of a merge request's title in the tag's first line
COMMENT = Path(merge_request.COMMENT).name
BUNDLE = (bundle.MODEL, bundle.GOLDEN, bundle.EXPERIMENT)
NOBODY = "Nobody has reviewed what this commit gives"
LET_IT = (
    "Nothing was released. Bring it in by a merge request; or let a Maintainer set the variable RELEASE_WITHOUT_REVIEW=1 "
    "(protected, environment scope release/publish), retry this job, and take the variable away again."
)
WAYS_ON = (
    "Another merge may have come in between, or outputs have gone from the remotes. Either bring the default branch "
    "into a merge request, let its pipeline run, and merge that; or let a Maintainer set the variable RELEASE_REBUILD=1 "
    "(protected, environment scope release/publish) and retry this job: it trains here and demands the reviewed bytes."
)
LATER = "Run the release job again; it goes on where it stopped."
PUSHER = "See that RELEASE_TOKEN may make it (Settings → Repository → Protected tags)"


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


@dataclass(frozen=True)
class Package:
    """What the tag vouches for, made before the tag is; nothing of it has left this machine yet.

    `commit`: the one that the tag names, the released one or the one after it that adds dvc.lock.
    """

    version: Version
    commit: str
    released: Released
    folder: Path  # of the bundle
    contents: dict[str, bytes]  # of all files, by name

    @property
    def sums(self) -> dict[str, str]:
        return {name: sha256(content) for name, content in self.contents.items()}


@dataclass(frozen=True)
class Release:
    """The release of one commit, step by step.

    `project`: GitLab's, None outside of it. `tags`: all releases, the newest first. `own`: this commit's, where an
    earlier attempt has made it.
    """

    settings: Settings
    journal: Journal
    project: Project | None
    commit: str
    tags: list[Tag]
    own: Tag | None
    review: Review | None

    # ---- Restore or rebuild

    def restore(self, expected: Expected | None) -> list[StageRecord]:
        """Put every output of dvc.lock into place, and run only what the settings allow to run.

        Raises UserError when the lock is not right, an output is missing, or the bytes are not the expected ones.
        """
        settings, review = self.settings, self.review
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

    def push_outputs(self, stages: list[StageRecord]) -> None:
        """Outputs, data, run records and receipts to the main remote; verified where they arrive."""
        sent = push.push(MAIN, self.settings, stages)
        self.journal.say(f"{sent} objects sent" if sent else "all of them were there")

    # ---- Version and files

    def next_version(self, released: Released) -> tuple[Version, str]:
        last = self.tags[0] if self.tags else None
        before: Lock | None = None
        messages: list[str] = []
        if last is not None:
            content = git.show(last.commit, LOCK)
            before = parse_lock(content, f"{LOCK} of {last.name}") if content else None
            messages = tag.messages(last.base, self.commit)
        title = [self.review.title] if self.review else []
        known = last.trailers.get("Interface") if last else None
        return choose(
            last=last.version if last else None,
            labels=self.review.labels if self.review else (),
            messages=title + messages,
            same_interface=known in (None, released.interface),
            before=before,
            now=parse_lock(released.lock, LOCK),
        )

    def pack(self, version: Version, released: Released) -> Package:
        """Write the bundle and the model card, and collect them with dvc.lock and the reviewed comment."""
        if self.own is not None:
            target = self.own.commit
        elif git.show(self.commit, LOCK) == released.lock:
            target = self.commit
        else:
            target = tag.lock_commit(self.commit, released.lock, lock_message(version))
        folder = write_bundle(version, target, released)
        files.write_text(card.CARD, card.card(card.gather()))
        contents = gitlab_release.files_of(folder, card.CARD, Path(LOCK))
        if self.review:
            seen = {merge_request.COMMENT: self.review.comment, merge_request.PAGE: self.review.page}
            contents |= {Path(path).name: content for path, content in seen.items() if content is not None}
        if self.own is not None:
            contents = self.as_tagged(self.own, contents, folder)
        elif self.review and self.review.comment is None:
            self.journal.warn(
                f"the reviewed pipeline of {self.review.url} has no {merge_request.COMMENT} (any more), so the release is "
                "without what the reviewers saw."
            )
        return Package(version, target, released, folder, dict(sorted(contents.items())))

    def as_tagged(self, own: Tag, contents: dict[str, bytes], folder: Path) -> dict[str, bytes]:
        """The files that the tag names: as they were made now, or where that gives other bytes, as they were uploaded.

        Raises UserError when a file of the bundle is to be had neither way.
        """
        right = {}
        for name, digest in own.sums.items():
            content = contents.get(name)
            if content is None or sha256(content) != digest:
                content = self.uploaded(own, name)
                if content is not None and name in BUNDLE:
                    files.write_bytes(folder / name, content)
            if content is not None:
                right[name] = content
            elif name in BUNDLE:
                raise UserError(
                    f"{name} comes out otherwise than {own.name} says (sha256 {sha256(contents[name])}, and {SUMS} in the "
                    f"tag says {digest}), and its package does not have it. This job's image may be another one than the "
                    f"tag was made in: run the job with that one; or delete the tag {own.name} (Code → Tags), if nobody "
                    "uses it yet, and run the job again."
                )
            else:
                self.journal.warn(
                    f"{name}, which {own.name} names (sha256 {digest}), is to be had no more: left out."
                )
        return right

    def uploaded(self, own: Tag, name: str) -> bytes | None:
        if self.project is None:
            return None
        with explained(self.project, f"Fetching {name} of {own.name}"):
            return gitlab_release.download(self.project, own, name)

    # ---- Tag and commit

    def tag_and_commit(self, package: Package) -> None:
        """Push the tag, then dvc.lock to the default branch.

        In this order, for the tag takes the version: whoever comes second is refused, before the branch speaks of a
        release that there is not. Raises UserError when the tag is refused; a refused commit is said.
        """
        settings, name, released = self.settings, package.version.tag, package.released
        if self.own is None:
            made = tag.tag_object(name, package.commit, self.commit, tag_message(package, self.review))
            pushed = tag.push(settings, made, f"refs/tags/{name}")
            if pushed.race:
                raise UserError(f"Somebody else has just pushed the tag {name}. {LATER}")
            if not pushed.done:
                raise UserError(
                    f"The tag {name} could not be pushed: {pushed.reason}. {PUSHER}, and that no rule of the project "
                    f"forbids it. {LATER}"
                )
        earlier = [
            each.trailers.get("Lock-Sha256", "") for each in self.tags if each.version < package.version
        ]
        text = lock_message(package.version)
        if git.show(self.commit, LOCK) == released.lock:
            self.journal.say(f"{LOCK} is committed already")
        elif refused := tag.commit_lock(settings, self.commit, released.lock, text, earlier):
            self.journal.warn(
                f"{LOCK} was not committed to {settings.ci_default_branch}: {refused}. The tag has it."
            )
        else:
            self.journal.say(f"{LOCK} is on {settings.ci_default_branch}")
        tag.fetch(settings.ci_default_branch)

    # ---- Registry

    def register(self, folder: Path, first: bool) -> str | None:
        """The model's address in MLflow's registry; None where there is no MLflow or it does not answer, which is said."""
        settings, review, journal = self.settings, self.review, self.journal
        if "mlflow_tracking_uri" not in settings.model_fields_set:
            journal.say("MLFLOW_TRACKING_URI is not set: not registered")
            return None
        if importlib.util.find_spec("mlflow") is None:
            journal.warn(
                "MLFLOW_TRACKING_URI is set, but mlflow is not installed here (pip install '.[track]')."
            )
            return None
        from ml.tracking import registry
        from ml.tracking.client import without_password

        try:
            found = registry.register(
                settings,
                folder,
                comment_url=self.comment_url(),
                gate=how_it_passed(review, first),
                merge_request_url=review.url if review else None,
            )
        except Exception as error:  # the server's, its store's or the network's: none may cost the release
            journal.warn(f"the model was not registered in MLflow: {without_password(str(error))} {LATER}")
            return None
        journal.say(f"registered as {found.uri}")
        return str(found.uri)

    def comment_url(self) -> str | None:
        """Of the note that shows the reviewed commit's report, else of the merge request."""
        if self.review is None or self.project is None:
            return None
        note = (
            merge_request.find_note(self.project, self.review, self.review.sha) if self.review.sha else None
        )
        return note or self.review.url

    # ---- GitLab release

    def describe_at_gitlab(self, package: Package) -> str | None:
        """Upload the files, write the release, link them; its address, None without a GitLab."""
        if self.project is None:
            self.journal.warn("no GitLab release: CI_API_V4_URL and CI_PROJECT_ID do not name a project.")
            return None
        with explained(self.project, "Writing the GitLab release"):
            return self.write_release(self.project, package)

    def write_release(self, project: Project, package: Package) -> str:
        version, review, released = package.version, self.review, package.released
        sums = gitlab_release.checksums(self.own.sums if self.own else package.sums).encode()
        assets, count = [], 0
        for name, content in (package.contents | {SUMS: sums}).items():
            asset, before = gitlab_release.upload(project, version, name, content)
            assets.append(asset)
            count += before != content
            if before not in (None, content):
                self.journal.warn(
                    f"{name} in the package {gitlab_release.PACKAGE}/{version} was another file (sha256 "
                    f"{sha256(before)}): somebody with the role Developer or higher has put it there. The released one "
                    "is in its place; look who."
                )
        summary = [
            ("commit", f"`{package.commit}`"),
            ("model, sha256", f"`{released.model_sha256}`"),
            (f"{LOCK}, sha256", f"`{released.lock_sha256}`"),
            ("data", escape(released.data_hash, 100)),
        ]
        comment = package.contents.get(COMMENT)
        text = gitlab_release.describe(
            version.tag,
            summary,
            comment.decode("utf-8", "replace") if comment else None,
            package.contents[card.CARD.name].decode() if card.CARD.name in package.contents else "",
            assets,
            review.url if review else None,
        )
        url, new = gitlab_release.write(project, version.tag, f"Model {version}", text)
        wanted = {asset.name: (asset.url, "package") for asset in assets}
        if review:
            wanted[f"merge request !{review.iid}"] = (review.url, "other")
        for name, (address, kind) in wanted.items():
            elsewhere = gitlab_release.link(project, version.tag, name, address, kind)
            if elsewhere:
                self.journal.warn(
                    f"the link {name} of {version.tag} led to {elsewhere:.200}; it leads to {address} again."
                )
        for link in gitlab_release.links(project, version.tag):
            if link["name"] not in (*wanted, gitlab_release.IMAGE_LINK):
                self.journal.warn(
                    f"the release {version.tag} has a link that this job did not make: {str(link['name'])!r:.100} to "
                    f"{str(link['url']):.200}. Its file is not among those in {SUMS} of the tag."
                )
        self.journal.say(f"{'made' if new else 'updated'} {url}; {count} of {len(assets)} files sent")
        return url


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


def tag_message(package: Package, review: Review | None) -> str:
    """Title, sums of the release's files, trailers."""
    title = f": {review.title}"[:TITLE_LIMIT] if review else ""
    released = package.released
    trailers = {
        "Model-Sha256": released.model_sha256,
        "Lock-Sha256": released.lock_sha256,
        "Data-Hash": released.data_hash,
        "Interface": released.interface,
    }
    if review:
        trailers["Merge-Request"] = review.url
    lines = "\n".join(f"{key}: {value}" for key, value in trailers.items())
    sums = gitlab_release.checksums(package.sums)
    return f"Model {package.version}{title}\n\n{SUMS}\n{sums}\n{lines}\n"


def lock_message(version: Version) -> str:
    return f"Record the results of {version.tag} in {LOCK}\n\nWritten by the release job."


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
