"""`make rehearse`: the real .gitlab-ci.yml on this machine, run by gitlab-ci-local against an emulated GitLab.

    first model → comment → merge → release → a change → comment → merge → release with nothing to train
    → a change that makes it worse → comment → stopped by the gate → let through by the label accept-regression

Real git over HTTP, a real DVC remote in a folder, the package's own commands; the data are scikit-learn's digits. Your
checkout stays untouched: everything lies in rehearse/workspace.
"""

import argparse
import base64
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import requests

from ml import files
from ml.params import plain, read_yaml
from rehearse import runner
from rehearse.project import ROOT, Answer, Project
from tests.gitlab_emulator import GitLabEmulator

WORKSPACE = ROOT / "rehearse" / "workspace"
LABEL = "accept-regression"
EPOCHS = {"first": 4, "longer": 10, "shorter": 1}  # by branch
# A rehearsal is one of the tests, so its own `test` job runs a few of them.
FEW_TESTS = "tests/test_metrics.py"


def say(step: str) -> None:
    print(f"\n\033[1m── {step}\033[0m" if sys.stdout.isatty() else f"\n── {step}", flush=True)


def expect(run: runner.Run, failed: str | None = None) -> None:
    """End the rehearsal unless the pipeline passed, or failed in the job `failed` alone."""
    broken = [name for name, end in run.jobs.items() if end == "FAIL"]
    if broken != ([failed] if failed else []):
        print(run.output)
        sys.exit(f"error: the rehearsal stopped: failed jobs: {', '.join(broken) or 'none'}.")


def report(answer: Answer) -> None:
    head = next((line for line in answer.comment.splitlines() if line.strip()), "no comment")
    print(f"comment after {answer.seconds_to_comment:.1f} s: {head}")


def rehearse(
    project: Project,
    params: Mapping[str, Mapping[str, Any]],
    changes: Mapping[str, Mapping[str, Mapping[str, Any]]],
    lint: bool = True,
) -> dict[str, float]:
    """The whole story; seconds by what they were spent on.

    Args:
        params: of the project from its first commit on.
        changes: to params, by the merge request's branch: `first`; `longer`, or none to leave that part out; `shorter`.
        lint: whether the lint stage runs too.
    """
    jobs, main_jobs = ([], []) if lint else (["gate"], ["release"])
    timings: dict[str, float] = {}

    say("A team uses the template: its data, a DVC remote, the variables of docs/gitlab.md")
    project.use_template(params)

    titles = {"first": "Train the first model", "longer": "Train longer"}
    for branch in [name for name in titles if name in changes]:
        iid = project.open_merge_request(branch, titles[branch], changes[branch])
        say(f"!{iid} {titles[branch]}")
        answer = project.run_merge_request(iid, jobs)
        expect(answer.run)
        report(answer)
        timings[f"!{iid} push to comment"] = answer.seconds_to_comment
        project.merge(iid)
        say(f"!{iid} is merged: the pipeline of main releases it")
        released = project.run_main(main_jobs)
        expect(released)
        timings[f"!{iid} merge to release"] = released.seconds
        print(f"released: {project.tags()[-1]}")

    iid = project.open_merge_request("shorter", "Hardly train at all", changes["shorter"])
    say(f"!{iid} Hardly train at all: the gate stops it")
    answer = project.run_merge_request(iid, jobs)
    expect(answer.run, failed="gate")
    report(answer)
    timings[f"!{iid} push to comment"] = answer.seconds_to_comment

    say(f"!{iid} again, with the label {LABEL}: nothing is trained, the gate lets it pass")
    merge_request = project.api().mergerequests.get(iid)
    merge_request.labels = [LABEL]
    merge_request.save()
    answer = project.run_merge_request(iid, jobs)
    expect(answer.run)
    report(answer)
    timings[f"!{iid} start to comment, everything restored"] = answer.seconds_to_comment
    return timings


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rehearse", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--install", action="store_true", help="install gitlab-ci-local, and nothing else")
    parser.add_argument("--without-lint", action="store_true", help="leave out the lint stage")
    parser.add_argument(
        "--serve", action="store_true", help="keep the emulated GitLab up to look at, until Ctrl+C"
    )
    parser.add_argument("--quiet", action="store_true", help="show no job's output")
    arguments = parser.parse_args()
    try:
        runner.install()
    except runner.Missing as error:
        sys.exit(f"error: {error}")
    if arguments.install:
        return
    shutil.rmtree(WORKSPACE, ignore_errors=True)
    with GitLabEmulator() as gitlab:
        project = Project(WORKSPACE, gitlab, show=not arguments.quiet, extra={"PYTEST": FEW_TESTS})
        digits = plain(read_yaml(ROOT / "presets" / "digits.yaml"))
        changes = {name: {"train": {"epochs": epochs}} for name, epochs in EPOCHS.items()}
        timings = rehearse(project, digits, changes, lint=not arguments.without_lint)
        say("Done")
        for what, seconds in timings.items():
            print(f"{seconds:7.1f} s  {what}")
        pages = [str(page.relative_to(ROOT)) for page in write_pages(gitlab, WORKSPACE)]
        print(f"The merge requests, as their reviewer sees them: {', '.join(pages)}")
        if arguments.serve:
            for iid in sorted(gitlab.project.merge_requests):
                print(gitlab.page_url(iid))
            try:
                input("Enter ends it. ")
            except (EOFError, KeyboardInterrupt):
                pass


def write_pages(gitlab: GitLabEmulator, folder: Path) -> list[Path]:
    """Each merge request's page as a file with its pictures in it, to look at when the emulator is gone."""

    def embedded(match: re.Match[str]) -> str:
        picture = requests.get(f"{gitlab.url}{match[1]}", timeout=10)
        return f'src="data:image/png;base64,{base64.b64encode(picture.content).decode()}"'

    pages = []
    for iid in sorted(gitlab.project.merge_requests):
        html = requests.get(gitlab.page_url(iid), timeout=10).text
        pages.append(folder / f"merge-request-{iid}.html")
        files.write_text(pages[-1], re.sub(r'src="(/[^"]+)"', embedded, html))
    return pages


if __name__ == "__main__":
    main()
