"""`make iris`: the template with another task, in examples/iris/workspace: a support vector machine on a CSV file.

    copy of the template, task/ and params.yaml replaced → baseline → a change → verdict → registry → serving

Nothing but src/ml/task/ and params.yaml differs from the template.
"""

import json
import secrets
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from demo.scratch import Scratch, say  # noqa: E402

WORKSPACE = HERE / "workspace"


def make_project(workspace: Path) -> Scratch:
    """The template with iris as its task; nothing has run yet."""
    scratch = Scratch(workspace)
    shutil.rmtree(scratch.project / "src/ml/task")
    shutil.copytree(
        HERE / "task", scratch.project / "src/ml/task", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy2(HERE / "params.yaml", scratch.project / "params.yaml")
    for name in ("dvc.lock", "data.dvc"):
        (scratch.project / name).unlink(missing_ok=True)
    return scratch


def main() -> None:
    say("The template, with its task replaced: src/ml/task/ and params.yaml")
    scratch = make_project(WORKSPACE)
    scratch.python("-m", "ml.task.dataset", "fetch", "--to", "data")
    scratch.run("dvc", "add", "--quiet", "data")
    scratch.run("dvc", "remote", "add", "--default", "--quiet", "storage", str(scratch.workspace / "remote"))

    say("The baseline on main")
    scratch.run("dvc", "repro", "--quiet")
    scratch.commit("Train the baseline on iris")
    scratch.run("dvc", "push", "--quiet", "--run-cache")
    scratch.run("dvc", "metrics", "show", "--md")

    say("A merge request: would wider margins do?")
    scratch.run("git", "switch", "--quiet", "--create", "wider-margins", quiet=True)
    scratch.run("dvc", "exp", "run", "--quiet", "--set-param", "model.penalty=0.01")
    scratch.commit("Widen the margins")
    scratch.python("-m", "ml.report.compare", "--baseline", "main")
    scratch.python("-m", "ml.report.comment", "--out", "reports/comment.md", "--html", "reports/comment.html")
    scratch.python("-m", "ml.report.gate", may_fail=True)
    scratch.python("-m", "ml.report.card")

    say("MLflow: the same pipeline with other params, and the baseline's model in the registry")
    scratch.run("git", "switch", "--quiet", "main", quiet=True)
    scratch.run("dvc", "checkout", "--quiet", "--force")
    others = ("-P", "dataset=iris.csv", "-P", "penalty=1.0")
    scratch.run("mlflow", "run", ".", "--env-manager", "local", "--experiment-name", "ml", *others)
    scratch.python("-m", "ml.tracking", "runs", "params.penalty > 0.1")
    scratch.python("-m", "ml.bundle", "--tag", "model-v1.0.0", "--to", "models")
    comment = ("--comment-url", "https://gitlab.example.com/g/iris/-/merge_requests/1#note_1")
    scratch.python("-m", "ml.promote", "register", "models/model-v1.0.0", "--gate", "first", *comment)
    scratch.python("-m", "ml.promote", "model-v1.0.0", "--to", "staging", "--why", "the first of its kind")
    scratch.python("-m", "ml.promote", "trace", "staging")

    say("Serving, answered by curl")
    with scratch.serving(secrets.token_urlsafe(32), MODEL_TAG="model-v1.0.0") as address:
        ask(scratch, address)
    with scratch.scoring("models:/ml@staging") as address:
        ask(scratch, address)


def ask(scratch: Scratch, address: str) -> None:
    """A flower's four lengths in mm; probabilities of setosa, versicolor, virginica come back."""
    header = ("--header", "Content-Type: application/json")
    body = json.dumps({"inputs": [[[51, 35, 14, 2]]]})
    scratch.run("curl", "--silent", "--fail-with-body", *header, "--data", body, f"{address}/invocations")
    print()


if __name__ == "__main__":
    main()
