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
from ml.errors import exit_on_user_error
from ml.report.attachments import COMMENT, manifest_path
from ml.report.escape import escape
from ml.settings import Settings, load_settings

LINES, LINE_LIMIT = 25, 300  # of each log: what is shown of it; characters of a line
SECONDS = 20.0  # for one request
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours and cursor movements
SECTION = re.compile(r"section_(?:start|end):\d+:\S*")  # folds of GitLab's own log viewer


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
    headers = {"PRIVATE-TOKEN": token.get_secret_value()}

    def get(path: str, **query: str) -> requests.Response:
        answer = requests.get(f"{project}/{path}", params=query, headers=headers, timeout=SECONDS)
        answer.raise_for_status()
        return answer

    try:
        listed: list[dict[str, Any]] = get(
            f"pipelines/{pipeline}/jobs", scope="failed", per_page="100"
        ).json()
    except (requests.RequestException, ValueError) as error:
        print(f"the failed jobs could not be asked for: {type(error).__name__}", file=sys.stderr)
        return []
    found = []
    for job in sorted(listed, key=lambda job: int(job["id"])):
        try:
            log = last_lines(get(f"jobs/{job['id']}/trace").content.decode("utf-8", "replace"))
        except requests.RequestException as error:
            log = [f"(the log could not be read: {type(error).__name__})"]
        url = str(job.get("web_url", ""))
        found.append(FailedJob(str(job["name"]), str(job.get("failure_reason") or "failed"), url, log))
    return found


def last_lines(log: str) -> list[str]:
    """The end of a job's log without colours, folds, and the runner's own words after the script."""
    lines = [
        CONTROL.sub("", SECTION.sub("", line.rpartition("\r")[2] or line)).strip()
        for line in log.splitlines()
    ]
    said = [
        line for line in lines if line and not line.startswith(("Uploading", "Cleaning up", "Running after"))
    ]
    return said[-LINES:]


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
