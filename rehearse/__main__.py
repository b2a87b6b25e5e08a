"""`make rehearse`: the real .gitlab-ci.yml on this machine, against an emulated GitLab.

    first model → comment → merge → release → a change → comment → merge → release with nothing to train
    → a change that makes it worse → comment → stopped by the gate → let through by the label accept-regression
    → the same as a pipeline of merged results, after main has moved

Real git over HTTP, a real DVC remote in a folder, the package's own commands; the data are scikit-learn's digits. Jobs
run as GitLab's docker executor runs them, in containers of the Dockerfile's target `ci`, where podman or docker is
there, else in a shell. Your checkout stays untouched: everything lies in rehearse/workspace.
"""

import argparse
import base64
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import requests

from ml import files
from ml.params import plain, read_yaml
from rehearse import runner
from rehearse.jobs import Containers
from rehearse.pipelines import Run
from rehearse.project import CI_IMAGE, ROOT, Answer, Project
from tests.gitlab_emulator import GitLabEmulator

WORKSPACE = ROOT / "rehearse" / "workspace"
LABEL = "accept-regression"
EPOCHS = {"first": 4, "longer": 10, "shorter": 1}  # by branch
# A rehearsal is one of the tests, so its own `test` job runs a few of them.
FEW_TESTS = "tests/test_metrics.py"


def say(step: str) -> None:
    print(f"\n\033[1m── {step}\033[0m" if sys.stdout.isatty() else f"\n── {step}", flush=True)


def expect(run: Run, failed: str | None = None) -> None:
    """End the rehearsal unless the pipeline passed, or failed in the job `failed` alone."""
    if run.not_run:
        print(f"not run, as this machine lacks their image: {', '.join(run.not_run)}")
    if run.failed != ([failed] if failed else []):
        print(run.output)
        sys.exit(f"error: the rehearsal stopped: failed jobs: {', '.join(run.failed) or 'none'}.")


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

    say(f"main moves on; the pipeline of merged results compares !{iid} with what it would be merged into")
    project.move_main("Write down what was tried")
    merged = project.run_merge_request(iid, jobs, kind="merge")
    expect(merged.run)
    report(merged)
    timings[f"!{iid} start to comment, merged results"] = merged.seconds_to_comment
    return timings


def engine() -> str:
    """podman or docker, whichever works here; "" where neither does, or cannot reach this machine's own network."""
    if sys.platform != "linux":
        return ""
    for name in ("podman", "docker"):
        if shutil.which(name) and subprocess.run([name, "info"], capture_output=True).returncode == 0:
            return name
    return ""


def containers(engine: str, image: str, options: Sequence[str]) -> Containers:
    """With `image`, or with one built from this checkout. Exits with what the build said where it fails."""
    if not image:
        image = "localhost/ml-rehearse-ci"
        print(f"Building {image} from the Dockerfile: minutes the first time, seconds later.", flush=True)
        # Nothing here trains on a GPU: without CUDA the image is gigabytes smaller.
        torch = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
        command = [
            engine,
            "build",
            "--target",
            "ci",
            "--build-arg",
            f"TORCH_INDEX={torch}",
            "--tag",
            image,
            ".",
        ]
        done = subprocess.run(command, cwd=ROOT)
        if done.returncode:
            sys.exit(
                "error: the image of the jobs could not be built (above). Mend that, give one that is there by "
                "--image NAME, or rehearse without containers: python -m rehearse --executor shell"
            )
    return Containers(engine, {CI_IMAGE: image}, options=options)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rehearse", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--install", action="store_true", help="install gitlab-ci-local, and nothing else")
    parser.add_argument("--without-lint", action="store_true", help="leave out the lint stage")
    parser.add_argument(
        "--serve", action="store_true", help="keep the emulated GitLab up to look at, until Ctrl+C"
    )
    parser.add_argument("--quiet", action="store_true", help="show no job's output")
    parser.add_argument(
        "--executor",
        choices=["docker", "shell"],
        help="containers or none; left out: containers where they work",
    )
    parser.add_argument("--image", default="", help="image of the jobs; left out: built from the Dockerfile")
    parser.add_argument(
        "--run-options", default="", help="more options for podman run, as '--ulimit nofile=1000'"
    )
    arguments = parser.parse_args()
    try:
        runner.install()
    except runner.Missing as error:
        sys.exit(f"error: {error}")
    if arguments.install:
        return
    program = engine() if arguments.executor != "shell" else ""
    if arguments.executor == "docker" and not program:
        sys.exit(
            "error: neither podman nor docker works here (on Linux). Install podman, or use --executor shell."
        )
    inside = None
    if program:
        inside = containers(program, arguments.image, shlex.split(arguments.run_options))
        inside.empty(WORKSPACE)
    else:
        print(
            "No containers: jobs run in a shell, as you. GitLab runs them in containers, as another user than the "
            "checkout's owner; with podman or docker on Linux this does too."
        )
    shutil.rmtree(WORKSPACE, ignore_errors=True)
    with GitLabEmulator() as gitlab:
        project = Project(
            WORKSPACE, gitlab, containers=inside, show=not arguments.quiet, extra={"PYTEST": FEW_TESTS}
        )
        digits = plain(read_yaml(ROOT / "presets" / "digits.yaml"))
        changes = {name: {"train": {"epochs": epochs}} for name, epochs in EPOCHS.items()}
        timings = rehearse(project, digits, changes, lint=not arguments.without_lint)
        ran = sum(pipeline["status"] in ("success", "failed") for pipeline in gitlab.project.pipelines)
        say(f"Done: {ran} pipelines {'in containers' if inside else 'in a shell'}, each ending as it should")
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
