"""`make demo`: a merge request's life on scikit-learn's embedded digits, in demo/workspace, with no download.

    baseline on main → a change on a branch → pipeline → verdict → comment → gate

Real git, real DVC with a remote in a folder; the checkout that this runs from is left untouched.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo"
WORKSPACE = DEMO / "workspace"
PROJECT = WORKSPACE / "project"
REMOTE = WORKSPACE / "remote"
BASELINE_COST = WORKSPACE / "baseline-cost"

IDENTITY = {"GIT_AUTHOR_NAME": "demo", "GIT_AUTHOR_EMAIL": "demo@localhost"}
IDENTITY |= {name.replace("AUTHOR", "COMMITTER"): value for name, value in IDENTITY.items()}


def say(step: str) -> None:
    print(f"\n\033[1m── {step}\033[0m" if sys.stdout.isatty() else f"\n── {step}", flush=True)


def run(*command: str, quiet: bool = False, may_fail: bool = False) -> None:
    """Run a command in the scratch project, showing it unless `quiet`. A failure ends the demo unless it `may_fail`."""
    if not quiet:
        print(f"$ {shlex.join(command)}", flush=True)
    environment = {
        # In a GitLab job, CI_* and its kin describe another repository than the scratch one.
        **{
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("CI_", "GITLAB_", "REPO_TOKEN"))
        },
        **IDENTITY,
        "PYTHONPATH": str(PROJECT / "src"),
        "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db",
        "GIT_CONFIG_GLOBAL": os.devnull,  # no signing, no hooks of the user's
    }
    done = subprocess.run(command, cwd=PROJECT, env=environment)
    if done.returncode and not may_fail:
        sys.exit(f"the demo stopped: {shlex.join(command)} failed.")


def copy_project() -> None:
    """The files that git knows of, as they are now, into a repository of their own."""
    shutil.rmtree(WORKSPACE, ignore_errors=True)
    PROJECT.mkdir(parents=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (PROJECT / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, PROJECT / name)
    run("git", "init", "--quiet", "--initial-branch=main", quiet=True)


def commit(message: str) -> None:
    run("git", "add", "--all", quiet=True)
    run("git", "commit", "--quiet", "--message", message, quiet=True)


def main() -> None:
    started = time.monotonic()
    say("A team uses the template: its own data, and a DVC remote (here a folder)")
    copy_project()
    (PROJECT / "dvc.lock").unlink(missing_ok=True)
    run(sys.executable, "-m", "ml.params", "--preset", "presets/digits.yaml")
    run(sys.executable, "-m", "ml.task.dataset", "fetch", "digits", "--to", "data")
    run("dvc", "add", "--quiet", "data")
    run("dvc", "remote", "add", "--default", "--quiet", "storage", str(REMOTE))

    say("The baseline on main: load → preprocess → train → evaluate")
    run("dvc", "repro", "--quiet")
    commit("Train the baseline on digits")
    run("dvc", "push", "--quiet", "--run-cache")
    shutil.move(PROJECT / "reports/cost", BASELINE_COST)

    say("A merge request: would a fifth of the training do?")
    run("git", "switch", "--quiet", "--create", "fewer-epochs", quiet=True)
    run("dvc", "exp", "run", "--quiet", "--set-param", "train.epochs=2")
    commit("Train a fifth as long")

    say("The verdict: what changed, what it did, and whether that may be luck")
    run(
        sys.executable, "-m", "ml.report.compare", "--baseline", "main", "--baseline-cost", str(BASELINE_COST)
    )
    run(
        sys.executable,
        "-m",
        "ml.report.comment",
        "--out",
        "reports/comment.md",
        "--html",
        "reports/comment.html",
    )
    run("dvc", "params", "diff", "main")

    say("The gate: red or green for the merge request")
    run(sys.executable, "-m", "ml.report.gate", may_fail=True)

    say("Done")
    shutil.copy2(PROJECT / "reports/comment.html", DEMO / "comment.html")
    print(
        "The comment that the reviewer reads: demo/comment.html\n"
        "The repository to look around in: demo/workspace/project\n"
        f"{time.monotonic() - started:.0f} s, without the installation."
    )


if __name__ == "__main__":
    main()
