"""`make demo`: a merge request's life on scikit-learn's embedded digits, in demo/workspace, with no download.

    baseline on main → a change on a branch → pipeline → what it did to the metrics

Real git, real DVC with a remote in a folder; the checkout that this runs from is left untouched.
"""

import json
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
PICTURES = ("training_curves", "confusion_matrix", "reliability", "worst_mistakes")

IDENTITY = {"GIT_AUTHOR_NAME": "demo", "GIT_AUTHOR_EMAIL": "demo@localhost"}
IDENTITY |= {name.replace("AUTHOR", "COMMITTER"): value for name, value in IDENTITY.items()}


def say(step: str) -> None:
    print(f"\n\033[1m── {step}\033[0m" if sys.stdout.isatty() else f"\n── {step}", flush=True)


def run(*command: str, quiet: bool = False) -> str:
    """Run a command in the scratch project, showing it; its output when quiet. A failure ends the demo with its output."""
    if not quiet:
        print(f"$ {shlex.join(command)}", flush=True)
    environment = {
        **os.environ,
        **IDENTITY,
        "PYTHONPATH": str(PROJECT / "src"),
        "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db",
    }
    capture = subprocess.PIPE if quiet else None
    done = subprocess.run(command, cwd=PROJECT, env=environment, stdout=capture, stderr=capture, text=True)
    if done.returncode:
        sys.exit(f"the demo stopped: {shlex.join(command)} failed.\n{done.stdout or ''}{done.stderr or ''}")
    return done.stdout or ""


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


def metrics() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads((PROJECT / "reports/metrics.json").read_text())
    return found


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

    say("A merge request: would half the training do?")
    run("git", "switch", "--quiet", "--create", "half-the-epochs", quiet=True)
    run("dvc", "exp", "run", "--quiet", "--set-param", "train.epochs=6")
    commit("Train half as long")

    say("What changed, and what it did")
    run("dvc", "params", "diff", "main")
    run("dvc", "metrics", "diff", "main")

    for name in PICTURES:
        shutil.copy2(PROJECT / f"reports/plots/{name}.png", DEMO / f"{name}.png")
    accuracy = metrics()["accuracy"]
    say("Done")
    print(
        f"Accuracy on 360 test digits: {accuracy['mean']:.2%} (95 % interval {accuracy['low']:.2%} to {accuracy['high']:.2%}).\n"
        f"Pictures: demo/*.png. The repository to look around in: demo/workspace/project.\n"
        f"{time.monotonic() - started:.0f} s, without the installation."
    )


if __name__ == "__main__":
    main()
