"""Publish reports/comment.md as the one report note of its merge request, edited in place at every push.

The note ends in a hidden line of JSON that marks it as ours and lists the results it has shown. Publishing is a
merge of such lists, the newest result on top: in whatever order publishers come, and however many come at once,
they arrive at the same note. GitLab has no compare-and-swap for notes, so each one reads its writing back, and
again a moment later, and merges once more when another has overwritten it. A `resource_group` for the report job
keeps them from meeting in the first place.
"""

import argparse
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from gitlab.v4.objects import ProjectMergeRequestNote

from ml.errors import UserError, exit_on_user_error
from ml.report.attachments import COMMENT, manifest_path, read_manifest, read_picture, upload_pictures
from ml.report.cml import Cml, find_cml
from ml.report.gitlab_notes import Notes, PatientAdapter, explained_errors, find_target, session
from ml.report.note import (
    NOTE_LIMIT,
    REPORT_LIMIT,
    RUNS_KEPT,
    Content,
    Run,
    is_marked,
    merge,
    parse,
    quick_actions,
    render,
    shows_watermark,
    verdict_of,
)
from ml.settings import Settings, load_settings

PUBLISH_SECONDS = 180.0  # for everything, all retries and all waiting that GitLab asks for
SETTLE_SECONDS = 1.0  # after which a publisher looks again whether its result is still in the note
ROUNDS = 20  # of merging with other publishers


def publish(
    report: str,
    pictures: Mapping[str, bytes],
    settings: Settings,
    *,
    seconds: float = PUBLISH_SECONDS,
    settle_seconds: float = SETTLE_SECONDS,
) -> str:
    """Make `report` the merge request's one report note; `pictures` are the files that its links may name.

    Returns one sentence on what was done, by which publisher, and where. Raises UserError when GitLab refuses.
    """
    target = find_target(settings)
    if isinstance(target, str):
        return f"Wrote only the file, as {target}."
    with explained_errors(target), session(settings, seconds) as opened:
        notes = Notes(target, opened)
        report = upload_pictures(report.strip("\n"), pictures, notes.upload)
        run = Run(
            pipeline=settings.ci_pipeline_id or 0,
            job=settings.ci_job_id or 0,
            time=datetime.now(UTC).replace(microsecond=0),
            commit=settings.ci_commit_sha or "",
            verdict=verdict_of(report),
        )
        cml = find_cml(settings, target, notes.project_url)
        return converge(Content(report, (run,)), notes, cml, opened.adapter, settle_seconds)


def converge(
    mine: Content, notes: Notes, cml: Cml | None, adapter: PatientAdapter, settle_seconds: float
) -> str:
    """Write and read back until one note of ours is left, it holds `mine`, and it still does a moment later."""
    did: list[str] = []
    confirmed = False
    for _ in range(ROUNDS):
        everything = notes.all()
        own = sorted(filter(notes.is_own, everything), key=lambda note: note.id)
        if not is_settled(own, mine):
            did += write(mine, own, everything, notes, cml, adapter, first=not did)
            confirmed = False
        elif confirmed:
            return f"{'; '.join(dict.fromkeys(did))}: {notes.url}#note_{own[0].id}"
        else:
            confirmed = True
            time.sleep(max(0.0, min(settle_seconds, adapter.seconds_left())))
    raise UserError(
        f"Other publishers kept changing the report note of {notes.url} for {ROUNDS} rounds. "
        "Give the report job a resource_group, so that one runs at a time."
    )


def is_settled(own: list[ProjectMergeRequestNote], mine: Content) -> bool:
    """Whether there is one note, with `mine` in it or already dropped from it as too old, and no CML watermark."""
    if len(own) != 1 or shows_watermark(own[0].body):
        return False
    content = parse(own[0].body)
    if content is None:
        return False
    run = mine.runs[0]
    return run in content.runs or (len(content.runs) == RUNS_KEPT and run.order < content.runs[-1].order)


def write(
    mine: Content,
    own: list[ProjectMergeRequestNote],
    everything: list[ProjectMergeRequestNote],
    notes: Notes,
    cml: Cml | None,
    adapter: PatientAdapter,
    first: bool,
) -> list[str]:
    """Bring `mine` and all that our notes hold into the oldest of them, or a new one; remove the others.

    `own` are our notes and `everything` all notes, oldest first. CML may do it the first time only: what is left
    to mend after that it cannot. Returns what was done, as parts of a sentence.
    """
    found = [content for note in own if (content := parse(note.body))]

    def composed(*more: Content) -> str:
        watermark = cml.watermark if cml else ""
        return render(merge([mine, *found, *more]), notes.project_url, watermark)

    did = []
    verb = "edited" if own else "created"
    if first and cml is not None and cml.reaches(own, everything):
        failure = cml.update(composed(), adapter.seconds_left())
        if failure is None:
            # The next round removes its watermark, and duplicates if there are any.
            return [f"CML {verb} the report note"]
        did.append(f"CML failed ({failure})")
    if own:
        notes.edit(own[0].id, lambda body: composed(*filter(None, [parse(body)])))
    else:
        notes.create(composed())
    did.append(f"python-gitlab {verb} the report note" if first else "python-gitlab tidied it")
    for extra in own[1:]:
        notes.delete(extra.id)
        did.append("python-gitlab removed a duplicate")
    return did


def read_report(path: Path) -> str:
    """The Markdown file's text, without blank lines around it.

    Raises UserError when it is missing, empty, not UTF-8 or too long for a note.
    """
    try:
        report = path.read_text(encoding="utf-8").strip("\n")
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Run `python -m ml.report.comment` first.") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a UTF-8 Markdown file: {error}") from None
    if not report.strip():
        raise UserError(f"{path} is empty. Run `python -m ml.report.comment` again.")
    if len(report) > REPORT_LIMIT:
        raise UserError(
            f"{path} has {len(report):,} characters, more than the {REPORT_LIMIT:,} that fit into a note "
            f"(GitLab's limit is {NOTE_LIMIT:,}, the rest is for the history). Shorten the report."
        )
    if is_marked(report):
        raise UserError(
            f"{path} already has the hidden line of a published note. Publish what comment wrote."
        )
    for line in quick_actions(report):
        raise UserError(
            f"{path} has the line {line!r:.80}, which GitLab could carry out as a quick action. "
            "Nothing was published. Pass the value that it comes from through ml.report.escape."
        )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ml.report.publish",
        description="Publish a Markdown file as the merge request's report note.",
    )
    parser.add_argument(
        "report", type=Path, nargs="?", default=COMMENT, help=f"the Markdown file ({COMMENT})"
    )
    parser.add_argument(
        "--pictures",
        type=Path,
        help="JSON list of the pictures that the report made, relative to its folder (REPORT.pictures.json)",
    )
    arguments, settings = parser.parse_args(), load_settings()
    report = read_report(arguments.report)
    manifest = arguments.pictures or manifest_path(arguments.report)
    names = read_manifest(manifest) if arguments.pictures or manifest.exists() else []
    pictures = {name: read_picture(arguments.report.parent, name) for name in names}
    print(publish(report, pictures, settings))


if __name__ == "__main__":
    exit_on_user_error(main)
