"""Release the default branch's model: exactly the bytes that were reviewed, once, however often this is run.

    python -m ml.release.publish

lock gate → restore → the receipt's bytes → push to the main remote → commit dvc.lock, tag → bundle, registry →
GitLab release. docs/release.md has the variables, and what happens when something is missing.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from ml import bundle, files, git
from ml.errors import UserError, exit_on_user_error
from ml.release import gitlab_release, merge_request, steps, tag
from ml.release.expected import expect, own_tag, why_unexpected
from ml.release.journal import Journal
from ml.release.merge_request import Review
from ml.release.steps import Released
from ml.release.tag import Tag
from ml.settings import Settings, load_settings

HANDED_ON = Path("release.env")  # dotenv for the image and deploy jobs


@dataclass(frozen=True)
class Outcome:
    """`state`: new, or unchanged when the commit's model is the last release's."""

    tag: Tag
    state: str
    folder: Path  # of the bundle
    url: str | None  # of the GitLab release
    previous: str | None  # tag of the release before


def publish(settings: Settings, journal: Journal) -> Outcome:
    """Raises UserError where the release has to stop; what was done until then stays, and running again goes on."""
    with journal.step("look at the commit and its review"):
        commit = starting_commit(settings)
        tip = tag.fetch(settings.ci_default_branch)
        if not tag.is_ancestor(commit, tip):
            raise UserError(
                f"{commit[:8]} is not in {settings.ci_default_branch}. Only the default branch is released: merge it."
            )
        tags = tag.release_tags(commit)
        own = own_tag(tags, commit)
        review = merge_request.find_review(settings, commit)
        expected = expect(settings, commit, tags, review)
        if review:
            journal.say(f"merged by {review.url}")
        if expected is None:
            why = why_unexpected(review, settings)
            if tags and not settings.release_without_review:
                raise UserError(f"{steps.NOBODY}: {why}. {steps.LET_IT}")
            journal.say(
                f"not reviewed ({why}); {'released all the same' if tags else 'this is the first release'}"
            )
        else:
            journal.say(f"{expected.by} says which bytes may be released")

    with journal.step("restore and verify every output"):
        stages = steps.restore(settings, expected, review)
        ran = [stage.name for stage in stages if stage.how == "ran"]
        released = steps.candidate()
        journal.facts |= {"commit": commit, "stages_run": len(ran), "model_sha256": released.model_sha256}
        journal.say(
            f"{len(ran)} stages ran{': ' + ', '.join(ran) if ran else ''}; model {released.model_sha256}"
        )

    with journal.step("push outputs and run records to the main remote"):
        steps.push_outputs(settings, stages, journal)

    if own is None and tags and tags[0].holds(released.model_sha256, released.lock_sha256):
        return unchanged(settings, tags, released, journal)
    return new(settings, commit, tags, own, review, released, journal)


def new(
    settings: Settings,
    commit: str,
    tags: list[Tag],
    own: Tag | None,
    review: Review | None,
    released: Released,
    journal: Journal,
) -> Outcome:
    earlier = [each for each in tags if own is None or each.version < own.version]
    with journal.step("commit dvc.lock and tag"):
        if own is None:
            version, why = steps.next_version(commit, tags, review, released)
            journal.say(f"{version.tag}: {why}")
        else:
            version = own.version
            check_own(own, released)
            journal.say(f"{own.name} is there already: finishing what is missing")
        target = steps.commit_and_tag(settings, commit, version, own, released, review, journal)

    with journal.step("write the bundle"):
        folder = steps.write_bundle(version, target, released)
        journal.say(str(folder))

    comment, comment_url = steps.reviewed_comment(settings, review, journal)
    with journal.step("register the model"):
        steps.register(settings, folder, review, comment_url, not earlier, journal)

    with journal.step("GitLab release"):
        url = steps.gitlab_release_of(settings, version, target, folder, review, comment, released, journal)
    found = next(each for each in tag.release_tags(commit) if each.version == version)
    return Outcome(found, "new", folder, url, earlier[0].name if earlier else None)


def unchanged(settings: Settings, tags: list[Tag], released: Released, journal: Journal) -> Outcome:
    """The commit changed nothing that the model is made of: its release is the last one, as it is."""
    last = tags[0]
    with journal.step(f"nothing to release: the model is that of {last.name}"):
        folder = released_bundle(settings, last) or steps.write_bundle(last.version, last.commit, released)
        journal.say(str(folder))
        project = merge_request.connect(settings, write=False)
        url = None
        if project is not None:
            with merge_request.explained(settings, "Looking for the GitLab release"):
                found = gitlab_release.read(project, last.name)
            url = found["_links"]["self"] if found else None
            if found is None:
                journal.warn(
                    f"{last.name} has no GitLab release: run the release job of {last.base[:8]} again."
                )
    return Outcome(last, "unchanged", folder, url, tags[1].name if len(tags) > 1 else None)


def released_bundle(settings: Settings, last: Tag) -> Path | None:
    """The bundle as it was released, from the release's files; None where they are not to be had."""
    project = merge_request.connect(settings, write=False)
    if project is None:
        return None
    names = (bundle.MODEL, bundle.GOLDEN, bundle.EXPERIMENT)
    with merge_request.explained(settings, "Fetching the released bundle"):
        contents = {name: gitlab_release.download(project, last.version, name) for name in names}
    found = {name: content for name, content in contents.items() if content is not None}
    if len(found) < len(names):
        return None
    folder = steps.MODELS / last.name
    for name, content in found.items():
        files.write_bytes(folder / name, content)
    described = bundle.parse_experiment(found[bundle.EXPERIMENT], f"{bundle.EXPERIMENT} of {last.name}")
    for path, expected in (
        (folder / bundle.MODEL, described.model),
        (folder / bundle.GOLDEN, described.golden),
    ):
        if files.sha256(path) != expected.sha256:
            raise UserError(
                f"{path.name} of {last.name}'s package is not the one that was released. Look who changed it."
            )
    if described.model.sha256 != last.trailers["Model-Sha256"]:
        raise UserError(
            f"The package of {last.name} holds another model than its tag says. Look who changed it."
        )
    return folder


def check_own(own: Tag, released: Released) -> None:
    if not own.holds(released.model_sha256, released.lock_sha256):
        raise UserError(
            f"{own.name} was released from this commit with other bytes (model {own.trailers.get('Model-Sha256')}, "
            f"found {released.model_sha256}). A tag is never moved: merge a change to release it."
        )


def starting_commit(settings: Settings) -> str:
    """HEAD, or CI_COMMIT_SHA where an earlier attempt of this job went on to the commit of dvc.lock.

    Raises UserError when the working folder is not that commit.
    """
    commit = git.head()
    if settings.ci_commit_sha and settings.ci_commit_sha != commit:
        tag.stand_on(git.resolve(settings.ci_commit_sha))
        commit = settings.ci_commit_sha
    if git.is_dirty():
        raise UserError(
            f"Files differ from {commit[:8]}, so the release would not be of that commit. `git status` lists them; "
            "commit or restore them."
        )
    return commit


def hand_on(outcome: Outcome, settings: Settings, path: Path = HANDED_ON) -> None:
    """What the next jobs read as variables."""
    described = bundle.parse_experiment(
        (outcome.folder / bundle.EXPERIMENT).read_bytes(), str(outcome.folder / bundle.EXPERIMENT)
    )
    suffix = "" if outcome.state == "new" else f"-{(settings.ci_commit_sha or git.head())[:8]}"
    values = {
        "MODEL_TAG": outcome.tag.name,
        "MODEL_SHA256": described.model.sha256,
        "LOCK_SHA256": described.lock_sha256,
        "DATA_HASH": described.data_hash,
        "MODEL_COMMIT": described.git_commit,  # an image of it may have later code: CI_COMMIT_SHA
        "SOURCE_DATE_EPOCH": str(int(described.created.timestamp())),
        "BUNDLE": str(outcome.folder),
        "IMAGE_TAG": f"{outcome.tag.name}{suffix}",
        "RELEASE_STATE": outcome.state,
        "RELEASE_URL": outcome.url or "",
        "PREVIOUS_MODEL_TAG": outcome.previous or "",
    }
    files.write_text(path, "".join(f"{name}={value}\n" for name, value in values.items()))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ml.release.publish", description=(__doc__ or "").splitlines()[0]
    )
    parser.parse_args(arguments)
    settings, journal = load_settings(), Journal()
    HANDED_ON.unlink(missing_ok=True)  # an earlier release's must not reach the next jobs
    outcome = publish(settings, journal)
    hand_on(outcome, settings)
    print(f"{outcome.tag.name} ({outcome.state}){': ' + outcome.url if outcome.url else ''}")
    for warning in journal.warnings:
        print(f"not done: {warning}")


if __name__ == "__main__":
    exit_on_user_error(main)
