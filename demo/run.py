"""`make demo`: a merge request's life on scikit-learn's embedded digits, in demo/workspace, with no download.

    baseline on main → a change on a branch → pipeline → verdict → comment → gate → release → serve → hot swap

Real git, real DVC with a remote in a folder; the checkout that this runs from is left untouched. `make rehearse` goes
the same way by the real .gitlab-ci.yml.
"""

import io
import secrets
import shutil
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import requests

sys.path.insert(0, str(Path(__file__).parents[1]))

from demo.scratch import ROOT, Scratch, say  # noqa: E402

DEMO = ROOT / "demo"
WORKSPACE = DEMO / "workspace"


def serve_and_swap(scratch: Scratch) -> None:
    token = secrets.token_urlsafe(32)
    test = np.load(scratch.project / "artifacts/test.npz")
    png = io.BytesIO()
    matplotlib.image.imsave(png, test["images"][0], cmap="gray", vmin=0, vmax=255, format="png")
    with scratch.serving(token, MODEL_TAG="model-v1.0.0") as address:

        def ask(method: str, route: str, **request: object) -> dict[str, object]:
            answer = requests.request(method, address + route, timeout=60, **request)  # type: ignore[arg-type]
            if not answer.ok:
                sys.exit(f"stopped: {method} {route} answered {answer.status_code}: {answer.text}")
            content: dict[str, object] = answer.json()
            return content

        def predict() -> None:
            found = ask("POST", "/predict", files={"file": ("digit.png", png.getvalue(), "image/png")})
            (prediction,) = found["predictions"]  # type: ignore[misc]
            print(
                f"POST /predict digit.png (a {test['labels'][0]}) → {prediction['class']}, "
                f"{prediction['probability']:.1%} sure, says {found['model']}"
            )

        predict()
        for route, body in (("/replace_ml_model", {"tag": "model-v1.1.0"}), ("/rollback_ml_model", None)):
            done = ask("POST", route, json=body, headers={"Authorization": f"Bearer {token}"})
            print(f"POST {route} {body or ''} → {done['previous']} → {done['tag']}")
            predict()


def main() -> None:
    started = time.monotonic()
    say("A team uses the template: its own data, and a DVC remote (here a folder)")
    scratch = Scratch(WORKSPACE)
    project, baseline_cost = scratch.project, WORKSPACE / "baseline-cost"
    (project / "dvc.lock").unlink(missing_ok=True)
    scratch.python("-m", "ml.params", "--preset", "presets/digits.yaml")
    scratch.python("-m", "ml.task.dataset", "fetch", "digits", "--to", "data")
    scratch.run("dvc", "add", "--quiet", "data")
    scratch.run("dvc", "remote", "add", "--default", "--quiet", "storage", str(WORKSPACE / "remote"))

    say("The baseline on main: load → preprocess → train → evaluate")
    scratch.run("dvc", "repro", "--quiet")
    scratch.commit("Train the baseline on digits")
    scratch.run("dvc", "push", "--quiet", "--run-cache")
    shutil.move(project / "reports/cost", baseline_cost)

    say("A merge request: would a fifth of the training do?")
    scratch.run("git", "switch", "--quiet", "--create", "fewer-epochs", quiet=True)
    scratch.run("dvc", "exp", "run", "--quiet", "--set-param", "train.epochs=2")
    scratch.commit("Train a fifth as long")

    say("The verdict: what changed, what it did, and whether that may be luck")
    scratch.python("-m", "ml.report.compare", "--baseline", "main", "--baseline-cost", str(baseline_cost))
    scratch.python(
        "-m",
        "ml.report.comment",
        "--out",
        "reports/comment.md",
        "--html",
        "reports/comment.html",
    )
    scratch.run("dvc", "params", "diff", "main")

    say("The gate: red or green for the merge request")
    scratch.python("-m", "ml.report.gate", may_fail=True)

    say("Release: each model in a folder of its own, with all that serving it needs")
    scratch.python("-m", "ml.bundle", "--tag", "model-v1.1.0", "--to", "models")
    scratch.run("git", "switch", "--quiet", "main")
    scratch.run("dvc", "checkout", "--quiet", "--force")
    scratch.python("-m", "ml.bundle", "--tag", "model-v1.0.0", "--to", "models")

    say("Serve it, ask it, and swap the model without a restart")
    serve_and_swap(scratch)

    say("Done")
    shutil.copy2(project / "reports/comment.html", DEMO / "comment.html")
    print(
        "The comment that the reviewer reads: demo/comment.html\n"
        "The repository to look around in: demo/workspace/project\n"
        f"{time.monotonic() - started:.0f} s, without the installation."
    )


if __name__ == "__main__":
    main()
