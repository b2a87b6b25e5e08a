"""How long a release takes when nothing has to be trained again: on digits, with real git, DVC and training.

    python -m benchmarks.release [--rounds 3]

A merge request is run through its pipeline and merged on an emulated GitLab; then the release job runs on a fresh clone,
with an empty cache. Counts the stages that ran (the goal: 0) and the seconds (the goal: at most 60 beyond installing).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from ml import files
from tests.gitlab_emulator import GitLabEmulator
from tests.release_project import ReleaseProject, run
from tests.test_pipeline import make_project

GOAL_SECONDS = 60.0
RESULT = files.REPORTS / "bench" / "release.json"


def prepare(folder: Path, gitlab: GitLabEmulator) -> ReleaseProject:
    """Digits on main, and merge request 3 merged after its pipeline."""
    project = ReleaseProject(folder, gitlab)
    gitlab.add_repository(project.bare)
    folder.mkdir(parents=True, exist_ok=True)
    make_project(project.developer)
    project.commit("Begin")
    project.push("main")
    run(project.developer, "dvc", "remote", "add", "--local", "--default", "main", str(project.remote))
    run(project.developer, "dvc", "push", "--quiet")
    project.propose(3, "Train for two epochs")
    project.review(3)
    project.merge(3)
    return project


def measure(project: ReleaseProject, commit: str) -> tuple[float, int, list[tuple[str, float]]]:
    """Seconds of the whole process, stages run, and the seconds of each step."""
    folder = project.clone(commit)
    started = time.monotonic()
    command = [sys.executable, "-m", "ml.release.publish"]
    run(folder, *command, environment=project.release_environment(commit))
    seconds = time.monotonic() - started
    journal = json.loads((folder / "reports/release.json").read_text())
    steps = [(each["step"], each["seconds"]) for each in journal["steps"]]
    return seconds, journal["facts"]["stages_run"], steps


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.release", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="runs: one release, then the same job again (3)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, GitLabEmulator() as gitlab:
        print("training a merge request on digits …", flush=True)
        project = prepare(Path(folder) / "work", gitlab)
        project.release_token = gitlab.state.add_token(gitlab.project, "write_repository", 40).value
        commit = project.main
        rounds = [measure(project, commit) for _ in range(arguments.rounds)]
    for step, seconds in rounds[0][2]:
        print(f"{seconds:7.2f} s  {step}")
    print(
        f"{rounds[0][0]:7.2f} s  the release, from the start of Python to its end; {rounds[0][1]} stages ran"
    )
    if rounds[1:]:
        again = statistics.median(seconds for seconds, *_ in rounds[1:])
        print(f"{again:7.2f} s  the same job again (median of {len(rounds) - 1})")
    met = all(seconds <= GOAL_SECONDS and ran == 0 for seconds, ran, _ in rounds)
    print(f"goal, 0 stages and at most {GOAL_SECONDS:.0f} s: {'met' if met else 'NOT met'}")
    files.write_json(
        RESULT, {"seconds": [each[0] for each in rounds], "stages_run": [each[1] for each in rounds]}
    )


if __name__ == "__main__":
    main()
