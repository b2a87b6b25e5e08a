"""Release the default branch's model: exactly the bytes that were reviewed, once, however often this is run.

    python -m ml.release.publish

rights → lock gate → restore → the receipt's bytes → push to the main remote → bundle → tag, commit of dvc.lock →
registry → GitLab release. docs/release.md has the variables, and what happens when something is missing.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from ml import bundle, files, git
from ml.errors import UserError, exit_on_user_error
from ml.release import gitlab_release, merge_request, rights, steps, tag
from ml.release.access import Project, explained
from ml.release.expected import expect, own_tag, why_unexpected
from ml.release.journal import Journal
from ml.release.steps import Release, Released
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
    with journal.step("check the rights of RELEASE_TOKEN"):
        project, doors = rights.check(settings)
        for door in doors:
            journal.warn(door)
        journal.say(
            "it may do all that a release does" if project else "no GitLab is named: git pushes to origin"
        )

    with journal.step("look at the commit and its review"):
        tip = tag.fetch(settings.ci_default_branch)
        commit = starting_commit(settings, tip)
        tags = tag.release_tags(commit)
        own = own_tag(tags, commit)
        review = merge_request.find_review(project, settings, commit) if project else None
        expected = expect(commit, tags, review)
        if review:
            journal.say(f"merged by {review.url}, reviewed in pipeline {review.pipeline or 'none'}")
        if expected is None:
            why = why_unexpected(review)
            if tags and not settings.release_without_review:
                raise UserError(f"{steps.NOBODY}: {why}. {steps.LET_IT}")
            journal.say(
                f"not reviewed ({why}); {'released all the same' if tags else 'this is the first release'}"
            )
        else:
            journal.say(f"{expected.by} says which bytes may be released")
        release = Release(settings, journal, project, commit, tags, own, review)

    with journal.step("restore and verify every output"):
        stages = release.restore(expected)
        ran = [stage.name for stage in stages if stage.how == "ran"]
        released = steps.candidate()
        journal.facts |= {"commit": commit, "stages_run": len(ran), "model_sha256": released.model_sha256}
        journal.say(
            f"{len(ran)} stages ran{': ' + ', '.join(ran) if ran else ''}; model {released.model_sha256}"
        )

    with journal.step("push outputs and run records to the main remote"):
        release.push_outputs(stages)

    if own is None and tags and tags[0].holds(released.model_sha256, released.lock_sha256):
        return unchanged(release, released)
    return new(release, released)


def new(release: Release, released: Released) -> Outcome:
    journal, own = release.journal, release.own
    earlier = [each for each in release.tags if own is None or each.version < own.version]
    with journal.step("choose the version and write the bundle"):
        if own is None:
            version, why = release.next_version(released)
            journal.say(f"{version.tag}: {why}")
        else:
            version = own.version
            check_own(own, released)
            journal.say(f"{own.name} is there already: finishing what is missing")
        package = release.pack(version, released)
        journal.say(f"{package.folder}: {', '.join(package.contents)}")

    with journal.step("push the tag and commit dvc.lock"):
        release.tag_and_commit(package)

    with journal.step("register the model"):
        release.register(package.folder, not earlier)

    with journal.step("GitLab release"):
        url = release.describe_at_gitlab(package)
    made = next(each for each in tag.release_tags(release.commit) if each.version == version)
    return Outcome(made, "new", package.folder, url, earlier[0].name if earlier else None)


def unchanged(release: Release, released: Released) -> Outcome:
    """The commit changed nothing that the model is made of: its release is the last one, as it is."""
    journal, project, last = release.journal, release.project, release.tags[0]
    with journal.step(f"nothing to release: the model is that of {last.name}"):
        folder = (project and released_bundle(project, last)) or steps.write_bundle(
            last.version, last.commit, released
        )
        journal.say(str(folder))
        url = None
        if project is not None:
            with explained(project, "Looking for the GitLab release"):
                found = gitlab_release.read(project, last.name)
            url = found["_links"]["self"] if found else None
            if found is None:
                journal.warn(
                    f"{last.name} has no GitLab release: run the release job of {last.base[:8]} again."
                )
    return Outcome(last, "unchanged", folder, url, release.tags[1].name if len(release.tags) > 1 else None)


def released_bundle(project: Project, last: Tag) -> Path | None:
    """The bundle as it was released, from the release's files; None where they are not to be had.

    Raises UserError for a file that is not the one that the tag names.
    """
    with explained(project, "Fetching the released bundle"):
        contents = {name: gitlab_release.download(project, last, name) for name in steps.BUNDLE}
    folder = steps.MODELS / last.name
    for name, content in contents.items():
        if content is None:
            return None
        files.write_bytes(folder / name, content)
    return folder


def check_own(own: Tag, released: Released) -> None:
    if not own.holds(released.model_sha256, released.lock_sha256):
        raise UserError(
            f"{own.name} was released from this commit with other bytes (model {own.trailers.get('Model-Sha256')}, "
            f"found {released.model_sha256}). A tag is never moved: merge a change to release it."
        )


def starting_commit(settings: Settings, tip: str) -> str:
    """The commit to release, HEAD afterwards: CI_COMMIT_SHA, else HEAD; before the commit of dvc.lock, where an earlier
    attempt went on to that.

    Raises UserError when it is not in the default branch, whose newest commit is `tip`, or the working folder is not it.
    """
    head = git.head()
    commit = tag.base_of(git.resolve(settings.ci_commit_sha or head), tip)
    if not tag.is_ancestor(commit, tip):
        raise UserError(
            f"{commit[:8]} is not in {settings.ci_default_branch}. Only the default branch is released: merge it."
        )
    if commit != head:
        tag.stand_on(commit)
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
        print(f"warning: {warning}")


if __name__ == "__main__":
    exit_on_user_error(main)
