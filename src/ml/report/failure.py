"""The comment when there is no result: which job failed, and the end of its log → reports/comment.md.

    python -m ml.report.failure --out reports/comment.md

Without it the note would go on showing the verdict of an earlier commit. The log comes from GitLab's API, which has
masked the secrets in it; where it cannot be had, the comment links to the pipeline.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from ml import files, git
from ml.errors import UserError, exit_on_user_error
from ml.report.attachments import COMMENT, manifest_path
from ml.report.escape import escape
from ml.report.gitlab_notes import session
from ml.settings import Settings, load_settings

LINES, LINE_LIMIT = 25, 300  # of each log: what is shown of it; characters of a line
SECONDS = 60.0  # for all requests together
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours and cursor movements
SECTION = re.compile(r"section_(?:start|end):\d+:\S*")  # folds of GitLab's own log viewer
# What runners from 18.7 on put before each line: time, number and kind of the stream, and whether it goes on with the
# stream's line before (`+`), which is cut at a carriage return and after 8 KiB. doc/ci/jobs/job_logs.md, and Logger of
# gitlab-runner's common/buildlogger/internal/timestamper.
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z (?P<stream>[0-9a-f]{2}[OE])(?P<flag>[ +])")


@dataclass(frozen=True)
class FailedJob:
    name: str
    reason: str  # GitLab's word for it: script_failure, job_execution_timeout, …
    url: str
    log: list[str]  # its last lines that say something


def failed_jobs(settings: Settings) -> list[FailedJob]:
    """Of this pipeline, so far. Empty where there is no token, or GitLab does not say."""
    token, pipeline = settings.comment_token, settings.ci_pipeline_id
    if token is None or settings.api_url is None or settings.ci_project_id is None or pipeline is None:
        return []
    project = f"{settings.api_url}/projects/{settings.ci_project_id}"
    client = session(settings, SECONDS)
    client.headers["PRIVATE-TOKEN"] = token.get_secret_value()

    def get(path: str, **query: str) -> requests.Response:
        answer = client.get(f"{project}/{path}", params=query)
        answer.raise_for_status()
        return answer

    try:
        listed: list[dict[str, Any]] = get(
            f"pipelines/{pipeline}/jobs", scope="failed", per_page="100"
        ).json()
    except (requests.RequestException, UserError, ValueError) as error:
        print(f"the failed jobs could not be asked for: {reason(error)}", file=sys.stderr)
        return []
    found = []
    for job in sorted(listed, key=lambda job: int(job["id"])):
        try:
            log = last_lines(get(f"jobs/{job['id']}/trace").content.decode("utf-8", "replace"))
        except (requests.RequestException, UserError) as error:
            log = [f"(the log could not be read: {reason(error)})"]
        url = str(job.get("web_url", ""))
        found.append(FailedJob(str(job["name"]), str(job.get("failure_reason") or "failed"), url, log))
    return found


def reason(error: Exception) -> str:
    """What a person can do something about; the text of others may hold an address with a token in it."""
    return str(error) if isinstance(error, UserError) else type(error).__name__


def last_lines(log: str) -> list[str]:
    """The end of a job's log without times, colours, folds, and the runner's own words after the script."""
    lines = [shown(line) for line in whole_lines(log)]
    said = [
        line for line in lines if line and not line.startswith(("Uploading", "Cleaning up", "Running after"))
    ]
    return said[-LINES:]


def whole_lines(log: str) -> list[str]:
    """The lines without the runner's stamps, those that it cut put together again, each with its own stream's."""
    lines: list[str] = []
    latest: dict[str, int] = {}  # of each stream, in `lines`
    for line in log.split("\n"):
        stamp = STAMP.match(line)
        stream, text = (stamp["stream"], line[stamp.end() :]) if stamp else ("", line)
        if stamp and stamp["flag"] == "+" and stream in latest:
            lines[latest[stream]] += text
        else:
            latest[stream] = len(lines)
            lines.append(text)
    return lines


def shown(line: str) -> str:
    """What a terminal shows of it in the end: what follows the last carriage return that something follows."""
    parts = [SECTION.sub("", CONTROL.sub("", part)).strip() for part in line.split("\r")]
    return next((part for part in reversed(parts) if part), "")


def compose(jobs: list[FailedJob], commit: str, pipeline_url: str | None) -> str:
    """The comment as Markdown."""
    names = ", ".join(escape(job.name, 60) for job in jobs)
    where = f"[pipeline]({pipeline_url})" if pipeline_url else "pipeline"
    blocks = [
        f"## ❌ No result: {names or 'the pipeline'} failed",
        f"Commit {commit[:8]} has no verdict. The log of the {where} says why; after the remedy, push again or "
        "press *retry* there.",
        *(block for job in jobs for block in described(job)),
    ]
    return "\n\n".join(blocks) + "\n"


def described(job: FailedJob) -> Iterator[str]:
    link = f"[log]({job.url})" if job.url.startswith(("https://", "http://")) else "log"
    yield f"**{escape(job.name, 60)}** ({escape(job.reason, 60)}), the end of its {link}:"
    yield "\n".join(f"- {escape(line, LINE_LIMIT)}" for line in job.log) or "- (empty)"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ml.report.failure", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=COMMENT, metavar="FILE", help=f"Markdown ({COMMENT})")
    arguments = parser.parse_args()
    settings = load_settings()
    jobs = failed_jobs(settings)
    files.write_text(
        arguments.out, compose(jobs, settings.ci_commit_sha or git.head(), settings.ci_pipeline_url)
    )
    files.write_json(manifest_path(arguments.out), [])  # no pictures


if __name__ == "__main__":
    exit_on_user_error(main)
